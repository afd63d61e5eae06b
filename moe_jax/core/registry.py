"""Parts by name: a router, balancer, dispatcher, ... is one file."""

import functools
import importlib
import importlib.util
import inspect
import pathlib
import sys
import typing

from moe_jax.core.errors import ConfigError, did_you_mean

_NONE = type(None)
_PLAIN = {bool, int, float, str, _NONE}
# Where the files of each kind of part lie in the package.
_ROOMS = {
  "routers": "moe",
  "balancers": "moe",
  "dispatchers": "moe",
  "datasets": "data",
}
_MADE = {}  # By id, of what the cache of _build keeps alive.


def load(kind: str, name: str, *, plugins: tuple[str, ...] = (), **options):
  """Calls `build(**options)` of moe_jax/<kind>/<name>.py or of a plugin.

  Args:
    kind: folder: "routers", "balancers", "dispatchers", "models", "datasets".
    name: file name without ".py".
    plugins: folders that are looked through first, for <kind>/<name>.py.
    **options: what the file's `build` takes; hashable.

  Returns:
    What `build` returns. Equal options give the same object, so that it can
    be a static argument of jit and a field of a linen module.

  Raises:
    ConfigError: no such name or option; names the nearest known one.
  """
  # 1, 1.0 and True are equal, but not the same option.
  items = tuple(sorted(options.items()))
  types = tuple(type(value) for _, value in items)
  for option, value in items:
    if isinstance(value, dict | list | set):
      raise ConfigError(
        f"{kind}/{name}: the option {option} = {value!r} is of type"
        f" {type(value).__name__}; options are numbers, words or tuples"
      )
  return _build(kind, name, tuple(plugins), items, types)


def made_of(part) -> tuple[str, dict]:
  """(name, all options) that `load` made a part of; {} of what it did not."""
  if id(part) not in _MADE:
    return "", {}
  kind, name, plugins, options = _MADE[id(part)]
  return name, resolved(kind, name, plugins=plugins, **dict(options))


def names(kind: str, plugins: tuple[str, ...] = ()) -> list[str]:
  """The names that `load` knows for a kind, sorted."""
  package = importlib.import_module(_package(kind))
  folders = [*package.__path__, *(pathlib.Path(f, kind) for f in plugins)]
  files = (
    f for folder in folders for f in pathlib.Path(folder).glob("[!_]*.py")
  )
  # Files beside them that are no part have no `build`.
  return sorted({f.stem for f in files if "\ndef build(" in f.read_text()})


def split(kind: str, section) -> tuple[str, dict]:
  """(name, options) of a part as a config has it: a mapping with its name.

  Raises:
    ConfigError: it is something else.
  """
  try:
    options = dict(section)
    return options.pop("name"), options
  except (TypeError, ValueError, KeyError):
    raise ConfigError(
      f"one of the {kind} is {section!r}; give a dict with its name and"
      f' options, such as {{"name": "{names(kind)[0]}"}}'
    ) from None


def resolved(
  kind: str, name: str, *, plugins: tuple[str, ...] = (), **options
) -> dict:
  """The options of a part: the given ones, and the defaults of the others."""
  build = _module(kind, name, tuple(plugins)).build
  known = inspect.signature(build).parameters
  defaults = {
    n: p.default for n, p in known.items() if p.default is not p.empty
  }
  return {**defaults, **options}


@functools.cache
def _build(kind, name, plugins, options, types):
  del types
  build = _module(kind, name, plugins).build
  known = inspect.signature(build).parameters
  for option, _ in options:
    if option not in known:
      raise ConfigError(
        f'{kind}/{name} has no option "{option}"' + did_you_mean(option, known)
      )
  hints = typing.get_type_hints(build)
  for option, value in options:
    _check_type(kind, name, option, value, hints.get(option))
  missing = [
    p.name
    for p in known.values()
    if p.default is p.empty and p.name not in dict(options)
  ]
  if missing:
    raise ConfigError(f"{kind}/{name} needs the option(s) {', '.join(missing)}")
  part = build(**dict(options))
  _MADE[id(part)] = kind, name, plugins, options
  return part


def _check_type(kind, name, option, value, hint):
  """Raises ConfigError for a value of another type than `build` says."""
  allowed = typing.get_args(hint) or (hint,)
  if not set(allowed) <= _PLAIN:  # Not annotated, or with a type of its own.
    return
  if type(value) in allowed or (type(value) is int and float in allowed):
    return
  wanted = " or ".join("None" if t is _NONE else t.__name__ for t in allowed)
  raise ConfigError(
    f"{kind}/{name}: the option {option} = {value!r} is of type"
    f" {type(value).__name__}; give {wanted}"
  )


@functools.cache
def _module(kind, name, plugins):
  module = _find(kind, name, plugins)
  if not hasattr(module, "build"):
    raise ConfigError(f'"{name}" in {kind} has no function build(...)')
  return module


def _find(kind, name, plugins):
  for folder in plugins:
    if not pathlib.Path(folder).is_dir():
      raise ConfigError(
        f"the plugin folder {pathlib.Path(folder).absolute()} is not there;"
        " correct config.plugins"
      )
    path = pathlib.Path(folder, kind, f"{name}.py")
    if path.exists():
      return _import_file(path, f"moe_jax_plugins.{kind}.{name}")
  if name not in names(kind):
    raise ConfigError(
      f'there is no "{name}" in {kind}'
      + did_you_mean(name, names(kind, plugins))
    )
  return importlib.import_module(f"{_package(kind)}.{name}")


def _package(kind):
  return (
    f"moe_jax.{_ROOMS[kind]}.{kind}" if kind in _ROOMS else f"moe_jax.{kind}"
  )


def _import_file(path, module_name):
  spec = importlib.util.spec_from_file_location(module_name, path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[module_name] = module
  spec.loader.exec_module(module)
  return module
