"""Total and active parameters of any config, without allocating any.

moe-jax params --config=configs/base.py
"""

from moe_jax.run import command
from moe_jax.run import config as config_lib

BYTES = {"f32": 4, "bf16": 2, "f16": 2, "f8": 1}


def main(argv=None) -> int:
  """Runs the command: a table on stdout, JSON to a file."""
  parser = config_lib.parser("Counts the parameters of a config.")
  add = parser.add_argument
  add("--json", metavar="PATH", help="also write JSON there")
  add("--bytes", choices=BYTES, default="bf16", help="for the sizes in bytes")
  add("--vocab_size", type=int, help="V, if the config has none (257: bytes)")
  args, config = config_lib.parse(parser, argv)

  from moe_jax import models
  from moe_jax.models import counts
  from moe_jax.training import program

  if args.vocab_size is not None:
    config.model.vocab_size = args.vocab_size
  program.check(config)
  task = program.build_task(config, prepare=False)
  model = program.build_model(config, task)
  variables = models.variables(model)
  sizes = counts.count(model, variables)
  width = BYTES[args.bytes]
  lengths = models.lengths(model, task.lengths)
  flops = counts.train_flops_per_token(model, sizes, lengths)
  sizes["train_flops_per_token"] = flops
  sizes[f"weights_bytes_{args.bytes}"] = sizes["total"] * width
  if hasattr(model, "arch"):  # A decoder keeps earlier tokens' keys and values.
    cache = counts.kv_cache_per_token(model) * width
    sizes[f"kv_cache_bytes_per_token_{args.bytes}"] = cache
  for name, value in sizes.items():
    print(f"{name:36}{value:>24,}")
  if args.json:
    command.write_json(args.json, sizes)
  return 0


if __name__ == "__main__":
  command.run(main)
