"""What the training loop costs beside its compiled steps.

  python -m benchmarks.loop --config=configs/tiny.py

Times the loop (data, logging, metrics) and the same compiled steps back to
back on one resident batch, in turn, and prints the ratio pair by pair.
"""

import json
import statistics
import sys
import tempfile
import time

from moe_jax import config as config_lib


def main(argv=None) -> int:
  """The command."""
  parser = config_lib.parser("Times the training loop against bare steps.")
  parser.add_argument("--steps", type=int, default=100, help="in each timing")
  parser.add_argument("--rounds", type=int, default=7, help="pairs of timings")
  parser.add_argument("--json", metavar="PATH", help="also write JSON there")
  args, config = config_lib.parse(parser, argv)

  import jax

  from moe_jax import loop
  from moe_jax.program import Program

  program = Program(config)
  state, stream = program.init(jax.random.key(0)), program.batches(0)
  resident = jax.tree.map(jax.numpy.asarray, program.put(stream[0]))
  ratios = []
  for i in range(args.rounds + 1):
    started = time.perf_counter()
    for _ in range(args.steps):
      state, sums = program.train_step(state, resident)
    jax.block_until_ready((state, sums))
    bare = time.perf_counter() - started
    started = time.perf_counter()
    steps = range(i * args.steps, (i + 1) * args.steps)
    lines = loop.Lines(program, *_writers(config))
    state, _ = loop.take_steps(program, state, stream, steps, lines, None, None)
    jax.block_until_ready(state)
    if i:  # The first pair warms up.
      ratios.append((time.perf_counter() - started) / bare)
  found = {
    "loop_over_steps": statistics.median(ratios),
    "least": min(ratios),
    "most": max(ratios),
    "compile_seconds": program.compile_seconds,
  }
  for name, value in found.items():
    print(f"{name:20}{value:10.3f}")
  if args.json:
    with open(args.json, "w") as f:
      json.dump(found, f, indent=2)
  return 0


def _writers(config):
  """A work directory and a progress line as a run has them."""
  from moe_jax import progress, run_directory

  folder = tempfile.mkdtemp(prefix="moe_jax_loop_")
  return run_directory.RunDirectory(folder, config), progress.Progress(
    10**9, ""
  )


if __name__ == "__main__":
  config_lib.run(lambda: main(sys.argv[1:]))
