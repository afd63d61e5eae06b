"""Time of the training loop over that of its compiled steps.

  python -m benchmarks.loop --config=configs/tiny.py

Times the loop (data, logging, metrics, the config's checkpoints) and the same
compiled steps back to back on one resident batch, in turn, and prints the
median ratio of the pairs.
"""

import json
import statistics
import sys
import tempfile
import time

from moe_jax.run import command
from moe_jax.run import config as config_lib


def main(argv=None) -> int:
  """The command."""
  parser = config_lib.parser("Times the training loop against bare steps.")
  parser.add_argument(
    "--steps", type=config_lib.at_least_1, default=100, help="in each timing"
  )
  parser.add_argument(
    "--rounds", type=config_lib.at_least_1, default=7, help="pairs of timings"
  )
  parser.add_argument("--json", metavar="PATH", help="also write JSON there")
  args, config = config_lib.parse(parser, argv)

  from moe_jax.training.program import Program

  program = Program(config)
  with tempfile.TemporaryDirectory(prefix="moe_jax_loop_") as folder:
    ratios = measure(program, folder, args.steps, args.rounds)
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


def measure(program, folder, num_steps: int, rounds: int) -> list[float]:
  """Seconds of the loop over those of bare steps, a ratio for each round.

  Args:
    program: what is trained.
    folder: for what a run writes.
    num_steps: in each timing.
    rounds: pairs of timings, after one to warm up.
  """
  import jax

  from moe_jax.core import progress
  from moe_jax.run import run_directory
  from moe_jax.training import checkpoint, loop

  directory = run_directory.RunDirectory(folder, program.config)
  options = program.config.checkpoint
  checkpoints = checkpoint.Checkpoints(
    directory.path / "checkpoints",
    keep_last=options.keep_last,
    keep_every=options.keep_every,
  )
  lines = loop.Lines(program, directory, progress.Progress(10**9, "steps"))
  state, stream = program.init(jax.random.key(0)), program.batches(0)
  resident = jax.tree.map(jax.numpy.asarray, program.put(stream[0]))
  ratios = []
  for i in range(rounds + 1):
    started = time.perf_counter()
    for _ in range(num_steps):
      state, sums = program.train_step(state, resident)
    jax.block_until_ready((state, sums))
    bare = time.perf_counter() - started
    started = time.perf_counter()
    for step in range(i * num_steps, (i + 1) * num_steps):
      state = loop.take_step(program, state, stream, step, lines, checkpoints)
    lines.write()
    jax.block_until_ready(state)
    if i:  # The first pair warms up.
      ratios.append((time.perf_counter() - started) / bare)
  checkpoints.close()
  directory.close()
  return ratios


if __name__ == "__main__":
  command.run(lambda: main(sys.argv[1:]))
