"""Measures the memory of a run, while it trains and while it saves.

  python -m benchmarks.memory --config=configs/tiny.py

Trains some steps and saves a checkpoint while it trains on, as a run does.
Prints the process's peaks by Linux's account (VmHWM), which is reset before
each part, the state's own size, and how long the save holds up the loop.
"""

import json
import os
import sys
import tempfile
import time

from moe_jax.core.errors import ConfigError
from moe_jax.run import command
from moe_jax.run import config as config_lib


def main(argv=None) -> int:
  """The command."""
  parser = config_lib.parser("Measures the memory of training and of a save.")
  parser.add_argument(
    "--steps", type=config_lib.at_least_1, default=20, help="in each part"
  )
  parser.add_argument("--json", metavar="PATH", help="also write JSON there")
  args, config = config_lib.parse(parser, argv)
  if not os.path.exists("/proc/self/clear_refs"):
    raise ConfigError("benchmarks.memory reads /proc, which only Linux has")

  import jax

  from moe_jax.training.checkpoint import Checkpoints
  from moe_jax.training.program import Program

  program = Program(config)
  compiling = peak()
  state, stream = program.init(jax.random.key(0)), program.batches(0)

  def train(state, steps):
    for step in steps:
      state, sums = program.train_step(state, program.put(stream[step]))
    jax.block_until_ready((state, sums))
    return state

  state = train(state, range(args.steps))
  reset_peak()
  state = train(state, range(args.steps, 2 * args.steps))
  training = peak()
  with tempfile.TemporaryDirectory() as folder:
    checkpoints = Checkpoints(folder)
    checkpoints.save(0, state, {})  # The first one sets Orbax up.
    checkpoints.wait()
    reset_peak()
    started = time.perf_counter()
    checkpoints.save(1, state, {})
    held_up = time.perf_counter() - started
    train(state, range(2 * args.steps, 3 * args.steps))
    checkpoints.wait()
    saving = peak()
    checkpoints.close()
  found = {
    "state_bytes": sum(
      x.size * x.dtype.itemsize for x in jax.tree.leaves(program.abstract_state)
    ),
    "peak_bytes_compiling": compiling,
    "peak_bytes_training": training,
    "peak_bytes_training_and_saving": saving,
    "save_holds_up_seconds": held_up,
  }
  for name, value in found.items():
    unit, value = ("MB", value / 1e6) if "bytes" in name else ("s", value)
    print(f"{name:34}{value:12.3f} {unit}")
  if args.json:
    with open(args.json, "w") as f:
      json.dump(found, f, indent=2)
  return 0


def reset_peak() -> None:
  """The peak is what is in use now."""
  with open("/proc/self/clear_refs", "w") as f:
    f.write("5")


def peak() -> int:
  """Bytes of memory in use at most since the last reset."""
  with open("/proc/self/status") as f:
    line = next(x for x in f if x.startswith("VmHWM"))
  return int(line.split()[1]) * 1024


if __name__ == "__main__":
  command.run(lambda: main(sys.argv[1:]))
