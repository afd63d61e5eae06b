"""Questions by name: a folder each, in experiments/ or wherever you like."""

import argparse
import importlib
import pathlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import experiments
from experiments import columns, report, sweeps
from moe_jax.core.errors import ConfigError, did_you_mean


class Question(NamedTuple):
  """The contents of a question's folder.

  title: the question, the docstring of the folder's __init__.py.
  folder: where it lies, with its committed results.csv and curves.csv.
  scales: {scale: function that returns its Sweep}, `SCALES` of sweep.py.
  report: what the report shows, `REPORT` of plot.py.
  """

  name: str
  title: str
  folder: pathlib.Path
  scales: Mapping[str, Callable[[], sweeps.Sweep]]
  report: report.Report


def names() -> list[str]:
  """The names of all questions that are known."""
  modules = pkgutil.iter_modules(experiments.__path__)
  return sorted(m.name for m in modules if m.ispkg)


def titles() -> list[str]:
  """A line for each question that is known: its name and what it asks."""
  return [f"{name:24}{load(name).title}" for name in names()]


def add_folder(folder: str) -> None:
  """Makes the questions of a folder known, beside those of experiments/.

  They are imported as experiments.NAME, wherever they lie.

  Raises:
    ConfigError: it holds no question, or a name in it is taken.
  """
  path = str(pathlib.Path(folder).resolve())
  if path in experiments.__path__:
    return
  taken = {m.name for m in pkgutil.iter_modules(experiments.__path__)}
  names = {m.name for m in pkgutil.iter_modules([path]) if m.ispkg}
  if not names:
    raise ConfigError(
      f"--questions={folder} holds no question; a question is a folder with an"
      " __init__.py and a sweep.py"
    )
  for name in taken & names:
    raise ConfigError(
      f'the question "{name}" in {folder} has the name of a module in'
      " experiments; rename its folder"
    )
  experiments.__path__.append(path)


def add_arguments(
  parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> None:
  """Adds the arguments that name a question, its scale and its arms."""
  first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  first.add_argument("--questions")
  folder = first.parse_known_args(argv)[0].questions
  if folder:
    add_folder(folder)  # Now, so that the help can list them.
  add = parser.add_argument
  add("question", metavar="QUESTION", nargs="?", help=", ".join(names()))
  add("--questions", metavar="DIR", help="look for questions in DIR too")
  add("--scale", metavar="NAME", help="demo: minutes; others as --list says")
  add("--arm", action="append", metavar="NAME", help="only this; repeatable")


def load(name: str | None) -> Question:
  """The question of that name.

  Raises:
    ConfigError: there is none, or a file of it defines too little.
  """
  if name not in names():
    known = did_you_mean(name or "", names())
    if not name:
      raise ConfigError(f"give a QUESTION{known}")
    raise ConfigError(
      f'there is no question "{name}"{known}{"." * (known[-1:] != "?")} For one'
      " of your own, give --questions=FOLDER, the folder that contains it"
    )
  package = importlib.import_module(f"experiments.{name}")
  folder, title = pathlib.Path(package.__file__).parent, package.__doc__ or name
  scales = _read(folder, "sweep", "SCALES", None)
  shown = _read(folder, "plot", "REPORT", columns.REPORT)
  return Question(name, title.strip(), folder, scales, shown)


def _read(folder, module, name, default):
  """A name that a question's file defines; the default if there is no file."""
  path, loaded = folder / f"{module}.py", None
  if path.exists():
    loaded = importlib.import_module(f"experiments.{folder.name}.{module}")
    default = None
  value = getattr(loaded, name, default)
  if value is None:
    raise ConfigError(f"{path} has to define {name}; see docs/experiments.md")
  return value
