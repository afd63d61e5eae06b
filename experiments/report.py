"""Writes rows as table.md, table.tex, results.csv, figures and report.html."""

import pathlib
import shutil
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from experiments import intervals, page, runs


class Column(NamedTuple):
  """A column of the table.

  metric: column of results.csv.
  title: its head; None: the metric.
  digits: after the point.
  meaning: one sentence for under the table.
  over: show metric / over, run by run; None: metric.
  factor: of a unit, such as 1e-12.
  best: min or max, whichever is better; the best is bold in LaTeX where it
    differs significantly from every other one.
  optional: the report does not mention that no run has the metric.
  """

  metric: str
  title: str | None = None
  digits: int = 3
  meaning: str | None = None
  over: str | None = None
  factor: float = 1.0
  best: Callable | None = None
  optional: bool = False

  @property
  def head(self) -> str:
    return self.title or self.metric

  def values(self, rows: Sequence[dict]) -> dict[str, dict[int, float]]:
    """{arm: {seed: value}} of all arms, in the order of the rows."""
    values, over = {r["arm"]: {} for r in rows}, self.over
    for r in rows:
      if {self.metric, over or self.metric} <= r.keys():
        value = self.factor * r[self.metric] / (r[over] if over else 1)
        values[r["arm"]][r["seed"]] = value
    return values


class Claim(NamedTuple):
  """Is `metric` of `arm` different from that of `baseline`? Paired by seed.

  alike: a metric that was meant to be equal in both arms, up to `ALIKE`; None:
    there is no such metric.
  """

  metric: str
  arm: str
  baseline: str
  alike: str | None = None


ALIKE = 0.2


class Report(NamedTuple):
  """The contents of a question's report.

  columns: of the table.
  claims: differences between arms; shown where both arms are.
  plots: drawn from the rows and from the curves, see `figures`.
  derive: (rows, curves) -> the rows with metrics that take several runs, such as
    an arm relative to another; None: there are none. A row that it makes of several
    runs has their number as "runs".
  needs: metrics of the curves that `derive` reads.
  findings: each rows -> lines of text, for under the claims.
  """

  columns: Sequence[Column]
  claims: Sequence[Claim] = ()
  plots: Sequence = ()
  derive: Callable[[list[dict], list[dict]], list[dict]] | None = None
  needs: Sequence[str] = ()
  findings: Sequence[Callable[[list[dict]], list[str]]] = ()

  def column(self, metric: str) -> Column:
    """The column that shows a metric in the table."""
    same = (c for c in self.columns if c.metric == metric and not c.over)
    return next(same, Column(metric))


def write(
  folder: pathlib.Path,
  title: str,
  report: Report,
  rows: list[dict],
  curves: list[dict],
  notes: Sequence[str] = (),
  loss_unit: str = "loss",
) -> str:
  """Writes a report; everything in it is read back from its two csv files, but for
  the curves of report.html, which has those of all metrics.

  Args:
    folder: to write to.
    title: of the table.
    report: what to show.
    rows: a dict for each finished run: `runs.KEYS`, then metrics.
    curves: the same with a `step`, a dict for each step of each run.
    notes: lines for the end of the table's text.
    loss_unit: of the loss in report.html.

  Returns the text of table.md.
  """
  folder.mkdir(parents=True, exist_ok=True)
  whole = curves
  runs.write_csv(folder / "results.csv", rows)
  runs.write_csv(folder / "curves.csv", _thin(curves, report))
  rows, curves = (
    runs.read_csv(folder / name) for name in ("results.csv", "curves.csv")
  )
  if report.derive is not None:
    rows = report.derive(rows, curves)
  report, missing = _without_missing(report, rows)
  table, about = _table(report.columns, rows), _about(rows)
  bold = {(_best(c, rows), c.head) for c in report.columns}
  (folder / "table.tex").write_text(_latex(table, f"{title} {about}", bold))
  for plot in report.plots:
    plot.draw(rows, curves, folder)
  blocks = [
    [f"# {title}"],
    _markdown(table),
    [about, *_remarks(report, rows, missing)],
    *_claims(report, rows),
    *(finding(rows) for finding in report.findings),
    notes,
  ]
  text = "\n\n".join("\n".join(block) for block in blocks if block)
  (folder / "table.md").write_text(text + "\n")
  page.write(folder, title, table, blocks[2:], whole, loss_unit)
  return text


