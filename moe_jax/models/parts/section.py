"""The keys of `config.model`: all models share them, and each reads some."""

import dataclasses
from collections.abc import Mapping

from moe_jax.core import options as options_lib
from moe_jax.core.errors import ConfigError
from moe_jax.core.options import integer, of, optional
from moe_jax.models.parts import embedding, image, layers, stack, video

# These fields of a stack are no keys: models make them, or get them otherwise.
_MADE = ("kinds", "mesh", "names", "sequence", "first_number", "causal")
_MADE += ("axes",)

# Every key of `config.model`.
OPTIONS = {
  **{k: option for k, option in of(stack.Stack).items() if k not in _MADE},
  **of(embedding.Vocabulary),
  **layers.OPTIONS,
  "name": str,
  "vocab_size": optional(integer(1)),
  "source_vocab_size": optional(integer(1)),
  "image": options_lib.section(of(image.Image), required=()),
  "video": options_lib.section(of(video.Video), required=()),
}
# Keys of `config.model.encoder`: those of its layers.
ENCODER = {k: OPTIONS[k] for k in ("num_layers", "prefix", "pattern")}
ENCODER |= layers.OPTIONS | layers.OF_A_VARIANT
OPTIONS["encoder"] = options_lib.section(ENCODER, required=())


# Keys that only some models read, and a model that reads them.
_READERS = {
  "vocab_size": "decoder",
  "source_vocab_size": "encoder_decoder",
  "encoder": "encoder_decoder",
  "image": "vision",
  "video": "diffusion",
}


def check(section: Mapping, *read: str) -> None:
  """Raises ConfigError for impossible values, or keys without a meaning.

  Args:
    section: `config.model`.
    *read: the keys of `_READERS` that this model reads.
  """
  options_lib.section(OPTIONS).check(section, "model")
  for key, reader in _READERS.items():
    if section[key] and key not in read:
      raise ConfigError(
        f"model.{key} = {options_lib.shown(section[key])} has no meaning in the"
        f" model {section['name']}; leave it out, or set model.name ="
        f" {reader}"
      )


def fields(section: Mapping, record: type) -> dict:
  """Returns the values of a section `model` that are fields of a record.

  Args:
    section: `config.model`, or a part of it.
    record: a dataclass.
  """
  names = {field.name for field in dataclasses.fields(record)}
  return {
    key: tuple(value) if isinstance(value, list) else value
    for key, value in section.items()
    if key in names
  }
