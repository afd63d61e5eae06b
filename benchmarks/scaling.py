"""How time and memory of a dropless layer grow, one axis at a time.

  python -m benchmarks.scaling --json=scaling.json --figure=scaling

Along each curve the layer is timed in turn with the dense layer of the same
active FLOPs (the faster of two, see benchmarks.moe_layer). Exponents are
slopes of log seconds over the log of what grows. Two more tables: loads that
follow Zipf's law beside equal ones, and the memory of forward and backward as
XLA plans it, without parameters and tokens.
"""

import dataclasses
import functools
import json
import math
import pathlib
import statistics
import sys
from typing import NamedTuple

import numpy as np

from benchmarks import shapes, timing
from moe_jax import config as config_lib
from moe_jax.errors import ConfigError, did_you_mean


class Curve(NamedTuple):
  """What grows, as a reader would call it, and the shape at each value."""

  label: str
  shapes: dict[int, shapes.Shape]


CURVES = {
  "T": Curve(
    "tokens",
    {t: shapes.Shape(512, 1024, 16, 2, t) for t in (1024, 2048, 4096, 8192)},
  ),
  "rows": Curve(
    "rows per expert",
    {
      rows: shapes.Shape(512, 1024, 8, 1, 8 * rows)
      for rows in (16, 32, 64, 128, 256, 512, 1024, 4096)
    },
  ),
  "E": Curve(
    "experts, 512 rows each",
    {
      experts: shapes.Shape(256, 512, experts, 1, 512 * experts)
      for experts in (8, 16, 32, 64, 128, 256)
    },
  ),
  "K": Curve(
    "experts per token",
    {k: shapes.Shape(256, 512, 16, k) for k in (1, 2, 4, 8)},
  ),
  "D": Curve(
    "width, F = 2 D",
    {d: shapes.Shape(d, 2 * d, 16, 2, 2048) for d in (128, 256, 512, 1024)},
  ),
}
LOADS = ("equal", "Zipf")
_SHAPES = ("S1", "S2", "S3", "S4")
_OURS = "sorted/cpu"


def main(argv=None) -> int:
  """The command."""
  args = _arguments(argv)
  if args.child:
    found = [measure(curve, args.rounds) for curve in args.curves]
    found += [measure_loads(shape, args.rounds) for shape in args.shapes]
    print(json.dumps(found[0]))
    return 0
  rows = []
  for name in args.curves:
    rows += summarize(name, _runs(args, curves=name))
    print(table(rows, name), flush=True)
    if args.json:  # After every curve, so that none is lost.
      timing.write(args.json, rows)
  loads = [loads_of(name, _runs(args, shapes=name)) for name in args.shapes]
  memory = [memory_of(shape) for shape in args.shapes]
  if args.shapes:
    print(loads_table(loads))
    print(memory_table(memory))
  if args.json:
    timing.write(args.json, rows + loads + memory)
  if args.figure:
    draw(rows, args.figure)
  return 0


def measure(curve: str, rounds: int) -> dict:
  """{value: {implementation: {direction: seconds by round}}}, in turn."""
  from benchmarks import layers

  found = {}
  for value, shape in CURVES[curve].shapes.items():
    named = layers.implementations(shape)
    ready = {
      (name, direction): function
      for name in (*shapes.DENSE, _OURS)
      for direction, function in layers.directions(*named[name]).items()
    }
    flat = timing.in_turn(ready, rounds)
    found[value] = {
      name: {d: flat[name, d] for d in shapes.DIRECTIONS}
      for name in (*shapes.DENSE, _OURS)
    }
  return found


def summarize(curve: str, runs: list[dict]) -> list[dict]:
  """A row per value: medians over processes, and the curve's exponents."""
  rows = []
  slopes = {
    f"{direction}_exponent": [_exponent(run, direction) for run in runs]
    for direction in shapes.DIRECTIONS
  }
  for value in CURVES[curve].shapes:
    row = {"curve": curve, "value": value}
    points = [run[str(value)] for run in runs]
    for d in shapes.DIRECTIONS:
      seconds = [statistics.median(point[_OURS][d]) for point in points]
      row[f"{d}_seconds"] = statistics.median(seconds)
      ratios = [timing.over(p[_OURS][d], _dense(p, d)) for p in points]
      row |= timing.summary(f"{d}_ratio", ratios)
    for name, found in slopes.items():
      row |= timing.summary(name, found)
    rows.append(row)
  return rows


