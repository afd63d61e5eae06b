"""The fields of a config.json, which may hold anything."""

import re
from collections.abc import Mapping
from typing import Any

from moe_jax.core.errors import ConfigError

# Fields that change nothing in the function that a decoder computes.
_IGNORED = re.compile(
  r"_\w+|\w+_token_id|\w*dropout|\w+_pdrop|(output|forced)_\w+|num_beam\w*"
  r"|\w+_(implementation|penalty|ngram_size|sequences)|router_\w*(coef|noise)"
  r"|architectures|auto_map|aux_loss_alpha|(torch_)?dtype|do_sample|ep_size"
  r"|chunk_size_feed_forward|early_stopping|experts_per_token|for_llm_compressor"
  r"|id2label|label2id|initial_context_length|initializer_range|prefix|use_cache"
  r"|is_(encoder_)?decoder|(max|min)_(length|new_tokens)|model_type|name_or_path"
  r"|max_(position_embeddings|seq_len|window_layers)|num_labels|problem_type"
  r"|moe_(jitter_eps|loss_weight)|pretraining_tp|qk_head_dim|return_dict\w*"
  r"|seq_aux|temperature|tokenizer_class|top_[kp]|typical_p|torchscript"
  r"|transformers_version"
)
REQUIRED = object()  # In the place of a default: an absent field is an error.
SAME = object()  # In the place of a value: null means the default.
_TYPES = {
  int: ((int,), "a whole number"),
  float: ((int, float), "a number"),
  bool: ((bool, int), "true or false"),
  str: ((str,), "a word"),
  list: ((list,), "a list"),
  dict: ((dict,), "an object"),
}
_MOST = 2**53  # Larger whole numbers are no sizes, and round as floats.


def ignored(name: str) -> bool:
  """Whether a field changes nothing in what a decoder computes."""
  return _IGNORED.fullmatch(name.rpartition(".")[2]) is not None


class Fields:
  """The fields of a config.json, each of which is taken once.

  where: the file, for errors.
  limits: {"size" or "layers": the most that the files have room for}.
  """

  def __init__(
    self,
    values: Mapping,
    where: str,
    sections=(),
    limits: Mapping | None = None,
  ):
    """
    Args:
      values: {name: value}.
      where, limits: see above.
      sections: fields that hold further ones; these are "SECTION.NAME" then.
    """
    self._left, self.where, self.limits = dict(values), where, limits or {}
    for section in sections:
      inner = self.take(section, dict, {})
      self._left |= {f"{section}.{name}": x for name, x in inner.items()}

  def error(self, name: str, value: Any, reason: str) -> ConfigError:
    """A sentence about a field and its value."""
    return ConfigError(
      f"{self.where} has {name} = {value!r:.80}, which {reason}"
    )

  def take(
    self, name: str, kind: type, default: Any, null: Any = SAME, least: int = 0
  ) -> Any:
    """The value of a field, of this type.

    Args:
      name: of the field.
      kind: int, float, bool, str, list or dict.
      default: the value of an absent field, or `REQUIRED`.
      null: the value that null stands for; `SAME`: the default.
      least: the smallest whole number.

    Raises:
      ConfigError: the field is absent and required, or of another type.
    """
    absent = name not in self._left
    value = self._left.pop(name, None)
    if value is None:
      value = default if absent or null is SAME else null
      if value is REQUIRED:
        raise ConfigError(f'{self.where} has no field "{name}"; add it')
      return value
    types, wanted = _TYPES[kind]
    number = type(value) in (int, float)
    if type(value) not in types or (number and not abs(value) < _MOST):
      raise self.error(name, value, f"is not {wanted}")
    if kind is int and value < least:
      raise self.error(name, value, f"is less than {least}")
    return kind(value) if kind in (float, bool) else value

  def check(self, name: str, value: int | None, limit: str) -> None:
    """Raises ConfigError for a size that the files have no room for."""
    most = self.limits.get(limit)
    if value is not None and most is not None and value > most:
      reason = f"is more than the files have room for: {most}"
      raise self.error(name, value, reason)

  def list_of(self, name: str, kind: type, default: list) -> list:
    """The value of a field that is a list, of whole numbers or of words."""
    value = self.take(name, list, default)
    for item in value:
      if type(item) is not kind:
        raise self.error(name, item, f"is not {_TYPES[kind][1]}")
    return value

  def peek(self, name: str, kind: type, default: Any) -> Any:
    """The value that `take` would return; the field stays."""
    here = {k: v for k, v in self._left.items() if k == name}
    return Fields(here, self.where).take(name, kind, default)

  def rest(self, also_ignored: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields that nobody took and that change nothing.

    Raises:
      ConfigError: one that may change something.
    """
    for name, value in self._left.items():
      known = ignored(name) or name in also_ignored
      if not known and value not in (None, False, 0, "", [], {}):
        raise self.error(name, value, "is a field that is not supported here")
    return {k: v for k, v in self._left.items() if ignored(k)}
