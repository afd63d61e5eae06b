"""Python source files of all installed packages: as much text as there is.

They are `python_sources` with other files, for runs that need more than its 13
megabytes. The text depends on the machine: prepare it once, and give every run
the prepared folder as `data.dir`. Licences are those of the packages.
"""

import importlib.metadata
import sys

from moe_jax.data.datasets import _builder, python_sources

OURS = "moe_jax"  # Its files change from day to day.


def build() -> type[_builder.Texts]:
  """Returns the TFDS builder of this dataset."""
  return InstalledSources


class InstalledSources(python_sources.PythonSources):
  """Code and docstrings of the Python files of all installed packages."""

  @staticmethod
  def sources() -> dict[str, str]:
    """Returns {name: version} of the packages that have the text."""
    versions = {name: x.version for name, x in _installed().items()}
    return {"python": "{}.{}".format(*sys.version_info[:2]), **versions}

  def splits(self):
    """Returns {split: pairs of a key and an example}."""
    return python_sources.split(python_sources.files(_installed().values()))


def _installed():
  """{name: distribution} of all packages on Python's path, each once."""
  found = {}
  for distribution in importlib.metadata.distributions():
    found.setdefault(distribution.metadata["Name"], distribution)
  return {name: found[name] for name in sorted(found) if name != OURS}