def _dense(point, direction):
  found = (point[name][direction] for name in shapes.DENSE)
  return min(found, key=statistics.median)


def _exponent(run, direction):
  """The slope of log seconds over log value."""
  seconds = [statistics.median(p[_OURS][direction]) for p in run.values()]
  values = [math.log(int(value)) for value in run]
  return float(np.polyfit(values, np.log(seconds), 1)[0])


def table(rows: list[dict], curve: str) -> str:
  """The rows of a curve as markdown."""
  lines = [
    f"| {CURVES[curve].label} | forward, ms | ÷ dense | forward+backward, ms"
    " | ÷ dense |",
    "|---|---|---|---|---|",
  ]
  of_curve = [row for row in rows if row.get("curve") == curve]
  for row in of_curve:
    cells = [str(row["value"])]
    for d in shapes.DIRECTIONS:
      cells.append(f"{1e3 * row[f'{d}_seconds']:.1f}")
      cells.append(timing.cell(row, f"{d}_ratio"))
    lines.append(f"| {' | '.join(cells)} |")
  exponents = [
    timing.cell(of_curve[0], f"{d}_exponent") for d in shapes.DIRECTIONS
  ]
  lines.append(f"\nExponents: {exponents[0]} and {exponents[1]}.\n")
  return "\n".join(lines)


def measure_loads(shape: str, rounds: int) -> dict:
  """{loads: {direction: seconds by round}} of the layer, in turn."""
  from benchmarks import layers

  shape = shapes.SHAPES[shape]
  params, _, x_TD = layers.inputs(shape)
  ready = {}
  for loads in LOADS:
    recipe = layers.recipe(shape)
    recipe = dataclasses.replace(
      recipe, router=_forced(recipe.router, assignments(shape, loads))
    )
    f = functools.partial(layers.run, recipe, 1)
    for direction, function in layers.directions(f, params, x_TD).items():
      ready[loads, direction] = function
  flat = timing.in_turn(ready, rounds)
  return {
    loads: {d: flat[loads, d] for d in shapes.DIRECTIONS} for loads in LOADS
  }


def assignments(shape: shapes.Shape, loads: str) -> np.ndarray:
  """expert_TK: K different experts a token, in no order.

  Args:
    shape: of the layer.
    loads: "equal"; or "Zipf": drawn with a probability of 1 over the expert's
      rank, which the first draw of a token follows exactly.
  """
  tokens, experts, top_k = shape.tokens, shape.num_experts, shape.top_k
  rng = np.random.default_rng(0)
  if loads == "equal":
    expert_N = np.arange(tokens * top_k, dtype=np.int32) % experts
    return rng.permutation(expert_N.reshape(tokens, top_k))
  log_p_E = -np.log(np.arange(1, experts + 1))
  gumbel_TE = rng.gumbel(size=(tokens, experts))
  order_TE = np.argsort(-(log_p_E + gumbel_TE), axis=1)
  return order_TE[:, :top_k].astype(np.int32)


def _forced(router, expert_TK):
  """The router, all its work done, but with experts of our choice."""

  def route(*args, **options):
    return router.route(*args, **options).replace(expert_TK=expert_TK)

  return dataclasses.replace(router, route=route)


def loads_of(shape: str, runs: list[dict]) -> dict:
  """How much slower Zipf's loads are than equal ones."""
  row = {"shape": shape, "loads": "Zipf over equal"}
  for d in shapes.DIRECTIONS:
    zipf, equal = ([run[loads][d] for run in runs] for loads in LOADS[::-1])
    row |= timing.summary(f"{d}_ratio", list(map(timing.over, zipf, equal)))
  return row


