"""Parts by name: a router, balancer, dispatcher, ... is one file."""

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import pathlib
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

from moe_jax.core import options as options_lib
from moe_jax.core.errors import ConfigError, did_you_mean

# Packages of the kinds of part that do not lie in a room of their name.
_PACKAGES = {
  "routers": "moe.routers",
  "balancers": "moe.balancers",
  "dispatchers": "moe.dispatchers",
  "attention": "models.attention",
  "datasets": "data.datasets",
  "optimizers": "training.optimizers",
  "hooks": "training.hooks",
}


class Spec(NamedTuple):
  """The name and the options that a part is made of.

  kind: a folder, such as "routers".
  name: a file in it, without ".py".
  plugins: folders that are searched first, for <kind>/<name>.py.
  options: all arguments of the file's `build`, those with a default included.
  """

  kind: str
  name: str
  plugins: tuple[str, ...]
  options: Mapping[str, Any]

  @property
  def build(self):
    """The function `build` of the part's file."""
    return find(self.kind, self.name, self.plugins).build


def load(kind: str, name: str, *, plugins: tuple[str, ...] = (), **options):
  """Calls `build(**options)` of moe_jax/<room>/<kind>/<name>.py or of a plugin.

  Args:
    kind: folder, such as "routers", "balancers", "dispatchers".
    name: file name without ".py".
    plugins: folders that are looked through first, for <kind>/<name>.py.
    **options: arguments of the file's `build`; hashable.

  Returns:
    The result of `build`, and if that is a record with a field `spec`, its
    `Spec`. Equal options give the same object, so that it can be a static
    argument of jit and a field of a linen module.

  Raises:
    ConfigError: no such name or option, or a value that its annotation in
      `build` does not allow.
  """
  section = {"name": name, **options}
  return from_config(kind, section, f"{kind}/{name}", plugins=plugins)


def find(kind: str, name: str, plugins: tuple[str, ...] = (), key: str = ""):
  """Returns the file of a part, as a module with a function `build`.

  Args:
    kind, name, plugins: as in `load`.
    key: the key of the name in the config, for errors.

  Raises:
    ConfigError: there is no such part, and the message names the nearest one;
      or the name is no text.
  """
  options_lib.text().check(name, key or f"{kind}.name")
  return _module(kind, name, tuple(plugins))


def from_config(kind: str, section, key: str, *, plugins=(), **more):
  """Returns the part that a section of a config describes.

  Args:
    kind: as in `load`.
    section: a mapping of "name" and the options of the part.
    key: the key of the section, for errors.
    plugins: as in `load`.
    **more: options that stand in another section.

  Raises:
    ConfigError: as in `load`; or the section is not a dict with a name.
  """
  made_of = spec(kind, section, key, plugins=plugins, **more)
  try:
    return _build(*made_of[:3], **made_of.options)
  except ConfigError as e:
    raise ConfigError(f"{key}: {e}") from e


def spec(kind: str, section, key: str, *, plugins=(), **more) -> Spec:
  """Returns the checked options of `from_config`, without building the part.

  Args:
    kind, section, key, plugins, **more: as in `from_config`.

  Raises:
    ConfigError: as in `from_config`.
  """
  options_lib.part().check(section, key)
  for option in more:
    if option in section:
      raise ConfigError(f"{key}.{option} is set outside of {key}; leave it out")
  given = {**section, **more}
  given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
  name = given.pop("name")
  build = find(kind, name, plugins, f"{key}.name").build
  options_lib.arguments(build).check(given, key)
  arguments = inspect.signature(build).parameters.values()
  defaults = {a.name: a.default for a in arguments}
  return Spec(kind, name, tuple(plugins), defaults | given)


def make(kind: str, section, key: str, plugins, *args, **given):
  """Builds a part anew, whose `build` takes more than the options of a config.

  Args:
    kind, section, key, plugins: as in `from_config`.
    *args, **given: arguments of `build` beside its options.

  Raises:
    ConfigError: as in `from_config`.
  """
  options_lib.part().check(section, key)
  own = dict(section)
  module = find(kind, own.pop("name"), plugins, f"{key}.name")
  options = options_lib.arguments(functools.partial(module.build, *args))
  own_table = {k: x for k, x in options.table.items() if k not in given}
  options_lib.section(own_table, ()).check(own, key)
  options.check({**own, **given}, key)  # Says if an argument is missing.
  part = module.build(*args, **given, **own)
  _check_part(part, _package(kind).PART, module.__file__)
  return part


