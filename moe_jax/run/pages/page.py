"""The page of a run, or of several runs laid over each other."""

import json
from collections.abc import Iterable, Sequence

from moe_jax.run import wording
from moe_jax.run.pages import curves, describe, heat, html, plots, words
from moe_jax.run.pages.html import Html, tag
from moe_jax.run.pages.read import Record, Run
from moe_jax.run.wording import at


def make(runs: Sequence[Run], refresh: int | None = None) -> str:
  """Returns the page as a text.

  Args:
    runs: from `read.run`; with several, each has its own colour.
    refresh: see `html.page`.
  """
  records, several = [run.record for run in runs], len(runs) > 1
  unit = words.loss_unit(str(at(run.config, "task.name")) for run in runs)
  parts = [
    *(_heads(runs) if several else _head(runs[0])),
    *(tag("p", text, kind="warn") for run in runs for text in run.problems),
    *(results(records) if several else ()),
    *figures(records, unit, _maps(runs)),
    *(() if several else results(records)),
    *_pictures(runs),
    *_configs(runs),
  ]
  title = f"{len(runs)} runs" if several else records[0].label
  return html.page(title, parts, refresh)


def _head(run):
  yield tag("h1", run.record.label)
  place = tag("code", run.path)
  yield tag("p", describe.state(run), Html("<br>"), place)
  yield html.facts(describe.latest(run), "tiles")
  yield html.facts(describe.facts(run))


def _heads(runs):
  """A table with a line for each run, and a table of their differences."""
  yield tag("h1", f"{len(runs)} runs")
  chips = _chips(runs)
  rows = [
    [
      chip,
      describe.state(run),
      wording.parameters(run.facts) or "–",
      wording.devices(run.facts) or "–",
      describe.when(run) or "–",
    ]
    for chip, run in zip(chips, runs)
  ]
  head = ("run", "state", "parameters", "devices", "started")
  yield html.table(head, rows)
  yield tag("h2", "Differences between the runs")
  rows = describe.differing(runs)
  if rows:
    yield tag(
      "p", "The values of their configs that are not the same in all runs."
    )
    rows = [[html.key(name), *cells] for name, *cells in rows]
    yield html.table(["key", *chips], rows)
  else:
    yield tag("p", "Their configs are equal.")


def _chips(runs):
  """The names of runs behind their lines."""
  return [
    html.chip(run.record.label, *plots.look(i)) for i, run in enumerate(runs)
  ]


def results(records: Sequence[Record]) -> Iterable[Html]:
  """Yields a table of the last metrics.

  Args:
    records: a single run, with its training metrics; or several, which are
      compared on the validation split.
  """
  yield tag("h2", "Latest metrics")
  columns = [(r.label, r.validation) for r in records]
  if len(records) == 1:
    columns = [("training", records[0].train), ("validation", columns[0][1])]
  columns = [(name, lines) for name, lines in columns if lines or records[1:]]
  if not any(lines for _, lines in columns):
    yield tag("p", "There are no metrics yet.")
    return
  about = "The values of the last training line and the last evaluation, as in"
  if records[1:]:
    about = "The values of the last evaluation of each run, as in"
  yield tag("p", about, Html("<code>metrics.jsonl</code>."))
  head = ["metric"]
  for name, lines in columns:
    step = f"step {lines[-1]['step']:,}" if lines else "none yet"
    head.append(Html(f"{html.escape(name)}<br>{step}"))
  names = plots.metric_names(records)
  rows = [[n, *(_last(lines, n) for _, lines in columns)] for n in names]
  rows = [row for row in rows if {*row[1:]} != {"–"}]
  whole = [row for row in rows if "/" not in row[0]]
  yield html.table(head, whole, numeric=True)
  if rest := [row for row in rows if "/" in row[0]]:
    parts = html.table(head, rest, numeric=True)
    yield html.details("By layer, cause and domain", parts)


def _last(lines, name):
  if not lines or name not in lines[-1]:
    return "–"
  return describe.number(lines[-1][name])


