"""Measures the duration of a training step, for each arm of a question.

  python -m benchmarks.train_step load_balancing --scale=cpu --than=dense

Times the compiled steps of all arms in turn, round by round, so that what else
the machine does falls on all of them alike; several processes give medians and
an interval. Where arms have a dense one for each size, as in scaling,
--than=dense is that of their own size. --config.KEY=VALUE changes all arms, as in
experiments.launch. With --csv the timings go to a file; as times.csv beside the
question, it gives its report the seconds that the training of each arm takes.
"""

import json
import statistics
import sys
import time
from collections.abc import Sequence

from benchmarks import timing
from experiments import plan, questions, runs, sweeps
from moe_jax.core.errors import ConfigError, did_you_mean
from moe_jax.run import command
from moe_jax.run import config as config_lib


def main(argv=None) -> int:
  """The command."""
  args, overrides = _arguments(argv)
  experiment = plan.make(
    questions.load(args.question),
    scale=args.scale,
    arms=args.arm,
    overrides=overrides,
  )
  all_configs = experiment.sweep.configs()
  configs = {arm: all_configs[arm] for arm in experiment.arms}
  relative_to = than(args.than or next(iter(configs)), configs)
  if args.child:
    found = measure(list(configs.values()), args.rounds, args.steps)
    print(json.dumps(dict(zip(configs, found))))
    return 0
  found = timing.processes(
    "benchmarks.train_step", _flags(args, overrides), args.processes
  )
  rows = summarize(found, configs, relative_to, overrides)
  print(table(rows))
  if args.json:
    timing.write(args.json, rows)
  if args.csv:
    seconds = [
      {
        "scale": experiment.scale,
        "arm": arm,
        "config_digest": sweeps.digest(configs[arm]),
        "process": number,
        "round": i,
        "seconds_per_step": value,
      }
      for arm in configs
      for number, process in enumerate(found)
      for i, value in enumerate(process[arm])
    ]
    runs.replace_scale(args.csv, experiment.scale, seconds)
  return 0


def than(wanted: str, arms) -> dict[str, str]:
  """{arm: the one that its speed is relative to}."""
  if wanted in arms:
    return dict.fromkeys(arms, wanted)
  found = {arm: f"{arm.rpartition('-')[0]}-{wanted}" for arm in arms}
  if not set(found.values()) <= set(arms):
    raise ConfigError(
      f'--than: "{wanted}" is not one of the arms, nor is there one for each of'
      " their sizes" + did_you_mean(wanted, arms)
    )
  return found


def summarize(
  found: list[dict],
  configs: dict,
  relative_to: dict[str, str],
  overrides: Sequence[str] = (),
) -> list[dict]:
  """A row per arm: medians over processes, with their interval.

  Args:
    found: of each process, {arm: seconds per step, by round}.
    configs: of the arms.
    relative_to: from `than`.
    overrides: KEY=VALUE, what the arms have besides.
  """
  rows = []
  for arm, config in configs.items():
    seconds = [statistics.median(process[arm]) for process in found]
    speed = [timing.over(one[relative_to[arm]], one[arm]) for one in found]
    tokens = config.data.batch_size * config.data.seq_len
    row = {
      "arm": arm,
      "than": relative_to[arm],
      "config": list(overrides),
      "seconds_per_step": statistics.median(seconds),
    }
    row["tokens_per_second"] = tokens / row["seconds_per_step"]
    row["processes"] = len(found)
    rows.append(row | timing.summary("relative_speed", speed))
  return rows


def table(rows: list[dict]) -> str:
  """The rows as markdown."""
  name = rows[0]["than"]
  if any(row["than"] != name for row in rows):
    name = f"{name.rpartition('-')[2]} of its size"
  changed = ", ".join(f"`{text}`" for text in rows[0].get("config", ()))
  lines = [f"With {changed}:\n"] if changed else []
  lines += [
    f"| arm | ms a step | tokens/s | speed ÷ {name} |",
    "|---|---|---|---|",
  ]
  for row in rows:
    speed = timing.cell(row, "relative_speed")
    lines.append(
      f"| {row['arm']} | {1e3 * row['seconds_per_step']:.1f}"
      f" | {row['tokens_per_second']:.0f} | {speed} |"
    )
  return "\n".join(lines) + "\n"


def measure(configs, rounds: int, steps: int) -> list[list[float]]:
  """Seconds per step of each config, a list over rounds.

  Args:
    configs: of the arms; those that compile to the same are timed apart.
    rounds: in each, every arm has its turn.
    steps: of an arm in a round.
  """
  import jax

  from moe_jax.training.program import Program

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


def _flags(args, overrides):
  flags = [args.question, "--child", f"--rounds={args.rounds}"]
  flags += [f"--steps={args.steps}"]
  flags += [f"--questions={args.questions}"] * bool(args.questions)
  flags += [f"--scale={args.scale}"] * bool(args.scale)
  flags += [f"--arm={arm}" for arm in args.arm or ()]
  return flags + [f"--config.{text}" for text in overrides]


def _arguments(argv):
  parser = timing.parser("train_step", __doc__, rounds=15)
  questions.add_arguments(parser, argv)
  add = parser.add_argument
  add("--than", metavar="NAME", help="arm of speed 1; the first one")
  add(
    "--steps",
    type=config_lib.at_least_1,
    default=4,
    help="of an arm in a round",
  )
  add("--csv", type=timing.path, metavar="PATH", help="put all timings there")
  args, overrides = config_lib.parse_overrides(parser, argv)
  if args.csv and overrides:
    raise ConfigError(
      "--csv keeps the times of the arms as they are; leave out --config"
    )
  return args, overrides


if __name__ == "__main__":
  command.run(lambda: main(sys.argv[1:]))