def loads_table(rows: list[dict]) -> str:
  """As markdown."""
  lines = [
    "| loads of Zipf ÷ equal | forward | forward+backward |",
    "|---|---|---|",
  ]
  for row in rows:
    cells = [timing.cell(row, f"{d}_ratio") for d in shapes.DIRECTIONS]
    lines.append(f"| {row['shape']} | {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def memory_of(shape: str) -> dict:
  """Bytes of what forward and backward make, gradients included."""
  from benchmarks import layers

  named = layers.implementations(shapes.SHAPES[shape])
  row = {"shape": shape}
  for key, name in (("dense_bytes", "dense"), ("bytes", _OURS)):
    calls = layers.directions(*named[name])
    row[key] = calls["forward_backward"].made_bytes
  weights = named[_OURS][1]["experts"].values()
  row["weight_gradient_bytes"] = sum(w.nbytes for w in weights)
  row["without_weight_gradients_over_dense"] = (
    row["bytes"] - row["weight_gradient_bytes"]
  ) / row["dense_bytes"]
  return row


def memory_table(rows: list[dict]) -> str:
  """As markdown."""
  lines = [
    "| forward+backward | MB | of them gradients of experts | dense, MB"
    " | the rest ÷ dense |",
    "|---|---|---|---|---|",
  ]
  keys = ("bytes", "weight_gradient_bytes", "dense_bytes")
  for row in rows:
    cells = [f"{row[key] / 2**20:.0f}" for key in keys]
    cells.append(f"{row['without_weight_gradients_over_dense']:.2f}")
    lines.append(f"| {row['shape']} | {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def draw(rows: list[dict], path: pathlib.Path) -> None:
  """Writes path.png and path.pdf: each curve's cost over dense."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  curves = list(dict.fromkeys(row["curve"] for row in rows))
  figure, all_axes = plt.subplots(
    1, len(curves), figsize=(3 * len(curves), 3), layout="constrained"
  )
  for axes, curve in zip(np.atleast_1d(all_axes), curves):
    of_curve = [row for row in rows if row["curve"] == curve]
    for d, style in zip(shapes.DIRECTIONS, ("o-", "s--")):
      axes.errorbar(
        [row["value"] for row in of_curve],
        [row[f"{d}_ratio"] for row in of_curve],
        [row[f"{d}_ratio_interval"] or 0 for row in of_curve],
        fmt=style,
        capsize=3,
        color={"o-": "#0072b2", "s--": "#d55e00"}[style],
        label=d.replace("_", " + "),
      )
    axes.axhline(1, color="grey", lw=1)
    axes.set_xscale("log", base=2)
    axes.set(xlabel=CURVES[curve].label, ylim=(0, None))
  np.atleast_1d(all_axes)[0].set_ylabel("seconds ÷ dense")
  np.atleast_1d(all_axes)[0].legend()
  for kind, dated in (("png", {}), ("pdf", {"CreationDate": None})):
    figure.savefig(path.with_suffix(f".{kind}"), dpi=150, metadata=dated)
  plt.close(figure)


def _runs(args, curves="", shapes=""):
  """What each process measured, of one curve or the loads of one shape."""
  flags = ["--child", f"--curves={curves}", f"--shapes={shapes}"]
  flags.append(f"--rounds={args.rounds}")
  return timing.processes("benchmarks.scaling", flags, args.processes)


def _names(text):
  return text.split(",") if text else []


def _arguments(argv):
  parser = timing.parser("scaling", __doc__, rounds=5)
  add = parser.add_argument
  add(
    "--curves",
    type=_names,
    default=list(CURVES),
    help=", ".join(f"{k}: {c.label}" for k, c in CURVES.items()),
  )
  add(
    "--shapes",
    type=_names,
    default=list(_SHAPES),
    help=f"of the tables of loads and memory; {shapes.describe()}",
  )
  add("--figure", type=pathlib.Path, metavar="PATH", help="of the curves")
  args = parser.parse_args(argv)
  shapes.check(args.shapes)
  for name in args.curves:
    if name not in CURVES:
      raise ConfigError(
        f'--curves: there is no curve "{name}"' + did_you_mean(name, CURVES)
      )
  return args


if __name__ == "__main__":
  config_lib.run(lambda: main(sys.argv[1:]))
