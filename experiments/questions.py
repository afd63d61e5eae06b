"""Questions by name: folders here with a sweep.py and a plot.py."""

import dataclasses
import importlib
import pathlib
import pkgutil
from collections.abc import Callable, Mapping

import experiments
from experiments import report, sweeps
from moe_jax.core.errors import ConfigError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Question:
  """What a folder says.

  title: the question, the docstring of the folder's __init__.py.
  folder: where it lies, and its committed results.csv and curves.csv.
  scales: {scale: function that returns its Sweep}, `SCALES` of sweep.py.
  plan: what the report shows, `PLAN` of plot.py.
  """

  name: str
  title: str
  folder: pathlib.Path
  scales: Mapping[str, Callable[[], sweeps.Sweep]]
  plan: report.Plan

  def sweep(self, scale: str) -> sweeps.Sweep:
    """What runs at a scale.

    Raises:
      ConfigError: it is not made for that scale.
    """
    if scale not in self.scales:
      raise ConfigError(
        f'{self.name} has no scale "{scale}"; it has: {", ".join(self.scales)}'
      )
    return self.scales[scale]()


def names() -> list[str]:
  """The questions that there are."""
  return sorted(
    m.name for m in pkgutil.iter_modules(experiments.__path__) if m.ispkg
  )


def load(name: str) -> Question:
  """The question of that name.

  Raises:
    ConfigError: there is none.
  """
  if name not in names():
    raise ConfigError(
      f'there is no question "{name}" in experiments'
      + did_you_mean(name, names())
    )
  package = importlib.import_module(f"experiments.{name}")
  return Question(
    name=name,
    title=(package.__doc__ or name).strip(),
    folder=pathlib.Path(package.__file__).parent,
    scales=importlib.import_module(f"experiments.{name}.sweep").SCALES,
    plan=importlib.import_module(f"experiments.{name}.plot").PLAN,
  )
