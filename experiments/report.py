"""From rows to table.md, table.tex, results.csv and figures."""

import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from experiments import figures, intervals, runs
from moe_jax.core.errors import did_you_mean


class Column(NamedTuple):
  """A column of the table.

  metric: column of results.csv.
  title: its head; None: the metric.
  digits: after the point.
  meaning: one sentence for under the table.
  over: show metric / over, run by run; None: metric.
  factor: of a unit, such as 1e-12.
  """

  metric: str
  title: str | None = None
  digits: int = 3
  meaning: str | None = None
  over: str | None = None
  factor: float = 1.0

  @property
  def head(self) -> str:
    return self.title or self.metric


class Claim(NamedTuple):
  """Is `metric` of `arm` different from that of `than`? Paired by seed."""

  metric: str
  arm: str
  than: str


class Match(NamedTuple):
  """Have two arms the same `metric`, up to a share of it?

  The arms were meant to be alike in it, so that a claim about another metric
  is not about this one.
  """

  metric: str
  arm: str
  than: str
  within: float = 0.2


class Derivation(NamedTuple):
  """Metrics of a run that take other runs, such as an arm relative to another.

  derive: (rows, curves) -> the rows with these metrics.
  needs: what it reads of the curves.
  gives: names of the metrics.
  """

  derive: Callable[[list[dict], list[dict]], list[dict]]
  needs: Sequence[str]
  gives: Sequence[str]


class Plan(NamedTuple):
  """What a question's report shows.

  columns: of the table.
  claims: differences between arms; shown, like matches, where both arms are.
  matches: what arms have in common.
  plots: drawn from the rows and from the curves.
  derivation: of more metrics; None: there are none.
  findings: each rows -> lines of text, for under the claims.
  """

  columns: Sequence[Column]
  claims: Sequence[Claim] = ()
  matches: Sequence[Match] = ()
  plots: Sequence[figures.Plot] = ()
  derivation: Derivation | None = None
  findings: Sequence[Callable[[list[dict]], list[str]]] = ()


def unknown(plan: Plan, rows: Sequence[dict]) -> list[str]:
  """Metrics that the table or a claim is of and no row has, each with a hint."""
  known = {k for row in rows for k in row}
  if plan.derivation is not None:
    known |= set(plan.derivation.gives)
  wanted = [c.metric for c in (*plan.columns, *plan.claims, *plan.matches)]
  return [
    f'"{metric}"{did_you_mean(metric, known)}'
    for metric in dict.fromkeys(wanted)
    if metric not in known
  ]


def write(
  folder: pathlib.Path,
  title: str,
  plan: Plan,
  rows: list[dict],
  curves: list[dict],
  notes: Sequence[str] = (),
) -> str:
  """Writes a report; everything in it is read back from its two csv files.

  Args:
    folder: to write to.
    title: of the table.
    plan: what to show.
    rows: a dict for each finished run: `runs.KEYS`, then metrics.
    curves: the same with a `step`, a dict for each step of each run.
    notes: lines for the end of the table's text.

  Returns:
    table.md, the text.
  """
  folder.mkdir(parents=True, exist_ok=True)
  runs.write_csv(folder / "results.csv", rows)
  runs.write_csv(folder / "curves.csv", _thin(curves, plan))
  rows = runs.read_csv(folder / "results.csv")
  curves = runs.read_csv(folder / "curves.csv")
  if plan.derivation is not None:
    rows = plan.derivation.derive(rows, curves)
  table = _table(plan.columns, rows)
  text = "\n\n".join(
    block
    for block in (
      f"# {title}",
      _markdown(table),
      _about(plan.columns, rows),
      *(
        "\n".join(
          f"- {say(one, plan, rows)}"
          for one in several
          if {one.arm, one.than} <= set(_arms(rows))
        )
        for say, several in ((claim, plan.claims), (match, plan.matches))
      ),
      *("\n".join(finding(rows)) for finding in plan.findings),
      "\n".join(notes),
    )
    if block
  )
  (folder / "table.md").write_text(text + "\n")
  (folder / "table.tex").write_text(_latex(table))
  for plot in plan.plots:
    plot.draw(rows, curves, folder)
  return text


def claim(claim: Claim, plan: Plan, rows: list[dict]) -> str:
  """The difference between two arms, and in words whether it decides."""
  column = _column(claim.metric, plan)
  arm, than = claim.arm, claim.than
  found = intervals.paired(
    _by_seed(rows, arm, column), _by_seed(rows, than, column)
  )
  what = f"{column.head}, {arm} minus {than}"
  if found is None:
    return f"{what}: no seed has both."
  number = f"{what}: {_signed(found, column.digits)}"
  doubt = "".join(
    f" Their {m.metric} is not alike, though."
    for m in plan.matches
    if {m.arm, m.than} == {arm, than} and not _is_alike(m, plan, rows)
  )
  seeds = f"{found.count} pair{'s' * (found.count > 1)}"
  if found.half is None:
    return f"{number} ({seeds}): one seed decides nothing."
  if found.decides:
    word = "lower" if found.mean < 0 else "higher"
    return f"{number} ({seeds}): {arm} is {word}.{doubt}"
  return f"{number} ({seeds}): not decided, zero is in the interval."


