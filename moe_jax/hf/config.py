"""config.json and generation_config.json of a folder, in both directions."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import traverse_util

from moe_jax.core import files
from moe_jax.core.errors import ConfigError, did_you_mean
from moe_jax.hf import architecture, families
from moe_jax.hf.fields import Fields

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
# Fields that describe the folder that was read, and not a copy.
_NOT_KEPT = (
  *("architectures", "auto_map", "dtype", "torch_dtype", "model_type"),
  *("_name_or_path", "name_or_path", "transformers_version"),
)


class Source(NamedTuple):
  """The fields of a folder beside the architecture; `save` writes them again.

  fields: of config.json, those that change nothing in what a model computes.
  generation: generation_config.json, or {}.
  ends: the tokens that end a text, of both files.
  start: the token that a decoder beside an encoder begins a text with; None:
    the files name none.
  """

  fields: Mapping[str, Any] = {}
  generation: Mapping[str, Any] = {}
  ends: tuple[int, ...] = ()
  start: int | None = None


def load(path: pathlib.Path) -> tuple[dict, dict]:
  """Returns config.json of a folder, and generation_config.json or {}.

  Raises:
    ConfigError: there is no config.json, or a file is not a JSON object.
  """
  name, other = path / "config.json", path / "generation_config.json"
  if not name.exists():
    raise ConfigError(f"{path} has no config.json; give the folder of a model")
  fields = files.read_json(name, "the config of a model", "download it again")
  if not other.exists():
    return fields, {}
  return fields, files.read_json(
    other, "a generation config", "download it again"
  )


def read(
  config: Mapping, where: str, generation: Mapping = {}, room: float = math.inf
) -> tuple[families.Family, dict[str, Any], Source]:
  """Returns the meaning of a config.json.

  Args:
    config: its fields.
    where: its path, for errors.
    generation: fields of generation_config.json.
    room: the largest size that its files can have, see `Fields`.

  Returns:
    (its family, options of `architecture.build`, its other fields).

  Raises:
    ConfigError: an unknown model_type or field, or a value that is not
      supported; names it.
  """
  fields, known = Fields(config, where), families.known()
  name, quantized = config.get("model_type"), config.get("quantization_config")
  if name not in [*known]:
    reason = "is not supported" + did_you_mean(str(name)[:80], known)
    raise fields.error("model_type", name, reason)
  if quantized:
    reason = "is not read; convert the weights to bfloat16 first"
    raise fields.error("quantization_config", quantized, reason)
  family, said = known[name], {}
  if family.inner:
    config = fields.take(family.inner, dict, {})
    said = fields.rest(family.ignored)
    where = f"{where}, {family.inner}"
  fields, ours = Fields(config, where, family.sections, room), {}
  for row in family.rows:
    ours |= row.read(fields, ours)
  every = {"name": family.model, "layers": ["moe"] * ours["num_layers"]}
  ours = every | ours | family.constants
  said |= fields.rest(family.ignored)
  kept = {**family.ends, **said}
  first = said if "eos_token_id" in generation else kept
  ends, start = [], _tokens("decoder_start_token_id", family.ends, where)
  for values, file in ((first, where), (generation, "generation_config.json")):
    ends += _tokens("eos_token_id", values, file)
    start += _tokens("decoder_start_token_id", values, file)
  # A model never generates tokens outside of the vocabulary.
  vocabulary = range(ours["vocab_size"])
  ends = tuple(token for token in dict.fromkeys(ends) if token in vocabulary)
  return family, ours, Source(kept, generation, ends, *start[-1:])


def _tokens(name, values, file):
  """The tokens that a field of a file names: a single token or a list."""
  value = values.get(name)
  tokens = value if isinstance(value, list) else [value]
  tokens = [token for token in tokens if token is not None]
  if not all(type(token) is int and token >= 0 for token in tokens):
    reason = "is no token, nor a list of them"
    raise Fields({}, file).error(name, value, reason)
  return tokens


def write(arch, model_type: str | None) -> tuple[families.Family, dict]:
  """Returns (family, fields of config.json) that mean exactly this model.

  Names of fields in a section have a dot.

  Args:
    arch: of the model.
    model_type: the family; None: the first that has such models.

  Raises:
    ConfigError: no family has such a model, with the reason of each.
  """
  known, reasons = families.known(), []
  if model_type is not None and model_type not in known:
    reason = did_you_mean(model_type, known)
    raise ConfigError(f'there is no model_type "{model_type}"' + reason)
  ours = architecture.describe(arch)
  alike = [x.model_type for x in known.values() if x.model == ours["name"]]
  for name in alike if model_type is None else (model_type,):
    family, fields = known[name], {"model_type": name}
    where = f"a config.json of {name}"
    try:
      if family.model != ours["name"]:
        both = f"{family.model}, and this one is of {ours['name']}"
        raise ConfigError(f"its models are of model.name = {both}")
      if family.inner:
        raise ConfigError("it has more than a decoder")
      for row in family.rows:
        fields |= row.write(ours)
      nested = traverse_util.unflatten_dict(fields, sep=".")
      again = architecture.build(read(nested, where)[1], where)
      architecture.check_same(architecture.describe(again.arch), ours)
      return family, fields
    except ConfigError as e:
      reasons.append(f"{name}: {e}")
  reasons = "; ".join(reasons)
  raise ConfigError(f"no supported family can hold this model: {reasons}")


def kept(family: families.Family, source: Source) -> dict[str, Any]:
  """Returns fields of a copy's config.json beside those of its architecture.

  Args:
    family: of the copy.
    source: of the model.
  """
  # Null: the reference gives absent fields the values of its class.
  fields = dict.fromkeys(_SPECIAL) | {"architectures": [family.architecture]}
  for name, value in source.fields.items():
    section, _, own = name.rpartition(".")
    if own not in _NOT_KEPT and (not section or section in family.sections):
      fields[name] = value
  return fields
