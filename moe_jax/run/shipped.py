"""Config files, and the experiments that come with the package.

They are the folders configs/ and experiments/ of a checkout. A wheel has them
inside of the package, as other projects have folders with these names too.
"""

import pathlib
import sys
from collections.abc import Callable

import moe_jax
from moe_jax.core import registry
from moe_jax.core.errors import ConfigError, did_you_mean


def folder() -> pathlib.Path:
  """Returns the folder that holds configs/ and experiments/."""
  package = pathlib.Path(moe_jax.__file__).parent
  inside = package / "shipped"
  return inside if inside.is_dir() else package.parent


def config(name: str) -> str:
  """Returns the path of a config file that exists.

  Args:
    name: a path, or the name of a shipped config, such as "tiny". The path
      configs/tiny.py is the shipped file too, unless there is a file at that
      path.

  Raises:
    ConfigError: there is no such file.
  """
  given, ours = pathlib.Path(name), folder() / "configs"
  is_name, path = name.isidentifier(), given
  if is_name:
    path = ours / f"{name}.py"
  elif given.parent == pathlib.Path("configs") and not given.is_file():
    path = ours / given.name
  if path.is_file():
    return str(path)
  files = path.parent.glob("[!_]*.py")
  known = [f.stem if is_name else str(given.parent / f.name) for f in files]
  known += [f"{name}.py"] * pathlib.Path(f"{name}.py").is_file()
  remedy = did_you_mean(name, known)
  raise ConfigError(f'there is no config file "{name}"{remedy}')


def get_config(path: pathlib.Path) -> Callable:
  """Returns the function `get_config` of a Python file.

  Raises:
    ConfigError: it is no such file.
  """
  if path.suffix == ".py":
    # Configs import `configs.base`, from the folder above or the shipped ones.
    sys.path[:0] = [str(path.resolve().parent.parent), str(folder())]
    try:
      module = registry.import_file(path, f"config_{path.stem}")
    finally:
      del sys.path[:2]
    if hasattr(module, "get_config"):
      return module.get_config
  raise ConfigError(
    f"{path} is neither a Python file with get_config() nor the config.json of"
    " a run"
  )
