"""Measures how even the loads of trained models are over growing batches.

  python -m experiments.balancers.batches runs/balancers/cpu

Wang et al. (2408.15664, Figure 5) count the loads of a trained model over computation
batches of more and more tokens: a batch of a few sequences has uneven loads under every
balancer, since the tokens of a sequence resemble each other, and in a large one the
router's own preference remains. Here the validation windows of all domains are shuffled and
cut into batches of 1, 2, 4, ... sequences, and MaxVio is the mean over batches and
layers. Without runs the committed rows are read, and table and figure made again.
"""

import argparse
import pathlib

import jax
import numpy as np

from experiments import figures, intervals, runs
from experiments.balancers import sweep
from moe_jax import models
from moe_jax.core.errors import ConfigError
from moe_jax.run import command
from moe_jax.training import balancing, metrics, trained

FOLDER = pathlib.Path(__file__).parent / "figures"
MOST = 16  # Batches of each domain.


def loads(loaded, corpus) -> np.ndarray:
  """The loads of each validation window: [windows, layers, E].

  Args:
    loaded: `trained.Trained`, of a run.
    corpus: from `mixed.prepare`.
  """
  from moe_jax.data import batches

  c, sublayers = loaded.config, models.sublayers(loaded.model)

  @jax.jit
  def counted(variables, inputs, mask):
    _, aux = loaded.model.apply(
      variables, inputs, mask, jax.random.key(0), train=False
    )
    found = balancing.statistics(aux, sublayers)
    rows = len(inputs)
    return [
      stats.count_E.reshape(-1, rows, stats.count_E.shape[-1])
      for stats in found.values()
    ]

  split = batches.validation_batches(
    corpus,
    seq_len=c.data.seq_len,
    batch_size=c.eval.batch_size,
    batches_per_domain=MOST,
    separate_documents=c.data.separate_documents,
    begin=loaded.tokenizer.begin,
  )
  variables = {"balance": {}, **loaded.variables}
  found = [
    np.concatenate(counted(variables, batch["inputs"], batch["mask"]))
    for _, batch in split
    if batch["mask"].any(1).all()
  ]
  if not found:
    raise ConfigError(
      f"the validation text of {corpus.name} does not fill a batch of"
      f" {c.eval.batch_size} rows; use more data"
    )
  return np.concatenate(found, axis=1).swapaxes(0, 1)


def by_size(loads_NRE, length: int, top_k: int) -> list[dict]:
  """[{tokens, max_vio, floor}] for batches of 1, 2, 4, ... windows.

  Args:
    loads_NRE: from `loads`.
    length: tokens of a window.
    top_k: K.
  """
  loads_NRE = np.random.default_rng(0).permutation(np.float64(loads_NRE))
  rows, size = [], 1
  while size <= len(loads_NRE):
    batches = len(loads_NRE) // size
    whole = loads_NRE[: batches * size]
    load_BRE = whole.reshape(batches, size, *whole.shape[1:]).sum(1)
    vio_BR = load_BRE.max(-1) / load_BRE.mean(-1) - 1
    tokens = size * length
    floor = metrics.max_vio_floor(tokens, load_BRE.shape[-1], top_k)
    rows.append({"tokens": tokens, "max_vio": vio_BR.mean(), "floor": floor})
    size *= 2
  return rows


def measure(folder: pathlib.Path) -> list[dict]:
  """The rows of all finished runs of the headline's arms in a work directory."""
  from moe_jax.data.text import mixed

  rows, corpus = [], None
  for arm in sweep.HEADLINE:
    for path in sorted(folder.glob(f"{arm}/*/*/row.json")):
      run = path.parent
      loaded = trained.of_run(str(run), dropless=False)
      c = loaded.config
      # The runs of a work directory have the same text.
      corpus = corpus or mixed.prepare(c.data, plugins=c.plugins)
      found = by_size(loads(loaded, corpus), c.data.seq_len, c.model.moe.top_k)
      rows += [{"arm": arm, "seed": int(run.name), **row} for row in found]
      print(f"{arm}, seed {run.name}", flush=True)
  if not rows:
    raise ConfigError(
      f"there is no finished run of {', '.join(sweep.HEADLINE)} in {folder}; give"
      " the work directory of balancers"
    )
  return rows


def table(rows: list[dict]) -> str:
  """MaxVio by arm and tokens of a batch, with that of random choices below."""
  tokens = sorted({row["tokens"] for row in rows})[::2]
  lines = [f"| tokens of a batch | {' | '.join(f'{n:,}' for n in tokens)} |"]
  lines.append("|---" * (len(tokens) + 1) + "|")
  for arm in dict.fromkeys(row["arm"] for row in rows):
    words = []
    for n in tokens:
      own = [r for r in rows if (r["arm"], r["tokens"]) == (arm, n)]
      words.append(intervals.words([r["max_vio"] for r in own], 2))
    lines.append(f"| `{arm}` | {' | '.join(words)} |")
  floors = {row["tokens"]: f"{row['floor']:.2f}" for row in rows}
  lines.append(f"| random | {' | '.join(floors[n] for n in tokens)} |")
  return "\n".join(lines)


def draw(rows: list[dict], folder: pathlib.Path) -> None:
  """Writes batches.png and batches.pdf."""
  figure, (axes,) = figures.panels(1)
  points = [{**row, "step": row["tokens"]} for row in rows]
  for arm, style in figures.styles(row["arm"] for row in rows).items():
    tokens, mean, low, high = figures.band(points, arm, "max_vio")
    axes.plot(tokens, mean, label=arm, color=style.color, ls=style.line)
    axes.fill_between(tokens, low, high, color=style.color, alpha=0.2, lw=0)
  floors = {row["tokens"]: row["floor"] for row in rows}
  options = {"color": "grey", "lw": 3, "alpha": 0.5, "label": "random router"}
  axes.plot(*zip(*sorted(floors.items())), **options)
  axes.set(
    **{"xscale": "log", "yscale": "log", "ylabel": "MaxVio of a batch"},
    xlabel="tokens of a batch (band: lowest to highest seed)",
  )
  figures.save(figure, axes, folder, "batches")


def read(folder: pathlib.Path = FOLDER) -> list[dict]:
  """The committed rows."""
  rows = runs.read_csv(folder / "batches.csv")
  return [row | {"tokens": int(row["tokens"])} for row in rows]


def main(argv=None) -> int:
  """The command."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("runs", nargs="?", metavar="DIR", help="work directory")
  parser.add_argument("--out", default=str(FOLDER), metavar="DIR")
  args = parser.parse_args(argv)
  folder = pathlib.Path(args.out)
  folder.mkdir(parents=True, exist_ok=True)
  if args.runs:
    runs.write_csv(folder / "batches.csv", measure(pathlib.Path(args.runs)))
  rows = read(folder)
  draw(rows, folder)
  print(table(rows))
  return 0


if __name__ == "__main__":
  command.run(main)
