"""The fields of a config.json, whose content is not trusted."""

import math
import re
from typing import Any

from moe_jax.core.errors import ConfigError

# Fields that change nothing in the function that a model computes.
_IGNORED = re.compile(
  r"_\w+|\w+_token_id|(?!moe_token)\w*dropout|\w+_pdrop|(output|forced)_\w+"
  r"|num_beam\w*|\w+_(implementation|penalty|ngram_size|sequences)"
  r"|router_\w*(coef|noise)|architectures|auto_map|aux_loss_alpha"
  r"|(torch_)?dtype|do_sample|ep_size"
  r"|chunk_size_feed_forward|early_stopping|experts_per_token|for_llm_compressor"
  r"|id2label|label2id|initial_context_length|initializer_range|prefix|use_cache"
  r"|is_(encoder_)?decoder|(max|min)_(length|new_tokens)|model_type|name_or_path"
  r"|max_(position_embeddings|seq_len|sequence_length|window_layers)|num_labels"
  r"|gradient_checkpointing|problem_type"
  r"|moe_(jitter_eps|loss_weight)|pretraining_tp|qk_head_dim|return_dict\w*"
  r"|seq_aux|temperature|tokenizer_class|top_[kp]|typical_p|torchscript"
  r"|transformers_version"
)
REQUIRED = object()  # Given as a default: an absent field is an error.
SAME = object()  # Given as the value of null: null means the default.
_WORDS = {int: "a whole number", float: "a number", bool: "true or false"}
_WORDS |= {str: "a word", list: "a list", dict: "an object"}
_ALSO = {float: int, bool: int}  # Types that may stand for another.
_MOST = 2**53  # Larger whole numbers are no sizes, and round as floats.


def ignored(name: str) -> bool:
  """Whether a field changes nothing in what a model computes."""
  return _IGNORED.fullmatch(name.rpartition(".")[2]) is not None


class Fields:
  """The fields of a config.json, each of which is taken once.

  where: the file, for errors.
  """

  def __init__(self, values, where: str, sections=(), room: float = math.inf):
    """Starts with all fields.

    Args:
      values: {name: value}.
      where: see above.
      sections: fields that hold further fields, whose names then are
        "SECTION.NAME".
      room: the largest size that the files of the model can have.
    """
    self._all, self._taken, self.where, self._room = {}, set(), where, room
    for section in sections:
      inner = Fields(values, where).take(section, dict, {})
      self._all |= {f"{section}.{name}": x for name, x in inner.items()}
    self._all |= {k: x for k, x in values.items() if k not in sections}

  def error(self, name: str, value: Any, reason: str) -> ConfigError:
    """Returns the error for a field's value.

    Args:
      name, value: of the field.
      reason: the end of the sentence, after "which".
    """
    words = f"{self.where} has {name} = {value!r:.80}"
    return ConfigError(f"{words}, which {reason}")

  def take(self, name, kind, default, null=SAME, least=0, bounded=False):
    """Returns the value of a field, of this type.

    Args:
      name: of the field.
      kind: int, float, bool, str, list or dict.
      default: the value of an absent field, or `REQUIRED`.
      null: the value that null stands for; `SAME`: the default.
      least: the smallest whole number.
      bounded: the files must have room for such a size.

    Raises:
      ConfigError: the field is absent and required, or of another type.
    """
    self._taken.add(name)
    value = self._all.get(name)
    if value is None:
      absent = name not in self._all
      value = default if absent or null is SAME else null
      if value is REQUIRED:
        raise ConfigError(f'{self.where} has no field "{name}"; add it')
      return value
    huge = type(value) in (int, float) and not abs(value) < _MOST
    if huge or type(value) not in (kind, _ALSO.get(kind)):
      raise self.error(name, value, f"is not {_WORDS[kind]}")
    if kind is int and value < least:
      raise self.error(name, value, f"is less than {least}")
    if bounded and value > self._room:
      reason = f"is more than the files have room for: {self._room}"
      raise self.error(name, value, reason)
    return kind(value)

  def list_of(self, name: str, kind: type, default: list) -> list:
    """Returns the value of a field that is a list.

    Args:
      name, default: as in `take`.
      kind: of the items, int or str.
    """
    value = self.take(name, list, default)
    for item in value:
      if type(item) is not kind:
        raise self.error(name, item, f"is not {_WORDS[kind]}")
    return value

  def rest(self, also_ignored: tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns the fields that change nothing.

    Args:
      also_ignored: names of more such fields.

    Raises:
      ConfigError: nobody took a field that may change something.
    """
    for name, value in self._all.items():
      known = name in self._taken or ignored(name) or name in also_ignored
      if not known and value not in (None, False, 0, "", [], {}):
        raise self.error(name, value, "is a field that is not supported here")
    return {k: v for k, v in self._all.items() if ignored(k)}
