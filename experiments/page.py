"""Writes report.html, the page of an experiment."""

import pathlib
import statistics
from collections.abc import Iterable, Sequence

from experiments import runs
from moe_jax.core import files


def write(
  folder: pathlib.Path,
  title: str,
  table: Sequence[Sequence[str]],
  blocks: Iterable[Iterable[str]],
  curves: Iterable[dict],
  loss_unit: str = "loss",
) -> None:
  """Writes report.html: the table, the figures, and the curves of every arm.

  Args:
    folder: of the report, with its figures.
    title: of the page.
    table: lines of cells, the head first.
    blocks: lines of text for under the table.
    curves: as in `report.write`.
    loss_unit: of the loss of the arms' task.
  """
  # Slow to import, and --help does without.
  from moe_jax.run.pages import html, page

  head, *rows = table
  figures = (
    html.figure(
      figure_title(path.stem), html.picture(path.read_bytes(), path.stem)
    )
    for path in sorted(folder.glob("*.png"))
    if path.with_suffix(".pdf").exists()  # `figures.save` writes both.
  )
  arms = runs.grouped((point["arm"], point) for point in curves)
  parts = [
    html.tag("h1", title),
    html.table(head, rows, numeric=True),
    *(html.bullets(line.removeprefix("- ") for line in b) for b in blocks),
    html.tag("h2", "Figures"),
    html.tag("div", *figures, kind="grid"),
    *page.figures([_record(*arm) for arm in arms.items()], loss_unit),
  ]
  files.write_text(folder / "report.html", html.page(title, parts))


def figure_title(stem: str) -> str:
  """Returns the title of a figure, by the name of its file without a suffix.

  Args:
    stem: of a metric, or of one metric over another.
  """
  titles = [_metric_title(name) for name in stem.split("_over_")]
  return " over ".join([titles[0], *map(_inside, titles[1:])])


def _inside(title):
  """A title inside a sentence; a name such as MaxVio keeps its letters."""
  is_word = title.split()[0][1:].islower()
  return title[0].lower() + title[1:] if is_word else title


def _metric_title(name):
  """The title of a metric, whose name has "_" for "/" here."""
  from moe_jax.run.pages import words

  known = words.metric(name)
  if known.title != name:
    return known.title
  for prefix, split in (("train_", "training"), ("validation_", "validation")):
    if name.startswith(prefix):
      return f"{_metric_title(name.removeprefix(prefix))}, {split}"
  plain = name.replace("_", " ")
  return plain[0].upper() + plain[1:]


def _record(arm, points):
  """The curves of an arm for a page, each the mean over its seeds."""
  from moe_jax.run.pages import read

  splits = {"train": {}, "validation": {}}
  for point in points:
    for name in point.keys() - {*runs.KEYS, "step"}:
      metric = name.removeprefix("validation/")
      lines = splits["train" if metric == name else "validation"]
      line = lines.setdefault(point["step"], {})
      line.setdefault(metric, []).append(point[name])
  means = (
    [
      {"step": step} | {k: statistics.fmean(line[k]) for k in sorted(line)}
      for step, line in sorted(lines.items())
    ]
    for lines in splits.values()
  )
  return read.Record(arm, *means)
