"""How long does a training step of each arm of a question take?

  python -m benchmarks.arms load_balancing --scale=cpu --csv=times.csv

Times the compiled steps of all arms in turn, round by round, so that what else
the machine does falls on all of them alike. A file of that name beside the
question gives its report the seconds that the training of each arm takes.
"""

import argparse
import statistics
import sys
import time

from experiments import plan as plans
from experiments import questions, runs, sweeps
from moe_jax import config as config_lib


def main(argv=None) -> int:
  """The command."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.arms",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("question", metavar="QUESTION", help=", ".join(questions.names()))
  add("--scale", metavar="NAME", help="as of experiments.launch")
  add(
    "--rounds",
    type=config_lib.at_least_1,
    default=15,
    help="in which every arm has its turn",
  )
  add(
    "--steps",
    type=config_lib.at_least_1,
    default=4,
    help="of an arm in a round",
  )
  add("--csv", metavar="PATH", help="also put all timings there")
  args = parser.parse_args(argv)
  plan = plans.make(questions.load(args.question), scale=args.scale)
  configs = plan.sweep.configs()
  rows = [
    {"scale": plan.scale, "arm": arm, "config_digest": sweeps.digest(config)}
    for arm, config in configs.items()
  ]
  seconds = measure(list(configs.values()), args.rounds, args.steps)
  first = statistics.median(seconds[0])
  for row, found in zip(rows, seconds):
    middle = statistics.median(found)
    print(
      f"{row['arm']:28}{1e3 * middle:9.1f} ms a step ({1e3 * min(found):.1f}"
      f" to {1e3 * max(found):.1f}), {middle / first:.3f} x the first"
    )
  if args.csv:
    runs.replace_scale(
      args.csv,
      plan.scale,
      [
        row | {"round": i, "seconds_per_step": value}
        for row, found in zip(rows, seconds)
        for i, value in enumerate(found)
      ],
    )
  return 0


def measure(configs, rounds: int, steps: int) -> list[list[float]]:
  """Seconds per step of each config, a list over rounds.

  Args:
    configs: of the arms; those that compile to the same are timed apart.
    rounds: in each, every arm has its turn.
    steps: of an arm in a round.
  """
  import jax

  from moe_jax.program import Program

  programs = [Program(c) for c in configs]
  states = [p.init(jax.random.key(0)) for p in programs]
  batches = [p.put(p.batches(0)[0]) for p in programs]
  seconds = [[] for _ in programs]
  for i in range(rounds + 1):
    for n, program in enumerate(programs):
      started = time.perf_counter()
      for _ in range(steps):
        states[n], sums = program.train_step(states[n], batches[n])
      jax.block_until_ready((states[n], sums))
      if i:  # The first round warms up.
        seconds[n].append((time.perf_counter() - started) / steps)
  return seconds


if __name__ == "__main__":
  config_lib.run(lambda: main(sys.argv[1:]))
