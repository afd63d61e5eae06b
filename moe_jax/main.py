"""Trains one model.

python -m moe_jax.main --config=configs/tiny.py --workdir=runs/tiny
"""

from moe_jax.core.errors import ConfigError
from moe_jax.run import command


def main(argv=None) -> int:
  """The command: trains one run from a config in a work directory."""
  # Inside, where `command.run` handles signals already.
  from moe_jax.run import config as config_lib

  about = "Trains one model and evaluates it."
  parser = config_lib.parser(about, multihost=True)
  parser.add_argument("--workdir", metavar="DIR", help="the run's folder")
  args, config = config_lib.parse(parser, argv)
  if not args.workdir:
    raise ConfigError("--workdir=DIR is missing: the folder of the run")

  from moe_jax.run import processes
  from moe_jax.training import loop, program

  program.check(config)
  processes.join(args.multihost, args.multihost_timeout)
  values = loop.train_and_evaluate(config, args.workdir)
  if processes.is_first():
    for name, value in values.items():
      print(f"{name:32}{value:12.4f}")
  return 0


if __name__ == "__main__":
  command.run(main)
