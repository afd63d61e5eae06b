"""Trains one model.

python -m moe_jax.main --config=configs/tiny.py --workdir=runs/tiny
"""

import json
import sys

from moe_jax import config as config_lib


def main(argv=None) -> int:
  """The command: one run from a config into a work directory."""
  parser = config_lib.parser("Trains one model and evaluates it.")
  parser.add_argument(
    "--workdir", required=True, metavar="DIR", help="the run's folder"
  )
  args, config = config_lib.parse(parser, argv)

  from moe_jax import loop, params

  print(
    "routing and balancing:",
    json.dumps(params.describe(config.model, config.plugins)),
    flush=True,
  )
  found = loop.train_and_evaluate(config, args.workdir)
  for name, value in found.items():
    print(f"{name:32}{value:12.4f}")
  return 0


if __name__ == "__main__":
  config_lib.run(lambda: main(sys.argv[1:]))