def _without_missing(report, rows):
  """(the report of metrics that rows have, columns that are left out)."""
  missing = [c for c in report.columns if not any(c.metric in r for r in rows)]
  metrics = {c.metric for c in missing}
  columns = [c for c in report.columns if c.metric not in metrics]
  claims = [c for c in report.claims if c.metric not in metrics]
  return report._replace(columns=columns, claims=claims), missing


def _claims(report, rows):
  """Two blocks of lines: the claims, and what was meant to be alike in them."""
  arms = {r["arm"] for r in rows}
  there = [c for c in report.claims if {c.arm, c.baseline} <= arms]
  yield [f"- {claim(c, report, rows)}" for c in there]
  yield [f"- {match(c, report, rows)}" for c in there if c.alike]


def claim(claim: Claim, report: Report, rows: list[dict]) -> str:
  """The difference between two arms, and whether it is significant."""
  column, (_, arm, baseline, alike) = report.column(claim.metric), claim
  values = column.values(rows)
  interval = intervals.paired(values.get(arm, {}), values.get(baseline, {}))
  what = f"{column.head}, {arm} minus {baseline}"
  if interval is None:
    return f"{what}: no seed has both."
  what += f": {interval.mean:+.{column.digits}f}"
  if interval.half is None:
    return f"{what} (1 pair): a single pair of seeds gives no interval."
  what += f" ± {interval.half:.{column.digits}f} ({len(interval.values)} pairs)"
  if not interval.decides:
    return f"{what}: no significant difference (95 % interval includes 0)."
  what += f": {arm} is {'lower' if interval.mean < 0 else 'higher'}."
  if alike and not _is_alike(_ratio(claim, report, rows)):
    what += f" Note that their {report.column(alike).head} is not alike."
  return what


def match(claim: Claim, report: Report, rows: list[dict]) -> str:
  """Says whether two arms are alike in the metric that they should share."""
  ratio, head = _ratio(claim, report, rows), report.column(claim.alike).head
  what = f"{head}, {claim.arm} over {claim.baseline}"
  if ratio is None:
    return f"{what}: not both have it."
  word = "within" if _is_alike(ratio) else "not within"
  return f"{what}: {ratio:.2f}, {word} {100 * ALIKE:.0f} %."


def _ratio(claim, report, rows):
  """The ratio of the two arms' means; None if there is none."""
  values = report.column(claim.alike).values(rows)
  pair = [values.get(arm) for arm in (claim.arm, claim.baseline)]
  if not all(pair):
    return None
  mean, baseline = (statistics.fmean(v.values()) for v in pair)
  return mean / baseline if baseline else None


def _is_alike(ratio):
  return ratio is not None and 1 / (1 + ALIKE) <= ratio <= 1 + ALIKE


def _table(columns, rows):
  """Lines of cells, the head first."""
  cells = {r["arm"]: [r["arm"]] for r in rows}
  for column in columns:
    for arm, values in column.values(rows).items():
      words = (
        intervals.words([*values.values()], column.digits) if values else "–"
      )
      cells[arm].append(words)
  return [["arm", *(c.head for c in columns)], *cells.values()]


def _best(column, rows):
  """The arm with the best value, if all paired intervals say so; else None."""
  values = column.values(rows)
  means = {a: intervals.of([*v.values()]).mean for a, v in values.items() if v}
  if column.best is None or len(means) < 2:
    return None
  best = column.best(means, key=means.get)
  pairs = (
    intervals.paired(values[best], values[a]) for a in means if a != best
  )
  return best if all(pair and pair.decides for pair in pairs) else None


def _about(rows):
  """The runs that a table is made of, and how it shows their spread."""
  seeds_of = runs.grouped([(r["arm"], r["seed"]) for r in rows])
  arms = runs.grouped([(tuple(sorted(s)), arm) for arm, s in seeds_of.items()])
  words = [
    f"seeds {', '.join(map(str, seeds))}"
    + f" of {', '.join(alike)}" * (len(arms) > 1)
    for seeds, alike in sorted(arms.items(), key=lambda x: -len(x[1]))
  ]
  scales = ", ".join(dict.fromkeys(r["scale"] for r in rows))
  number = sum(r.get("runs", 1) for r in rows)
  about = f"Scale {scales}, {number} runs, {'; '.join(words)}."
  if any(len(seeds) > intervals.FEW for seeds in arms):
    about += " Mean ± half the 95 % t-interval over seeds."
  if any(1 < len(seeds) <= intervals.FEW for seeds in arms):
    about += " With two or three seeds: mean [lowest, highest]."
  return about