def rebuild(part, numbers: Mapping[str, Any]):
  """Returns the part with other values for some of its number options.

  Args:
    part: from `load` or `from_config`.
    numbers: {option: value}; the values, such as tracers, are not checked.
  """
  made_of = part.spec
  return _with_spec(made_of.build(**{**made_of.options, **numbers}), made_of)


def number_options(part) -> dict[str, float]:
  """Returns {option: value} of a part's options that change no shape.

  Args:
    part: from `load` or `from_config`; or a Spec.
  """
  made_of = getattr(part, "spec", part)
  table = options_lib.of(made_of.build)
  return {
    name: value
    for name, value in made_of.options.items()
    if table[name].is_number and type(value) in (int, float)
  }


def names(kind: str, plugins: tuple[str, ...] = ()) -> list[str]:
  """Returns the names that `load` knows for a kind, sorted.

  All files of the kind's folders are parts, except those with "_" first and
  those in the tuple SHARED of the package.

  Args:
    kind, plugins: as in `load`.
  """
  return sorted(_files(kind, plugins))


# Typed: 1, 1.0 and True are equal, and not the same option.
@functools.lru_cache(maxsize=None, typed=True)
def _build(kind, name, plugins, /, **options):
  wanted = getattr(_package(kind), "PART", None)
  module = find(kind, name, plugins)
  try:
    part = module.build(**options)
  except TypeError as e:
    # The record lacks a field, or has no such field.
    if wanted is None or f"{wanted.__name__}.__init__()" not in str(e):
      raise
    raise ConfigError(f"{module.__file__}: {e}; see {wanted.__module__}") from e
  if wanted is not None:
    _check_part(part, wanted, module.__file__)
  return _with_spec(part, Spec(kind, name, plugins, options))


def _check_part(part, wanted, where):
  """Raises ConfigError for a part that is not the record of its kind."""
  if not isinstance(part, wanted):
    raise ConfigError(
      f"{where}: build(...) returned {options_lib.shown(part)}, not the"
      f" record {wanted.__name__}; see {wanted.__module__}"
    )
  for name, hint in typing.get_type_hints(wanted).items():
    kinds = hint.__args__ if isinstance(hint, types.UnionType) else (hint,)
    kinds = tuple(typing.get_origin(kind) or kind for kind in kinds)
    value = getattr(part, name)
    if Any not in kinds and not isinstance(value, kinds):
      raise ConfigError(
        f"{where}: {wanted.__name__}.{name} is {options_lib.shown(value)}, not"
        f" {hint}; see {wanted.__module__}"
      )


def _with_spec(part, made_of):
  has_spec = "spec" in getattr(part, "__dataclass_fields__", {})
  return dataclasses.replace(part, spec=made_of) if has_spec else part


@functools.cache
def _module(kind, name, plugins):
  files = _files(kind, plugins)
  if name not in files:
    remedy = did_you_mean(name, files)
    raise ConfigError(f'there is no "{name}" in {kind}{remedy}')
  if files[name].parent.parent in map(pathlib.Path, plugins):
    module = import_file(files[name], f"moe_jax_plugins.{kind}.{name}")
  else:
    module = importlib.import_module(f"{_package(kind).__name__}.{name}")
  if not callable(getattr(module, "build", None)):
    raise ConfigError(f"{module.__file__} has no function build(...)")
  return module


def _files(kind, plugins):
  """{name: path} of a kind's parts; those of the first plugin win."""
  package = _package(kind)
  files = _parts_in(*package.__path__)
  for name in getattr(package, "SHARED", ()):
    files.pop(name, None)
  for folder in reversed(plugins):
    path = pathlib.Path(folder).absolute()
    if not path.is_dir():
      raise ConfigError(f"config.plugins: the folder {path} is not there")
    files |= _parts_in(folder, kind)
  return files


def _parts_in(*folder):
  return {p.stem: p for p in pathlib.Path(*folder).glob("[!_]*.py")}


def _package(kind):
  return importlib.import_module(f"moe_jax.{_PACKAGES.get(kind, kind)}")


def import_file(path: pathlib.Path, module_name: str) -> types.ModuleType:
  """Returns a Python file, wherever it lies, imported as a module.

  Args:
    path: the file.
    module_name: the module's name in `sys.modules`.
  """
  spec = importlib.util.spec_from_file_location(module_name, path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[module_name] = module
  spec.loader.exec_module(module)
  return module
