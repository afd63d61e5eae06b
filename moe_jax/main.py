"""Trains one model.

moe-jax train --config=tiny --workdir=runs/tiny

With --dry_run it builds the model and the data, checks them, counts, and stops.
"""

from moe_jax.core.errors import ConfigError
from moe_jax.run import command


def main(argv=None) -> int:
  """Trains a run from a config; raises ConfigError without a work directory."""
  # Imported here, where `command.run` handles signals already.
  from moe_jax.run import config as config_lib

  about = "Trains one model and evaluates it."
  parser = config_lib.parser(about, multihost=True)
  add = parser.add_argument
  add("--workdir", metavar="DIR", help="the run's folder")
  add(
    "--dry_run",
    action="store_true",
    help="check the config and count, then stop; nothing is written but the data's"
    " cache",
  )
  args, config = config_lib.parse(parser, argv)
  if args.dry_run:
    return _dry_run(config)
  if not args.workdir:
    raise ConfigError("--workdir=DIR is missing: the folder of the run")

  from moe_jax.run import processes, summary
  from moe_jax.training import loop, program

  program.check(config)
  processes.join(args.multihost, args.multihost_timeout)
  values = loop.train_and_evaluate(config, args.workdir)
  if processes.is_first():
    print(summary.end(values, args.workdir, config))
  return 0


def _dry_run(config):
  """Does all but compile and train; prints the first words of a run."""
  import jax

  from moe_jax.run import config as config_lib
  from moe_jax.run import provenance, summary
  from moe_jax.training import program, starts, train_step

  mesh, task, model = program.build(config)
  task.train(0, None)  # Refuses too little data.
  task.validation(None)
  if config.init_from is not None:
    starts.read(config.init_from, model, config)
  numbers = train_step.numbers(config, model)
  made = program.functions(config, mesh, task, model, numbers)
  for call in (made.init, made.train_step, made.eval_step):
    call.function.lower(*call.arguments)
  facts = provenance.of_model(config, mesh, task, model, made.sizes)
  facts["devices"] = [device.device_kind for device in jax.devices()]
  print(summary.begin(config, facts, None))
  own = config_lib.differences(config.to_dict(), config_lib.defaults())
  print("\nValues of the config that differ from those of configs/base.py:\n")
  print(*(f"  {key} = {value!r}" for key, value in own.items()), sep="\n")
  return 0


if __name__ == "__main__":
  command.run(main)
