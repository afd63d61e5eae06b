"""Makes the start of a model with experts from a dense one, or from fewer experts.

  moe-jax upcycle --checkpoint=runs/dense --config=CONFIG --out=DIR
  moe-jax train --config=CONFIG --config.init_from=DIR --workdir=runs/moe

CONFIG describes the new model. It has the layers, widths and attention of the
source, or gets them with --like_source. docs/upcycling.md explains the methods,
and when the new model computes the same function as the source.
"""

from moe_jax.core import files, options
from moe_jax.run import command
from moe_jax.run import config as config_lib
from moe_jax.training import trained


def main(argv=None) -> int:
  """Runs the command; returns the exit code."""
  args, overrides = _arguments(argv)

  from moe_jax import models
  from moe_jax.training import program, starts
  from moe_jax.training.starts import fit, upcycling

  files.check_empty(args.out)
  config = config_lib.load(
    args.config,
    () if args.like_source else overrides,
    trust_plugins=args.trust_plugins,
  )
  source = trained.load(args)
  if args.like_source:
    config = config_lib.overridden(_like(config, source, args.hf), overrides)
    if args.hf and len(source.model.arch.stacks) > 1:
      config = trained.with_tokens(config, source)
  fit.check_text(source, config, args.hf or args.checkpoint)
  program.check(config)
  task = program.build_task(config, prepare=False)
  model = program.build_model(config, task)
  how = upcycling.Upcycling(
    args.method, args.ratio, args.router_noise, args.seed
  )
  fit.check(source.model, model, how)  # Before anything is computed.
  initial = starts.own(task, model, args.seed)
  made = upcycling.upcycled(source.model, source.variables, model, initial, how)
  why = fit.changes(source.model, model, how)
  section, given = models.dropless(config.model.to_dict()), task.given
  dropless = models.build(section, plugins=config.plugins, **given)
  distance = starts.distance(source, dropless, made)
  words = (
    f"a new function: {why}" if why else "the function of the source is kept"
  )
  starts.write(args.out, config, made)
  print(
    f"{args.out}: {words}. On random tokens its logits differ by up to"
    f" {distance:.1e} where experts take all of their tokens."
  )
  return 0


def _like(config, source, hf_path):
  """A config with the layers and widths of the source, and its own routing."""
  from moe_jax import hf

  old = hf.section(hf_path) if hf_path else source.config.model.to_dict()
  values = config.to_dict()
  new = values["model"]
  made = old | {"moe": _routed(old, new)}
  if len(source.model.arch.stacks) > 1:
    routed = _routed(_of_encoder(old), _of_encoder(new))
    # All other keys are the decoder's, which flags may have changed.
    own = {k: x for k, x in routed.items() if x != made["moe"][k]}
    made["encoder"] = old["encoder"] | {"moe": own}
  if not source.model.sublayers:
    made["encoder"] = _sparse(made["encoder"])
    made = _sparse(made)
  kept = ["dtype", "remat", "allow_noncausal"]
  kept += [key for key in new if "dropout" in key]
  if hf_path:
    values["data"]["tokenizer"] = source.tokenizer.name
  values["model"] = new | made | {key: new[key] for key in kept}
  return config_lib.locked(values)


def _of_encoder(section):
  """A section `model` with the encoder's keys in the place of the decoder's."""
  own = dict(section["encoder"])
  own["moe"] = {**section["moe"], **own.get("moe", {})}
  return section | own


def _routed(old, new):
  """A section `moe`: the networks of the source, routed as in the config."""
  moe, before = dict(new["moe"]), old["moe"]
  if any("moe" in kind for kind in (*old["prefix"], *old["pattern"])):
    names = ("d_expert", "activation", "use_bias")
    return moe | {name: before[name] for name in names}
  own = {"d_expert": "d_ff", "activation": "activation", "use_bias": "use_bias"}
  return moe | {name: old[key] for name, key in own.items()}


def _sparse(part):
  """A section `model` or `encoder` with experts in every layer that it names."""
  changed = {
    key: tuple(kind.replace("dense", "moe") for kind in part[key])
    for key in ("prefix", "pattern")
    if key in part
  }
  if "d_ff" in part:
    changed["moe"] = part["moe"] | {"d_expert": part["d_ff"]}
  return part | changed


def _arguments(argv):
  parser = config_lib.Parser(__doc__)
  add = parser.add_argument
  trained.add_flags(parser)
  words = "of the model to make; --config.SECTION.KEY=VALUE changes it"
  add("--config", required=True, metavar="FILE[:VARIANT]", help=words)
  add("--out", required=True, metavar="DIR", help="folder to make")
  words = (
    "take layers and widths of the source; CONFIG has the rest, and routing"
  )
  add("--like_source", action="store_true", help=words)
  methods = ("copy", "drop", "granular")
  add("--method", choices=methods, default="copy", help="default: copy")
  words = "share of the hidden units that drop begins anew (default: 0.5)"
  add("--ratio", type=float, help=words)
  words = "of copied columns of a router, over their deviation (default: 0)"
  add("--router_noise", type=float, default=0.0, help=words)
  add("--seed", type=int, default=0, help="of the draws (default: 0)")
  args, overrides = config_lib.parse_overrides(parser, argv)

  from moe_jax.training.starts.upcycling import Upcycling

  values = {
    k: getattr(args, k) for k in ("method", "ratio", "router_noise", "seed")
  }
  for name, option in options.of(Upcycling).items():
    option.check(values[name], f"--{name}")
  return args, overrides


if __name__ == "__main__":
  command.run(main)
