"""The configs and experiments that come with the package.

They are the folders configs/ and experiments/ of a checkout. A wheel has them
inside of the package, as other projects have folders with these names too.
"""

import pathlib

import moe_jax
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
  remedy = did_you_mean(name, known)
  raise ConfigError(f'there is no config file "{name}"{remedy}')