def _remarks(report, rows, missing):
  """Remarks about the rows, and the meanings of the columns."""
  lines = ["Differences are paired by seed."] if report.claims else []
  lost = [f"{r['arm']} seed {r['seed']}" for r in rows if runs.DIVERGED in r]
  if lost:
    lines.append(f"Diverged, so not in the numbers: {', '.join(lost)}.")
  for origin in runs.ORIGIN:
    several = sorted({r[origin] for r in rows if r.get(origin)})
    if len(several) > 1:
      lines.append(
        f"These rows are of more than one {origin}: {', '.join(several)}."
        " Differences may come from the code, not from the arm."
      )
  lines += [
    f"{c.head} (`{c.metric}`): {c.meaning}" for c in report.columns if c.meaning
  ]
  lines += [
    f"Left out, as no run here has it: `{c.metric}`."
    for c in missing
    if not c.optional
  ]
  return [f"- {line}" for line in lines]


def _markdown(table):
  widths = [max(map(len, column)) for column in zip(*table)]
  head, *lines = (
    "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |"
    for line in table
  )
  return [head, "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines]


_ESCAPES = str.maketrans(
  {c: f"\\{c}" for c in "&%$#_{}"}
  | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
  | {"^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "÷": r"$\div$"}
  | {"–": "--", "±": r"$\pm$"}
)


def _latex(table, caption, bold):
  """The table for the package booktabs, below a caption to copy.

  Args:
    table: from `_table`.
    caption: plain text.
    bold: (arm, head) of the cells that are bold.
  """
  lines = []
  for cells in table:
    texts = (cell.translate(_ESCAPES) for cell in cells)
    texts = (
      rf"\textbf{{{text}}}" if (cells[0], head) in bold else text
      for head, text in zip(table[0], texts)
    )
    lines.append(" & ".join(texts) + r" \\")
  return "\n".join(
    [
      r"% Needs \usepackage{booktabs}. Caption:",
      f"% {caption.translate(_ESCAPES)}",
      r"\begin{tabular}{l" + "r" * (len(table[0]) - 1) + "}",
      *(r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"),
      "\\end{tabular}\n",
    ]
  )


def _thin(curves, report):
  """The points of curves that the figures need."""
  place = {*runs.KEYS, "step"}
  drawn = (getattr(plot, "needs", ()) for plot in report.plots)
  wanted = set(report.needs).union(*drawn)
  thin = [{k: v for k, v in p.items() if k in place | wanted} for p in curves]
  return [point for point in thin if point.keys() - place]


def publish(made: pathlib.Path, beside: pathlib.Path, scale: str) -> None:
  """Puts a report's rows, curves, table and figures beside its question.

  What lies there of other scales stays.
  """
  for path in sorted(made.glob("*.csv")):
    runs.replace_scale(beside / path.name, scale, runs.read_csv(path))
  (beside / "figures").mkdir(exist_ok=True)
  for path in [*made.glob("*.png"), *made.glob("*.pdf")]:
    shutil.copyfile(path, beside / "figures" / f"{scale}_{path.name}")
  shutil.copyfile(made / "table.md", beside / "figures" / f"{scale}.md")


def compare(rows: Sequence[dict], published: dict) -> tuple[list[str], bool]:
  """Compares new rows with the published ones, except for their timings.

  Args:
    rows: new ones.
    published: rows by `runs.identity`.

  Returns:
    A line for each row, and whether all are equal.
  """
  others = {
    "train/tokens_per_second",
    "train_seconds",
    *runs.ORIGIN,
    *runs.KEYS,
  }
  lines, same = [], True
  for row in rows:
    name = f"{row['arm']} seed {row['seed']}"
    old = published.get(runs.identity(row))
    if old is None:
      lines.append(f"{name}: no row is committed")
      continue
    count = len(old.keys() - others)
    differ = [k for k in old if k not in others and old[k] != row.get(k)]
    same &= not differ
    lines.append(
      f"{name}: {count - len(differ)} of {count} committed numbers are the same"
      " to the last bit" + f"; not {', '.join(differ[:5])}" * bool(differ)
    )
  return lines, same
