"""config.json and generation_config.json of a folder, in both directions."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import traverse_util

from moe_jax.core import files
from moe_jax.core.errors import ConfigError, did_you_mean
from moe_jax.hf import architecture, families
from moe_jax.hf.fields import Fields

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
# Fields that are true of the folder that was read, and not of a copy.
_NOT_KEPT = (
  *("architectures", "auto_map", "dtype", "torch_dtype", "model_type"),
  *("_name_or_path", "name_or_path", "transformers_version"),
)


class Source(NamedTuple):
  """What a folder says beside the architecture; `save` writes it again.

  fields: of config.json, those that change nothing in what a model computes.
  generation: generation_config.json, {} without one.
  ends: the tokens that end a text, of both files.
  """

  fields: Mapping[str, Any]
  generation: Mapping[str, Any]
  ends: tuple[int, ...]


def load(path: pathlib.Path) -> tuple[dict, dict]:
  """config.json of a folder, and generation_config.json or {}.

  Raises:
    ConfigError: there is no config.json, or one is not a JSON object.
  """
  try:
    name = path / "config.json"
    config = files.read_json(name, "the config of a model", "get it anew")
  except (FileNotFoundError, NotADirectoryError):
    raise ConfigError(
      f"{path} has no config.json; give the folder of a model with its"
      " config.json and safetensors files"
    ) from None
  try:
    name = path / "generation_config.json"
    return config, files.read_json(name, "a generation config", "get it anew")
  except FileNotFoundError:
    return config, {}


def read(
  config: Mapping[str, Any],
  where: str,
  *,
  limits: Mapping[str, int] | None = None,
  generation: Mapping[str, Any] | None = None,
) -> tuple[families.Family, dict[str, Any], Source]:
  """The meaning of a config.json.

  Args:
    config: its fields.
    where: its path, for errors.
    limits: of sizes, see `Fields`.
    generation: fields of generation_config.json.

  Returns:
    (its family, options as `architecture.build` takes them, what else it says).

  Raises:
    ConfigError: an unknown model_type or field, or a value that is not
      supported; names it.
  """
  family, kept, generation = _family(config, where), {}, generation or {}
  fields = Fields(config, where, family.sections, limits)
  if family.inner:
    inner = fields.take(family.inner, dict, {})
    kept = fields.rest(family.ignored)
    fields = Fields(inner, f"{where}, {family.inner}", family.sections, limits)
  ours = {}
  for row in family.rows:
    ours |= row.read(fields, ours)
  ours = {"layers": ["moe"] * ours["num_layers"], **ours, **family.constants}
  if any(kind.startswith("moe") for kind in ours["layers"]):
    fields.check("experts", ours["moe.num_experts"], "size")
    fields.check("width of experts", ours["moe.d_expert"], "size")
  said = kept | fields.rest(family.ignored)
  kept, vocab, eos = {**family.ends, **said}, ours["vocab_size"], "eos_token_id"
  ends = [
    *_tokens(said if eos in generation else kept, eos, vocab, where),
    *_tokens(generation, eos, vocab, "generation_config.json"),
  ]
  return family, ours, Source(kept, generation, tuple(dict.fromkeys(ends)))


def _tokens(values, name, vocab_size, where):
  """Special tokens, which are a number, several, or null."""
  value = values.get(name)
  ids = [] if value is None else value if isinstance(value, list) else [value]
  if not all(type(i) is int and i >= 0 for i in ids):
    raise Fields({}, where).error(
      name, value, "is no token, nor a list of them"
    )
  return [i for i in ids if i < vocab_size]  # Others never come up.


def _family(config, where):
  name, quantized = config.get("model_type"), config.get("quantization_config")
  known, fields = families.known(), Fields({}, where)
  if not isinstance(name, str) or name not in known:
    reason = "is not supported" + did_you_mean(str(name)[:80], known)
    raise fields.error("model_type", name, reason)
  if quantized:
    reason = "is not read; convert the weights to bfloat16 first"
    raise fields.error("quantization_config", quantized, reason)
  return known[name]


def write(
  arch, model_type: str | None
) -> tuple[families.Family, dict[str, Any]]:
  """(family, fields of config.json) that mean this very model.

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
  for name in known if model_type is None else (model_type,):
    try:
      fields, reason = _of_family(known[name], ours)
    except ConfigError as e:
      reason = str(e)
    if reason is None:
      return known[name], fields
    reasons.append(f"{name}: {reason}")
  raise ConfigError(
    "this model is none that can be saved for others to read: "
    + "; ".join(reasons)
  )


def _of_family(family, ours):
  """(its fields, why they are not this model or None)."""
  fields = {"model_type": family.model_type}
  for row in family.rows:
    fields |= row.write(ours)
  where = f"a config.json of {family.model_type}"
  _, again, _ = read(traverse_util.unflatten_dict(fields, sep="."), where)
  model = architecture.build(again, where)
  same = architecture.describe(model.arch)
  return fields, architecture.difference(same, ours)


def kept(family: families.Family, source: Source | None) -> dict[str, Any]:
  """Fields of a copy's config.json beside those of its architecture.

  Args:
    family: of the copy.
    source: of the model, if it was loaded.
  """
  # Null, as the reference gives absent ones the values of its class.
  fields = dict.fromkeys(_SPECIAL) | {"architectures": [family.architecture]}
  for name, value in (source.fields if source else {}).items():
    section, _, own = name.rpartition(".")
    if own not in _NOT_KEPT and (not section or section in family.sections):
      fields[name] = value
  return fields
