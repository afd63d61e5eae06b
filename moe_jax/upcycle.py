"""Makes the start of a model with experts from a dense one, or from fewer experts.

  python -m moe_jax.upcycle --checkpoint=runs/dense --config=CONFIG --out=DIR
  python -m moe_jax.main --config=CONFIG --config.init_from=DIR --workdir=runs/moe

CONFIG is that of the model to make, and has the layers, widths and attention of the
source. What the methods are, and when the function of the source is kept, is in
docs/upcycling.md.
"""

from moe_jax.core import options
from moe_jax.core.errors import ConfigError
from moe_jax.run import command
from moe_jax.run import config as config_lib
from moe_jax.training import trained


def main(argv=None) -> int:
  """The command."""
  args, config = _arguments(argv)

  from moe_jax.training import program, starts
  from moe_jax.training.starts import upcycling

  starts.check_empty(args.out)
  source = trained.load(args)
  if source.config is not None:
    _same_text(source.config, config, args)
  program.check(config)
  task = program.build_task(config, prepare=False)
  model = program.build_model(config, task)
  how = upcycling.Upcycling(
    args.method, args.ratio, args.router_noise, args.seed
  )
  initial = starts.own(task, model, args.seed)
  made = upcycling.upcycled(
    source.model, source.variables["params"], model, initial["params"], how
  )
  kept = upcycling.keeps(source.model, model, how)
  distance = starts.distance(source, model, {**initial, "params": made})
  words = "the function of the source is kept" if kept else "a new function"
  starts.write(args.out, config, {**initial, "params": made})
  print(
    f"{args.out}: {words}; on random tokens its logits differ by up to"
    f" {distance:.1e}"
  )
  return 0


def _same_text(old, new, args):
  if old.data.tokenizer != new.data.tokenizer or old.task != new.task:
    raise ConfigError(
      f"{args.checkpoint} is a run of the task {old.task.name} with the tokenizer"
      f" {old.data.tokenizer}, and the config has {new.task.name} and"
      f" {new.data.tokenizer}; give a config of the same text"
    )


def _arguments(argv):
  parser = config_lib.Parser(__doc__, prog="python -m moe_jax.upcycle")
  add = parser.add_argument
  trained.add_flags(parser)
  words = "of the model to make; --config.SECTION.KEY=VALUE changes it"
  add("--config", required=True, metavar="FILE[:VARIANT]", help=words)
  add("--out", required=True, metavar="DIR", help="folder to make")
  methods = ("copy", "drop", "granular")
  add("--method", choices=methods, default="copy", help="default: copy")
  words = "share of the hidden units that drop begins anew (default: 0.5)"
  add("--ratio", type=float, default=0.5, help=words)
  words = "of copied columns of a router, over their deviation (default: 0)"
  add("--router_noise", type=float, default=0.0, help=words)
  add("--seed", type=int, default=0, help="of the draws (default: 0)")
  args, config = config_lib.parse(parser, argv)

  from moe_jax.training.starts.upcycling import Upcycling

  values = {
    k: getattr(args, k) for k in ("method", "ratio", "router_noise", "seed")
  }
  options.arguments(Upcycling).check(values, "the flags")
  return args, config


if __name__ == "__main__":
  command.run(main)
