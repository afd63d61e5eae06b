"""Measures trained models with fewer slots, first come or best first (V-MoE, 3.2).

  python -m experiments.vision.slots runs/vision/cpu/sparse/*/* \\
    runs/vision/cpu/plain_0.5/*/* runs/vision/cpu/priority_0.5/*/*

Batch Prioritized Routing gives the slots of an expert to the tokens of a group with the
highest weights. The others lose what this layer would add to them, so that a model can
do with fewer slots than it was trained with. Every run is measured on the whole
validation split with each number of slots, in both orders.
"""

import argparse
import csv
import pathlib
import statistics
import sys

from experiments import figures, intervals, runs
from moe_jax.core.errors import ConfigError
from moe_jax.run import command

# Slots over assignments; times the 32 assignments of an expert they are whole.
CAPACITIES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0, 1.25)
ORDERS = {"plain": "none", "priority": "score"}
FOLDER = pathlib.Path(__file__).parent / "figures"


def measure(paths) -> list[dict]:
  """A row for every run, order and capacity, with accuracy and dropped.

  Args:
    paths: work directories of runs, .../ARM/DIGEST/SEED.

  Raises:
    ConfigError: a run without experts that have slots.
  """
  rows, tasks, paths = [], {}, [pathlib.Path(path) for path in paths]
  ways = [(order, c) for order in ORDERS for c in CAPACITIES]
  for number, (order, capacity) in enumerate(ways, 1):
    scorers = {}  # Runs that have the same model share a program.
    for path in paths:
      found = _metrics(path, ORDERS[order], capacity, tasks, scorers)
      place = {"arm": path.parts[-3], "seed": int(path.name), "order": order}
      rows.append(place | {"capacity": capacity, **found})
    print(f"{number} of {len(ways)} measured", file=sys.stderr, flush=True)
  return rows


def _metrics(path, priority, capacity, tasks, scorers):
  """Accuracy and dropped of a run."""
  from moe_jax.training import evaluation, program, trained

  texts = [f"model.moe.router.priority={priority!r}"]
  # The factor of training is not used here, and models that differ in it alone
  # are one.
  factors = ("capacity_factor", "eval_capacity_factor")
  texts += [f"model.moe.{factor}={capacity}" for factor in factors]
  texts += ["model.moe.capacity_rounding='ceil'"]
  texts += ["model.moe.capacity_multiple=1"]
  config = trained.config_of(str(path), texts)
  if config.model.moe.dispatcher.name == "sorted":
    raise ConfigError(
      f"{path} is a run whose experts take all their tokens, and this is about slots;"
      " leave it out"
    )
  data = tuple(config[part].to_json() for part in ("task", "data", "eval"))
  if data not in tasks:
    tasks[data] = program.build_task(config)
  task = tasks[data]
  model = program.build_model(config, task)
  if (model, data) not in scorers:
    scorers[model, data] = evaluation.scorer(model, task)
  sums = scorers[model, data](trained.weights(str(path), model)[1])
  values = evaluation.table(sums, task, model)
  return {k: values[k] for k in ("accuracy", "dropped")}


def table(rows: list[dict]) -> str:
  """Accuracy in percent by arm and order, a column for each capacity.

  The last line of an arm has the paired differences of the two orders.
  """
  capacities = sorted({row["capacity"] for row in rows})
  head = ["trained as", "order", *(f"{c:g}" for c in capacities)]
  lines, found = [head, ["---"] * len(head)], _accuracies(rows)
  for arm in dict.fromkeys(arm for arm, _ in found):
    for order in ORDERS:
      values = (found[arm, order][c].values() for c in capacities)
      words = [intervals.words([*own], 1) for own in values]
      lines.append([arm, order, *words])
    plain, priority = (found[arm, order] for order in ORDERS)
    pairs = (intervals.paired(priority[c], plain[c]) for c in capacities)
    words = [intervals.words(pair.values, 1) for pair in pairs]
    lines.append([arm, "priority − plain", *words])
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _accuracies(rows):
  """{(arm, order): {capacity: {seed: percent}}}."""
  found = {}
  for row in rows:
    own = found.setdefault((row["arm"], row["order"]), {})
    seeds = own.setdefault(row["capacity"], {})
    seeds[row["seed"]] = 100 * row["accuracy"]
  return found


def draw(rows: list[dict], folder: pathlib.Path) -> None:
  """Writes slots.png and slots.pdf."""
  figure, (axes,) = figures.panels(1)
  found = _accuracies(rows)
  for (arm, order), style in figures.styles(sorted(found)).items():
    own = found[arm, order]
    means = [statistics.fmean(own[c].values()) for c in own]
    label = f"{arm}: {order}"
    axes.plot([*own], means, label=label, color=style.color, ls=style.line)
  axes.set(
    xlabel="slots over assignments (means over seeds)",
    ylabel="validation accuracy, percent",
  )
  figures.save(figure, axes, folder, "slots")


def read(folder: pathlib.Path = FOLDER) -> list[dict]:
  """The committed rows."""
  words = ("arm", "order")
  with open(folder / "slots.csv", newline="") as f:
    return [
      {k: v if k in words else float(v) for k, v in row.items()}
      for row in csv.DictReader(f)
    ]


def main(argv=None) -> int:
  """The command."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  words = "finished runs; none: draw the rows that are there again"
  parser.add_argument("runs", nargs="*", metavar="DIR", help=words)
  parser.add_argument("--out", default=str(FOLDER), metavar="DIR")
  args = parser.parse_args(argv)
  folder = pathlib.Path(args.out)
  folder.mkdir(parents=True, exist_ok=True)
  if args.runs:
    runs.write_csv(folder / "slots.csv", measure(args.runs))
  rows = read(folder)
  draw(rows, folder)
  print(table(rows))
  return 0


if __name__ == "__main__":
  command.run(main)
