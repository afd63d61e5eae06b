"""Time of a layer by kind of XLA's operations.

  python -m benchmarks.profile --shapes=S4 --only=dense/cpu --only=sorted/cpu

A call is traced by jax's profiler, and the time from begin to end of every
operation is summed: matrix products; fills and copies of memory; gathers;
everything else that goes element by element, such as activations and the sums of
gradients. An operation may use all cores, and a few run side by side, so the sum
may be more than the wall time.
"""

import collections
import json
import pathlib
import re
import statistics
import sys
import tempfile

from benchmarks import shapes, timing
from moe_jax.run import command

KINDS = ("products", "fills and copies", "gathers", "element by element")
_CONTAINERS = ("while", "call", "conditional")


def main(argv=None) -> int:
  """The command."""
  args = _arguments(argv)
  if args.child:
    print(json.dumps(measure(args.shapes[0], args.only, args.rounds)))
    return 0
  rows = []
  for shape in args.shapes:
    flags = ["--child", f"--shapes={shape}", f"--rounds={args.rounds}"]
    flags += [f"--only={name}" for name in args.only]
    runs = timing.processes("benchmarks.profile", flags, args.processes)
    rows += summarize(shape, runs)
  print(table(rows))
  if args.json:
    timing.write(args.json, rows)
  return 0


def measure(shape: str, names: list[str], rounds: int) -> list[dict]:
  """{"implementation", "direction", "wall", kind: seconds} of each call.

  Args:
    shape: name.
    names: of implementations.
    rounds: calls that are traced one by one; medians are taken.
  """
  from benchmarks import layers

  named = layers.implementations(shapes.SHAPES[shape])
  found = []
  for name in names:
    for direction, call in layers.directions(*named[name]).items():
      kinds = kinds_of(call.compiled.as_text())
      traced = [trace(call, kinds) for _ in range(rounds + 1)][1:]
      medians = {
        key: statistics.median(one.get(key, 0.0) for one in traced)
        for key in ("wall", *KINDS)
      }
      found.append({"implementation": name, "direction": direction} | medians)
  return found


def trace(call, kinds: dict[str, str]) -> dict[str, float]:
  """Seconds of wall time, and of operations by kind, of one call.

  Args:
    call: a function without arguments.
    kinds: by instruction, from `kinds_of`.
  """
  import jax

  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      jax.block_until_ready(call())
    [path] = pathlib.Path(folder).rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(path))
  seconds, first, last = collections.Counter(), float("inf"), 0.0
  for plane in data.planes:
    for line in plane.lines:
      for event in line.events:
        kind = kinds.get(event.name)
        if kind is None:
          continue
        first = min(first, event.start_ns)
        last = max(last, event.start_ns + event.duration_ns)
        if kind in KINDS:
          seconds[kind] += event.duration_ns / 1e9
  return {"wall": (last - first) / 1e9, **seconds}


def kinds_of(text: str) -> dict[str, str]:
  """The kind of each instruction of a compiled module's text.

  Containers, whose time is that of what they hold, are "containers".
  """
  inside, computation, instructions = {}, None, []
  for line in text.splitlines():
    head = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
    if head:
      computation = head[1]
      inside[computation] = set()
    found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][\w\-]*)\(", line)
    if found and computation:
      name, opcode = found.groups()
      inside[computation].add(opcode)
      calls = re.search(r"calls=%?([\w.\-]+)", line)
      instructions.append((name, opcode, calls and calls[1]))
  return {
    name: _kind(opcode, inside.get(calls, set()))
    for name, opcode, calls in instructions
  }


def _kind(opcode, inside):
  everything = {opcode, *inside}
  if opcode in _CONTAINERS:
    return "containers"
  if everything & {"dot", "custom-call", "convolution"}:
    return "products"
  moved = {"parameter", "constant", "broadcast", "copy", "bitcast", "reshape"}
  if everything <= moved | {"fusion", "transpose"}:
    return "fills and copies"
  if everything & {"gather", "scatter", "sort"}:
    return "gathers"
  return "element by element"


def summarize(shape: str, runs: list[list[dict]]) -> list[dict]:
  """A row per implementation and direction: medians over processes."""
  rows = []
  for found in zip(*runs):
    row = {"shape": shape, **found[0]}
    for key in ("wall", *KINDS):
      row[key] = statistics.median(one[key] for one in found)
    rows.append(row)
  return rows


def table(rows: list[dict]) -> str:
  """The results as markdown, in milliseconds."""
  lines = [
    f"| shape | layer | direction | wall, ms | {' | '.join(KINDS)} |",
    "|---" * (4 + len(KINDS)) + "|",
  ]
  for row in rows:
    cells = [row["shape"], row["implementation"]]
    cells.append(row["direction"].replace("_", " + "))
    cells.append(f"{1e3 * row['wall']:.0f}")
    cells += [f"{1e3 * row[kind]:.0f}" for kind in KINDS]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def _arguments(argv):
  parser = timing.parser("profile", __doc__, rounds=5)
  add = parser.add_argument
  add(
    "--shapes",
    type=lambda text: text.split(","),
    default=["S1", "S4"],
    help=shapes.describe(),
  )
  add("--only", action="append", metavar="NAME", help="a layer; repeatable")
  args = parser.parse_args(argv)
  args.only = args.only or ["dense/cpu", "sorted/cpu"]
  shapes.check(args.shapes)
  shapes.check_layers(args.only, (*shapes.DENSE, *shapes.ROWS))
  return args


if __name__ == "__main__":
  command.run(lambda: main(sys.argv[1:]))
