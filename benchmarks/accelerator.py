"""The layer in bfloat16 on an accelerator, beside a dense one.

  python -m benchmarks.accelerator --json=accelerator.json

Router, choice, sort and all, forward alone and forward with all gradients,
divided by the dense layer of the same active FLOPs; everything has its turn in
every round. `sorted` runs with the backend that the accelerator gets, and with
plain `ragged_dot` (`reference`). What needs more memory than there is says so.
"""

import json
import statistics
import sys

from benchmarks import timing
from benchmarks.shapes import DIRECTIONS, Shape
from moe_jax.run import command

SHAPES = {
  "A1": Shape(1024, 2048, 16, 2, 8192),
  "A2": Shape(1024, 512, 128, 8, 8192),
}
_CALLS = 10  # Calls that are timed together: a single call is too short.


def main(argv=None) -> int:
  """The command."""
  args = _arguments(argv)
  if args.child:
    print(json.dumps(measure(SHAPES[args.shapes[0]], args.rounds)))
    return 0
  rows = []
  for name in args.shapes:
    flags = ["--child", f"--shapes={name}", f"--rounds={args.rounds}"]
    runs = timing.processes("benchmarks.accelerator", flags, args.processes)
    rows += summarize(name, SHAPES[name], runs)
    if args.json:
      timing.write(args.json, rows)
  print(table(rows))
  return 0


def measure(shape: Shape, rounds: int) -> dict:
  """{"seconds", "bytes"}: {implementation: {direction: ...}} of one call."""
  import jax

  from benchmarks import layers

  seconds, needed, ready = {}, {}, {}
  for name, (f, params, x_TD) in implementations(shape).items():
    seconds[name], needed[name] = {}, {}
    try:
      calls = layers.directions(f, params, x_TD)
    except jax.errors.JaxRuntimeError as e:
      if "RESOURCE_EXHAUSTED" not in str(e):
        raise
      continue
    for direction, call in calls.items():
      needed[name][direction] = call.made_bytes
      ready[name, direction] = lambda call=call: [
        call() for _ in range(_CALLS)
      ][-1]
  for (name, direction), found in timing.in_turn(ready, rounds).items():
    seconds[name][direction] = [s / _CALLS for s in found]
  return {"seconds": seconds, "bytes": needed}


def implementations(shape: Shape) -> dict:
  """{name: (f(params, x_TD) -> y_TD, params, x_TD)}, all in bfloat16."""
  import jax
  import jax.numpy as jnp

  from benchmarks import layers
  from moe_jax.moe import kernels

  def cast(tree):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)

  best = kernels.backend_for(jax.default_backend())
  named = layers.implementations(shape, backends=(best, "reference"))
  wanted = (
    "dense",
    f"sorted/{best}",
    "sorted/reference",
    "gather, capacity 1.25",
    "einsum, capacity 1.25",
    "experts alone, batched",
  )
  found = {}
  for name in wanted:
    f, params, x_TD = named[name]
    params = {k: w if k == "router" else cast(w) for k, w in params.items()}
    found[name] = f, params, cast(x_TD)
  return found


def summarize(name: str, shape: Shape, runs: list[dict]) -> list[dict]:
  """A row per implementation: medians over processes, with their interval."""
  rows = []
  for implementation, needed in runs[0]["bytes"].items():
    row = {"shape": name, "implementation": implementation}
    for direction in DIRECTIONS:
      found = [
        (run["seconds"][implementation][direction], run["seconds"]["dense"])
        for run in runs
        if direction in run["seconds"][implementation]
      ]
      if not found:
        continue
      ratios = [timing.over(one, dense[direction]) for one, dense in found]
      seconds = statistics.median(statistics.median(one) for one, _ in found)
      row |= timing.summary(f"{direction}_ratio", ratios)
      row[f"{direction}_seconds"] = seconds
      row[f"{direction}_bytes"] = needed[direction]
    if "forward_seconds" in row:
      rate = shape.flops / row["forward_seconds"]
      row["forward_flops_per_second"] = rate
    rows.append(row)
  return rows


def table(rows: list[dict]) -> str:
  """The results as markdown."""
  lines = {"down": "implementation", "across": "shape"}
  ran = [row for row in rows if "forward_seconds" in row]
  return "\n".join(
    (
      timing.grid(rows, **lines, text=_ratios, title="f / f+b, ÷ dense"),
      timing.grid(ran, **lines, text=_rate, title="forward, TFLOP/s"),
    )
  )


def _ratios(row):
  return " / ".join(
    timing.cell(row, f"{d}_ratio")
    if f"{d}_ratio" in row
    else "not enough memory"
    for d in DIRECTIONS
  )


def _rate(row):
  return f"{row['forward_flops_per_second'] / 1e12:.0f}"


def _arguments(argv):
  parser = timing.parser("accelerator", __doc__, rounds=7)
  described = (f"{k}: {tuple(v)}" for k, v in SHAPES.items())
  parser.add_argument(
    "--shapes",
    type=lambda text: text.split(","),
    default=list(SHAPES),
    help=f"{', '.join(described)} (D, F, E, K, T)",
  )
  args = parser.parse_args(argv)
  for name in args.shapes:
    if name not in SHAPES:
      parser.error(f'there is no shape "{name}", but {", ".join(SHAPES)}')
  return args


if __name__ == "__main__":
  command.run(lambda: main(sys.argv[1:]))
