"""Measures how time and memory of a dropless layer grow, axis by axis.

  python -m benchmarks.scaling --json=scaling.json --figure=scaling

Along each curve the layer is timed in turn with the dense layer of the same
active FLOPs (the faster of two, see benchmarks.moe_layer). Exponents are
slopes of log seconds, or bytes, over the log of what grows; the cost of a FLOP,
of the chosen experts and of the router, is shown over that at the first value.
Two more tables: loads that follow Zipf's law beside equal ones, and the memory
of forward and backward. Bytes are what XLA plans, without parameters and tokens.
"""

import dataclasses
import functools
import json
import pathlib
import statistics
import sys
from typing import NamedTuple

import numpy as np

from benchmarks import shapes, timing
from moe_jax.core.errors import ConfigError, did_you_mean
from moe_jax.run import command


class Curve(NamedTuple):
  """The readable name of the number that grows, and the shape at each value."""

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
    rows += summarize(name, _runs(args, curve=name))
    print(curve_table(rows, name), flush=True)
    if args.json:  # After every curve, so that none is lost.
      timing.write(args.json, rows)
  loads = [loads_of(name, _runs(args, shape=name)) for name in args.shapes]
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
  """{value: {implementation: {direction: seconds by round}}}, in turn; and
  {value: {"bytes": {direction: what ours makes}}}."""
  from benchmarks import layers

  found = {}
  for value, shape in CURVES[curve].shapes.items():
    named = layers.implementations(shape)
    calls = {
      name: layers.directions(*named[name]) for name in (*shapes.DENSE, _OURS)
    }
    flat = timing.in_turn(
      {(n, d): call for n, of_n in calls.items() for d, call in of_n.items()},
      rounds,
    )
    found[value] = {
      name: {d: flat[name, d] for d in shapes.DIRECTIONS} for name in calls
    }
    ours = calls[_OURS].items()
    found[value]["bytes"] = {d: call.made_bytes for d, call in ours}
  return found


def summarize(curve: str, runs: list[dict]) -> list[dict]:
  """A row per value: medians over processes, and the curve's exponents."""
  rows = []
  for value in CURVES[curve].shapes:
    row = {"curve": curve, "value": value}
    points = [run[str(value)] for run in runs]
    for d in shapes.DIRECTIONS:
      seconds = [statistics.median(point[_OURS][d]) for point in points]
      row[f"{d}_seconds"] = statistics.median(seconds)
      row[f"{d}_bytes"] = points[0]["bytes"][d]
      ratios = [timing.over(p[_OURS][d], _dense(p, d)) for p in points]
      row |= timing.summary(f"{d}_ratio", ratios)
      costs = [_cost(curve, run, d) for run in runs]
      grown = [cost[str(value)] / next(iter(cost.values())) for cost in costs]
      row |= timing.summary(f"{d}_per_flop_over_first", grown)
    rows.append(row)
  values = [row["value"] for row in rows]
  for d in shapes.DIRECTIONS:
    slopes = [_slope(values, _seconds(run, d).values()) for run in runs]
    found = timing.summary(f"{d}_exponent", slopes)
    found[f"{d}_bytes_exponent"] = _slope(
      values, [row[f"{d}_bytes"] for row in rows]
    )
    for row in rows:
      row |= found
  return rows


def _dense(point, direction):
  found = (point[name][direction] for name in shapes.DENSE)
  return min(found, key=statistics.median)


def _seconds(run, direction):
  """{value: median seconds of ours}."""
  return {k: statistics.median(p[_OURS][direction]) for k, p in run.items()}


def _cost(curve, run, direction):
  """{value: seconds of ours per active FLOP}."""
  found = CURVES[curve].shapes
  return {
    value: seconds / found[int(value)].flops
    for value, seconds in _seconds(run, direction).items()
  }


def _slope(values, grown):
  """The slope of log grown over log values."""
  return float(np.polyfit(np.log(values), np.log(list(grown)), 1)[0])


def table(rows: list[dict]) -> str:
  """All of it as markdown."""
  curves = dict.fromkeys(row["curve"] for row in rows if "curve" in row)
  tables = [curve_table(rows, curve) for curve in curves]
  for key, part in (
    ("loads", loads_table),
    ("weight_gradient_bytes", memory_table),
  ):
    found = [row for row in rows if key in row]
    tables += [part(found)] if found else []
  return "\n".join(tables)


