"""Causal self-attention: one file a kind, found by name.

Training sees whole sequences. Generation passes a context with a cache, in
which keys and values of earlier calls are kept (linen collection `cache`).
"""

from collections.abc import Mapping

import flax.linen as nn

from moe_jax.core import options as options_lib
from moe_jax.core import registry
from moe_jax.models.attention import context, positions
from moe_jax.models.attention.options import Options

# Files of this folder that are no kinds.
SHARED = ("context", "heads", "options", "positions")
# A section whose keys depend on the kind, see `table`.
OPTION = options_lib.Option("a section", lambda x: hasattr(x, "items"))


def table(name: str, plugins=()) -> Mapping[str, options_lib.Option]:
  """The options of a kind, {key: its description}."""
  return options_lib.of(registry.find("attention", name, plugins).build)


def read(section: Mapping, key: str, plugins=()) -> Options:
  """The options that a config describes.

  Args:
    section: options of the kind `name`; rope_scaling as `positions.scaling`
      takes it, and lists, which JSON has for tuples.
    key: of the section, for errors.
    plugins: folders with kinds of attention of your own.

  Raises:
    ConfigError: options that are missing, or do not fit together.
  """
  kind = registry.find("attention", section["name"], plugins).build
  options_lib.arguments(kind).check(section, key)
  values = {
    k: tuple(v) if isinstance(v, list) else v for k, v in section.items()
  }
  scaling = positions.scaling(section.get("rope_scaling"))
  return kind(**values | {"rope_scaling": scaling})


def build(options: Options, mesh, name: str) -> nn.Module:
  """The module (x_BLD, Context) -> y_BLD with these options."""
  return options.module(options, mesh, name=name)


__all__ = ["OPTION", "Options", "build", "context", "read", "table"]
