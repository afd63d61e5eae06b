"""Causal self-attention: one file a kind, found by name.

Training sees whole sequences. Generation passes a context with a cache, in
which keys and values of earlier calls are kept (linen collection `cache`).
"""

from collections.abc import Mapping

from moe_jax.core import options as options_lib
from moe_jax.core import registry
from moe_jax.core.errors import ConfigError
from moe_jax.models.attention import context, positions
from moe_jax.models.attention.options import Options

# Files of this folder that are no kinds of attention.
SHARED = ("context", "heads", "options", "positions")
# A section whose keys depend on the kind.
OPTION = options_lib.Option("a section", lambda x: hasattr(x, "items"))


def find(name: str, plugins: tuple[str, ...], key: str) -> type[Options]:
  """Returns `build` of a kind of attention, a class of options.

  Args:
    name: of a file in this folder or of a plugin.
    plugins: folders that are searched first.
    key: the config's key of the name, for errors.

  Raises:
    ConfigError: there is no such file, or its `build` is no subclass of
      Options.
  """
  kind = registry.find("attention", name, plugins, key).build
  if not (isinstance(kind, type) and issubclass(kind, Options)):
    raise ConfigError(
      f"attention/{name}: build is {options_lib.shown(kind)}, not a subclass of"
      f" Options; see {__name__}.options"
    )
  return kind


def read(kind: type[Options], section: Mapping, key: str) -> Options:
  """Returns the options that a config describes.

  Args:
    kind: from `find`.
    section: its options; rope_scaling as `positions.scaling` takes it, and
      lists, which JSON has for tuples.
    key: of the section, for errors.

  Raises:
    ConfigError: options that are missing, or do not fit together.
  """
  options_lib.arguments(kind).check(section, key)
  values = {
    k: tuple(v) if isinstance(v, list) else v for k, v in section.items()
  }
  scaling = positions.scaling(section.get("rope_scaling"))
  return kind(**values | {"rope_scaling": scaling})


__all__ = ["OPTION", "Options", "context", "find", "read"]