def figures(
  records: Sequence[Record], loss_unit: str = "loss", maps: Iterable[Html] = ()
) -> Iterable[Html]:
  """Yields the curves of all metrics, in groups.

  Args:
    records: of a single run, or of several, each in its colour.
    loss_unit: see `plots.make`.
    maps: the figures after the groups of learning and balance.
  """
  made = plots.make(records, loss_unit)
  looks = [(r.label, *plots.look(i)) for i, r in enumerate(records)]
  before = [g for g in made.groups if g[0] in (words.LEARNING, words.BALANCE)]
  after = made.groups[len(before) :]
  for part in (before, after):
    for group, some in part:
      yield tag("h2", group.heading)
      yield tag("p", html.linked(group.about))
      if len(records) > 1:
        yield html.legend(looks)
      yield tag("div", *map(_figure, some), kind="grid")
    if part is before:
      yield from maps
  yield from (tag("p", note, kind="soft") for note in _notes(made))


def _notes(made):
  """Sentences about all curves."""
  some = (p for _, several in made.groups for p in several)
  if any(len(t.x) > curves.MOST for p in some for t in p.traces):
    yield (
      f"Where a run has more than {curves.MOST} lines, neighbouring ones are averaged,"
      " and a band is from their lowest to their highest value."
    )
  fixed = (f"{k} ({describe.number(v)})" for k, v in made.constant.items())
  if made.constant:
    yield f"Without a figure, as they never change: {', '.join(fixed)}."


def _figure(plot):
  items = [
    (curves.plain(t.label), t.color, t.style, t.dots)
    for t in plot.traces
    if t.label
  ]
  drawing = html.drawing(curves.svg(plot), plot.title)
  about = html.linked(plot.about)
  legend = html.legend(items) if items else ""
  return html.figure(plot.title, drawing, about, legend)


def _maps(runs):
  """The maps of loads of all runs."""
  shown = [(run, heat.maps(run.loads, 1 / len(runs))) for run in runs]
  shown = [(run, maps) for run, maps in shown if maps]
  if not shown:
    return
  end = max(heat.largest(maps) for _, maps in shown)
  yield tag("h2", "Load of every expert")
  about = (
    "Each column is a [step] and each row an expert. The colour is the [load] of the"
    " expert over the mean load of its layer: 1 is balanced, 0 is an expert without a"
    " token, and rows that stay bright or dark are experts that stay too full or too"
    " empty."
  )
  yield tag("p", html.linked(about))
  for run, maps in shown:
    label = run.record.label
    if len(runs) > 1:
      yield tag("h3", label)
    if len(maps) < len(run.loads):
      sentence = f"{len(maps)} of {len(run.loads)} layers, first to last."
      yield tag("p", sentence, kind="soft")
    yield tag("div", *(_map(m, end, label) for m in maps), kind="grid")


def _map(shown, end, label):
  title = f"Layer {curves.plain(shown.layer)}"
  drawing = heat.svg(shown, end, f"{label} {shown.layer}")
  return html.figure(title, html.drawing(drawing, title))


def _pictures(runs):
  """The latest pictures that the task has made."""
  if not any(run.pictures for run in runs):
    return
  yield tag("h2", "Pictures")
  sentence = "The latest pictures that the task has made, as in"
  yield tag("p", sentence, Html("<code>pictures/</code>."))
  for run in runs:
    if run.pictures and len(runs) > 1:
      yield tag("h3", run.record.label)
    for name, some in run.pictures.items():
      titles = {f"{name}, step {step:,}": png for step, png in some}
      shown = (
        html.figure(t, html.picture(png, t)) for t, png in titles.items()
      )
      yield tag("div", *shown, kind="grid")


def _configs(runs):
  """The values that are no defaults, and whole configs to open."""
  if any(run.config for run in runs):
    yield tag("h2", "Config")
  for run in runs:
    if not run.config:
      continue
    if len(runs) > 1:
      yield tag("h3", run.record.label)
    rows = describe.changed(run.config)
    if rows:
      head = ("key", "value", "default")
      rows = [[html.key(name), *cells] for name, *cells in rows]
      summary = f"{len(rows)} values differ from the defaults"
      yield html.details(summary, html.table(head, rows))
    text = json.dumps(run.config, indent=2, sort_keys=True)
    pre = tag("div", tag("pre", text), kind="scroll")
    yield html.details("The whole config.json", pre)
