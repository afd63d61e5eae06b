"""A MoE layer beside a dense layer of the same active FLOPs, and beside peers.

  python -m benchmarks.moe_layer --shapes=S1,S2 --json=moe_layer.json

Every way of computing the layer (router, choice, sort and all) is timed in
turn in one process, forward alone and forward with all gradients, and divided
by the dense layer of that round; several processes give medians and an
interval. What is five times slower, or more, runs in the first of them only;
what takes more memory than there is does not run, and its memory is shown.
Dense is the faster of two: plain matrix products, and our loop over experts
with one expert. The last line is no layer, but equally many rows for every
expert in XLA's batched products: what is left without any routing.
"""

import json
import statistics
import sys

from benchmarks import shapes, timing
from moe_jax.run import command

_SLOW = 5.0  # Times dense; what is slower runs in the first process only.
_MOST = 0.8  # Share of the machine's memory; larger ones are not run.


def main(argv=None) -> int:
  """The command."""
  args = _arguments(argv)
  if args.child:
    found = measure(args.shapes[0], args.rounds, args.only)
    print(json.dumps(found))
    return 0
  rows = []
  for name in args.shapes:
    found = summarize(name, _runs(name, args))
    print(table(found), flush=True)
    rows += found
    if args.json:  # After every shape, so that none is lost.
      timing.write(args.json, rows)
  return 0


def summarize(shape: str, runs: list[dict]) -> list[dict]:
  """A row per implementation: medians over processes, with their interval.

  Args:
    shape: name.
    runs: of each process, what `measure` returns.
  """
  rows = []
  for name, needed in runs[0]["bytes"].items():
    row = {"shape": shape, "implementation": name}
    timed = [run for run in runs if name in run["seconds"]]
    for direction in shapes.DIRECTIONS:
      row[f"{direction}_bytes"] = needed[direction]
      ran = [run for run in timed if direction in run["seconds"][name]]
      if not ran:
        continue
      ratios = [_ratio(run["seconds"], name, direction) for run in ran]
      best = [min(run["seconds"][name][direction]) for run in ran]
      row |= timing.summary(f"{direction}_ratio", ratios)
      row[f"{direction}_seconds"] = statistics.median(best)
    if "forward_seconds" in row:
      peak = statistics.median(run["matmul_flops_per_second"] for run in runs)
      rate = shapes.SHAPES[shape].flops / row["forward_seconds"]
      row["forward_of_matmul_peak"] = rate / peak
    row["processes"] = len(timed)
    rows.append(row)
  return rows


def _ratio(seconds, name, direction):
  """Over the faster dense layer."""
  dense = min(
    (seconds[d][direction] for d in shapes.DENSE), key=statistics.median
  )
  return timing.over(seconds[name][direction], dense)


def table(rows: list[dict]) -> str:
  """The rows as markdown: ratios, and percentages of the matmul peak."""
  lines = {"down": "implementation", "across": "shape"}
  shares = [row for row in rows if "forward_of_matmul_peak" in row]
  return "\n".join(
    (
      timing.grid(rows, **lines, text=_ratios, title="f / f+b, ÷ dense"),
      timing.grid(shares, **lines, text=_share, title="% of matmul peak"),
    )
  )


def _ratios(row):
  return " / ".join(_cell(row, direction) for direction in shapes.DIRECTIONS)


def _share(row):
  return f"{100 * row['forward_of_matmul_peak']:.0f}"


def _cell(row, direction):
  if f"{direction}_ratio" in row:
    return timing.cell(row, f"{direction}_ratio")
  return f"needs {row[f'{direction}_bytes'] / 2**30:.0f} GB"


def _runs(shape, args):
  """The measurements of each process."""
  flags = ["--child", f"--shapes={shape}", f"--rounds={args.rounds}"]
  only, runs = args.only or [*shapes.ROWS], []
  for _ in range(args.processes):
    names = [f"--only={name}" for name in only]
    runs += timing.processes("benchmarks.moe_layer", flags + names, 1)
    only = [n for n in only if not _is_slow(runs[0]["seconds"].get(n), runs)]
  return runs


def _is_slow(seconds, runs):
  """Whether a layer is so slow, or so large, that one process is enough."""
  dense = runs[0]["seconds"][shapes.DENSE[0]]
  return seconds is None or any(
    direction not in seconds
    or min(seconds[direction]) > _SLOW * min(dense[direction])
    for direction in shapes.DIRECTIONS
  )


def measure(shape: str, rounds: int, only: list[str] | None) -> dict:
  """Seconds by round of all implementations of a shape, in turn, and bytes.

  Args:
    shape: name.
    rounds: in each, every implementation runs once in each direction.
    only: names of implementations; None: all.
  """
  from benchmarks import layers

  named = layers.implementations(shapes.SHAPES[shape])
  wanted = [n for n in named if only is None or n in (*shapes.DENSE, *only)]
  calls = {
    (name, direction): call
    for name in wanted
    for direction, call in layers.directions(*named[name]).items()
  }
  room = _MOST * timing.memory()
  ready = {k: call for k, call in calls.items() if call.made_bytes < room}

  def enough(key, seconds):
    dense, found = min(seconds[shapes.DENSE[0], key[1]]), seconds[key]
    # The first run of all is cold, and alone says little.
    return min(found) > (_SLOW if len(found) > 1 else 4 * _SLOW) * dense

  seconds, needed = {}, {}
  for (name, direction), found in timing.in_turn(ready, rounds, enough).items():
    seconds.setdefault(name, {})[direction] = found
  for (name, direction), call in calls.items():
    needed.setdefault(name, {})[direction] = call.made_bytes
  return {
    "seconds": seconds,
    "bytes": needed,
    "matmul_flops_per_second": timing.matmul_peak(),
  }


def _arguments(argv):
  parser = timing.parser("moe_layer", __doc__, rounds=7)
  add = parser.add_argument
  add(
    "--shapes",
    type=lambda text: text.split(","),
    default=["S1", "S2", "S3", "S4"],
    help=shapes.describe(),
  )
  add(
    "--only",
    action="append",
    metavar="NAME",
    help="a line of the table, besides dense; repeatable",
  )
  args = parser.parse_args(argv)
  shapes.check(args.shapes)
  shapes.check_layers(args.only or [])
  return args


if __name__ == "__main__":
  command.run(lambda: main(sys.argv[1:]))