def match(match: Match, plan: Plan, rows: list[dict]) -> str:
  """The ratio of two arms' means, and whether it is within what was wanted."""
  column, ratio = _column(match.metric, plan), _ratio(match, plan, rows)
  what = f"{column.head}, {match.arm} over {match.than}"
  if ratio is None:
    return f"{what}: not both have it."
  word = "within" if _is_alike(match, plan, rows) else "not within"
  return f"{what}: {ratio:.2f}, {word} {100 * match.within:.0f} %."


def _is_alike(match, plan, rows):
  ratio, most = _ratio(match, plan, rows), 1 + match.within
  return ratio is not None and 1 / most <= ratio <= most


def _ratio(match, plan, rows):
  """Of the two arms' means; None if there is none."""
  column = _column(match.metric, plan)
  values = [
    list(_by_seed(rows, arm, column).values())
    for arm in (match.arm, match.than)
  ]
  if not all(values):
    return None
  one, other = (intervals.of(v).mean for v in values)
  return one / other if other else None


def _column(metric, plan):
  """How the table shows a metric."""
  same = (c for c in plan.columns if c.metric == metric and not c.over)
  return next(same, Column(metric))


def _by_seed(rows, arm, column):
  """{seed: value} of an arm."""
  metric, over = column.metric, column.over
  needed = {metric} if over is None else {metric, over}
  return {
    r["seed"]: column.factor * r[metric] / (r[over] if over else 1)
    for r in rows
    if r["arm"] == arm and needed <= r.keys()
  }


def _arms(rows):
  return list(dict.fromkeys(r["arm"] for r in rows))


def _table(columns, rows):
  """Lines of cells, the head first."""
  lines = [["arm", *(c.head for c in columns)]]
  for arm in _arms(rows):
    cells = [_cell(_by_seed(rows, arm, c), c.digits) for c in columns]
    lines.append([arm, *cells])
  return lines


def _cell(by_seed, digits):
  if not by_seed:
    return "–"
  mean, half, _ = intervals.of(list(by_seed.values()))
  if half is None or len(set(by_seed.values())) == 1:
    return f"{mean:.{digits}f}"
  return f"{mean:.{digits}f} ± {half:.{digits}f}"


def _signed(interval, digits):
  number = f"{interval.mean:+.{digits}f}"
  if interval.half is None:
    return number
  return f"{number} ± {interval.half:.{digits}f}"


def _about(columns, rows):
  """What the numbers are."""
  scales = ", ".join(dict.fromkeys(r["scale"] for r in rows))
  lines = [
    f"Scale {scales}, {len(rows)} runs, {_seeds(rows)}. Mean ± half the 95 %"
    " t-interval over seeds; differences are paired by seed."
  ]
  lost = [f"{r['arm']} seed {r['seed']}" for r in rows if runs.diverged(r)]
  if lost:
    lines.append(f"Diverged, so not in the numbers: {', '.join(lost)}.")
  for what in runs.ORIGIN:
    found = sorted({r[what] for r in rows if r.get(what)})
    if len(found) > 1:
      lines.append(
        f"These rows are of more than one {what}: {', '.join(found)}. What they"
        " differ in may not be the arm."
      )
  lines += [f"`{c.head}`: {c.meaning}" for c in columns if c.meaning]
  return "\n\n".join(lines[:1]) + "".join(f"\n- {x}" for x in lines[1:])


def _seeds(rows):
  """The seeds, and of which arms where not all have the same."""
  alike = {}  # Arms by their seeds.
  for arm in _arms(rows):
    seeds = tuple(sorted(r["seed"] for r in rows if r["arm"] == arm))
    alike.setdefault(seeds, []).append(arm)
  words = {
    f"seeds {', '.join(map(str, seeds))}": arms
    for seeds, arms in sorted(alike.items(), key=lambda x: -len(x[1]))
  }
  if len(words) == 1:
    return next(iter(words))
  return "; ".join(f"{w} of {', '.join(arms)}" for w, arms in words.items())


def _markdown(table):
  widths = [max(map(len, column)) for column in zip(*table)]
  lines = [
    "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |"
    for line in table
  ]
  rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
  return "\n".join([lines[0], rule, *lines[1:]])


def _latex(table):
  head, *lines = (
    " & ".join(_latex_cell(cell) for cell in line) + r" \\" for line in table
  )
  return "\n".join(
    [
      r"\begin{tabular}{l" + "r" * (len(table[0]) - 1) + "}",
      r"\hline",
      head,
      r"\hline",
      *lines,
      r"\hline",
      r"\end{tabular}",
      "",
    ]
  )


def _latex_cell(cell):
  for plain, escaped in (
    ("_", r"\_"),
    ("%", r"\%"),
    ("&", r"\&"),
    ("–", "--"),
    ("±", r"$\pm$"),
  ):
    cell = cell.replace(plain, escaped)
  return cell


def _thin(curves, plan):
  """Only what the figures need."""
  place = {*runs.KEYS, "step"}
  wanted = set().union(*(plot.needs() for plot in plan.plots))
  if plan.derivation is not None:
    wanted |= set(plan.derivation.needs)
  thin = [{k: v for k, v in p.items() if k in place | wanted} for p in curves]
  return [point for point in thin if point.keys() - place]