def curve_table(rows: list[dict], curve: str) -> str:
  """The rows of a curve as markdown."""
  head = ["ms", "÷ dense", "per FLOP ÷ first", "MB"]
  heads = [f"{d}, {h}" for d in ("forward", "f+b") for h in head]
  lines = [
    f"| {CURVES[curve].label} | {' | '.join(heads)} |",
    f"|{'---|' * (1 + len(heads))}",
  ]
  of_curve = [row for row in rows if row.get("curve") == curve]
  shares = [_of_experts(curve, row["value"]) for row in of_curve]
  for row, share in zip(of_curve, shares):
    cells = [str(row["value"])]
    for d in shapes.DIRECTIONS:
      cells.append(f"{1e3 * row[f'{d}_seconds']:.1f}")
      cells.append(timing.cell(row, f"{d}_ratio"))
      grown = share / shares[0]
      cells.append(timing.cell(row, f"{d}_per_flop_over_first", grown))
      cells.append(f"{row[f'{d}_bytes'] / 2**20:.0f}")
    lines.append(f"| {' | '.join(cells)} |")
  exponents = (
    f"{d} {timing.cell(of_curve[0], f'{key}_exponent')} of seconds and"
    f" {of_curve[0][f'{key}_bytes_exponent']:.2f} of bytes"
    for d, key in zip(("forward", "f+b"), shapes.DIRECTIONS)
  )
  lines.append(f"\nExponents: {'; '.join(exponents)}.")
  return "\n".join(lines) + "\n"


def _of_experts(curve, value):
  """The share of the experts in the FLOPs of experts and router.

  Rows have the cost of a FLOP of the experts; tables count the router's too.
  """
  shape = CURVES[curve].shapes[value]
  return shape.flops / (shape.flops + shape.router_flops)


def measure_loads(shape: str, rounds: int) -> dict:
  """{loads: {direction: seconds by round}} of the layer, in turn."""
  from benchmarks import layers

  shape = shapes.SHAPES[shape]
  params, _, x_TD = layers.inputs(shape)
  ready = {}
  for loads in LOADS:
    f, of_loads = forced(shape, params, assignments(shape, loads))
    for direction, function in layers.directions(f, of_loads, x_TD).items():
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


def forced(shape: shapes.Shape, params: dict, expert_TK: np.ndarray):
  """(the layer, its parameters): the router works, but experts are our choice.

  They come as a parameter. XLA would do what depends on a constant while it
  compiles, such as the sort.
  """
  from benchmarks import layers

  recipe = layers.recipe(shape)

  def route(params, *args, **options):
    params = dict(params)
    expert_TK = params.pop("expert_TK").astype(np.int32)
    routing = recipe.router.route(params, *args, **options)
    choice = routing.choice.replace(expert_TK=expert_TK)
    return routing.replace(choice=choice)

  router = dataclasses.replace(recipe.router, route=route)
  own = params["router"] | {"expert_TK": expert_TK.astype(np.float32)}
  return (
    functools.partial(
      layers.run, dataclasses.replace(recipe, router=router), 1
    ),
    params | {"router": own},
  )


def loads_of(shape: str, runs: list[dict]) -> dict:
  """The time of Zipf's loads over that of equal loads."""
  row = {"shape": shape, "loads": "Zipf over equal"}
  for d in shapes.DIRECTIONS:
    zipf, equal = ([run[loads][d] for run in runs] for loads in LOADS[::-1])
    row |= timing.summary(f"{d}_ratio", list(map(timing.over, zipf, equal)))
  return row


def loads_table(rows: list[dict]) -> str:
  """The results as markdown."""
  lines = [
    "| loads of Zipf ÷ equal | forward | forward+backward |",
    "|---|---|---|",
  ]
  for row in rows:
    cells = [timing.cell(row, f"{d}_ratio") for d in shapes.DIRECTIONS]
    lines.append(f"| {row['shape']} | {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def memory_of(shape: str) -> dict:
  """Bytes that forward and backward allocate, gradients included."""
  from benchmarks import layers

  named = layers.implementations(shapes.SHAPES[shape])
  made = {
    name: layers.directions(*named[name])["forward_backward"].made_bytes
    for name in (*shapes.DENSE, _OURS)
  }
  weights = named[_OURS][1]["experts"].values()
  gradients = sum(w.nbytes for w in weights)
  dense = min(made[name] for name in shapes.DENSE)
  return {
    "shape": shape,
    "dense_bytes": dense,
    "bytes": made[_OURS],
    "weight_gradient_bytes": gradients,
    "without_weight_gradients_over_dense": (made[_OURS] - gradients) / dense,
  }


def memory_table(rows: list[dict]) -> str:
  """The results as markdown."""
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
        np.transpose([_bar(row, f"{d}_ratio") for row in of_curve]),
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
    name = path.with_name(f"{path.name}.{kind}")
    figure.savefig(name, dpi=150, metadata=dated)
  plt.close(figure)


def _bar(row, name):
  """Below and above the point."""
  return row[name] - row[f"{name}_least"], row[f"{name}_most"] - row[name]


def _runs(args, curve="", shape=""):
  """Measures a curve, or the loads of a shape; a result for each process."""
  flags = ["--child", f"--curves={curve}", f"--shapes={shape}"]
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
  add(
    "--figure",
    type=timing.path,
    metavar="PATH",
    help="of the curves, as PATH.png and PATH.pdf",
  )
  args = parser.parse_args(argv)
  if args.figure and not args.curves:
    raise ConfigError("--figure draws curves, and --curves= leaves none")
  shapes.check(args.shapes)
  for name in args.curves:
    if name not in CURVES:
      raise ConfigError(
        f'--curves: there is no curve "{name}"' + did_you_mean(name, CURVES)
      )
  return args


if __name__ == "__main__":
  command.run(lambda: main(sys.argv[1:]))
