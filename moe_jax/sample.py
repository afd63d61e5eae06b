"""Images or short videos from a diffusion transformer, as PNG or GIF files.

moe-jax sample --checkpoint=RUN --out=samples --number=16 --label=3
"""

import argparse
import math
import pathlib

from moe_jax.core import files
from moe_jax.core.errors import ConfigError
from moe_jax.run import command
from moe_jax.run import config as config_lib
from moe_jax.training import trained


def main(argv=None) -> int:
  """Runs the command; returns the exit code."""
  args, overrides = _arguments(argv)

  import jax
  import jax.numpy as jnp

  from moe_jax import models
  from moe_jax.data.images import written
  from moe_jax.models.generation import conditions, flow

  config, model = _read(args, overrides)
  options = _options(config)
  # Parts fill whole groups of tokens, so there may be more samples than needed.
  parts = -(-args.number // args.batch_size)
  at_once = models.whole_batch(model, -(-args.number // parts))
  number = parts * at_once
  given = {name: getattr(args, name) for name in conditions.Given._fields}
  of_files = conditions.read(conditions.Given(**given), model.arch, number)
  condition, none, more = of_files
  networks = _networks(args, model, options)
  how = flow.Sampling(args.steps, options["shift"], options["predict"])
  shape = number, *model.arch.shape
  noise = jax.random.normal(jax.random.key(args.seed), shape, jnp.float32)
  out, ran = pathlib.Path(args.out), []
  with files.writing(out):  # Tells now, not after minutes.
    out.mkdir(parents=True, exist_ok=True)
  found = flow.sample(
    *(model, networks, noise, condition, how, more, none),
    tell=lambda number, time, name: ran.append((number, time, name)),
    at_once=at_once,
  )
  for name in dict.fromkeys(name for _, _, name in ran):
    steps = [(n, t) for n, t, own in ran if own == name]
    (first, t), (last, _) = steps[0], steps[-1]
    print(f"steps {first} to {last}, from t = {t:.3f} on: the network {name}")
  print(written.write(found[: args.number], out))
  return 0


def _read(args, overrides):
  """(config, model) of the run, or of --config."""
  from moe_jax.core import parallel
  from moe_jax.training import program

  mesh = args.mesh and parallel.mesh_or_none(args.mesh)
  if args.checkpoint:
    config = _of_run(args.checkpoint, overrides, args.trust_plugins)
  else:
    config = config_lib.load(args.config, overrides)
    program.check(config)
  if config.task.name != "denoise":
    raise ConfigError(
      f"the task is {config.task.name}, and samples are of denoise; give a run of it"
    )
  task = program.build_task(config, prepare=False)
  return config, program.build_model(config, task, mesh)


def _of_run(path, overrides, trust):
  """The config of a run with the sizes of the data that it has read."""
  config = trained.config_of(path, overrides, trust)
  if config.task.name != "denoise":
    return config
  own = _options(trained.config_of(path, (), trust))["predict"]
  if _options(config)["predict"] != own:
    raise ConfigError(
      f"task.predict is {own!r} in the run {path}, whose network says nothing else; leave"
      " --config.task.predict out"
    )
  names = {"video_shape": "shape", "text": "text", "num_classes": "num_classes"}
  names["more_channels"] = "more_channels"
  sizes = trained.facts_of(path).get("given", {})
  texts = [f"task.{names[key]}={sizes[key]!r}" for key in names & sizes.keys()]
  return config_lib.overridden(config, texts)


def _options(config):
  """The options of the task, with its defaults."""
  from moe_jax.core import options
  from moe_jax.tasks import denoise

  return options.defaults(denoise.build) | config.task.to_dict()


def _networks(args, model, options):
  """The `flow.Network`s of the flags, from the most noise to the least."""
  from moe_jax.hf.of_config import wan
  from moe_jax.models.generation.flow import Network

  guidance = options["guidance"] if args.guidance is None else args.guidance
  both = guidance if isinstance(guidance, tuple | list) else (guidance,) * 2

  def reader(run, folder):
    if folder:  # Checks it before the steps of another network.
      wan.check(folder, model)
      return lambda: trained.placed({"params": wan.load(folder, model)}, model)
    trained.check(run, model, args.ema)
    return lambda: trained.weights(run, model, args.ema)[1]

  boundary, own = options["boundary"], options["expert"]
  low = args.low or args.wan_low
  if boundary is None:
    if low:
      raise ConfigError(
        f"{low} is a second network, and the config has no task.boundary; leave it out,"
        " or set --config.task.boundary and expert"
      )
    if args.guidance and isinstance(args.guidance, tuple):
      raise ConfigError(
        "--guidance has two numbers, and there is one network; give one number"
      )
    return (Network("all", 0.0, reader(args.checkpoint, args.wan), both[0]),)
  if not low or own == "low":
    lacking = (
      "--low (or --wan_low)" if own != "low" else "of task.expert = high"
    )
    raise ConfigError(
      f"task.boundary = {boundary} parts two networks, and the weights {lacking} are"
      " missing; give --checkpoint (or --wan) for high noise, and --low (or --wan_low) for"
      " low noise"
    )
  if args.low:
    other = _options(trained.config_of(args.low, (), args.trust_plugins))
    wanted = {"boundary": boundary, "expert": "low"}
    wanted["predict"] = options["predict"]
    for key, value in wanted.items():
      if other.get(key) != value:
        raise ConfigError(
          f"--low={args.low} has task.{key} = {other.get(key)!r}, not {value!r}; give the"
          " run of low noise that belongs to the other"
        )
  return (
    Network("high", boundary, reader(args.checkpoint, args.wan), both[0]),
    Network("low", 0.0, reader(args.low, args.wan_low), both[1]),
  )


def _arguments(argv):
  parser = config_lib.Parser(__doc__)
  add, count = parser.add_argument, config_lib.at_least_1
  source = parser.add_mutually_exclusive_group(required=True)
  words = "a work directory, or one checkpoint; of high noise, if there are two"
  source.add_argument("--checkpoint", metavar="DIR", help=words)
  words = (
    "folder of Wan2.2's published weights; of high noise, if there are two"
  )
  source.add_argument("--wan", metavar="DIR", help=words)
  add("--low", metavar="DIR", help="the run of the network for low noise")
  add(
    "--wan_low", metavar="DIR", help="the folder of the network for low noise"
  )
  add(
    "--config",
    metavar="FILE[:VARIANT]",
    help="of --wan, such as configs/wan2_2.py",
  )
  add(
    "--out", metavar="DIR", required=True, help="folder of the files to write"
  )
  add("--number", type=count, default=16, help="of samples (default: 16)")
  words = "samples that are computed at once (default: 64)"
  add("--batch_size", type=count, default=64, help=words)
  add("--steps", type=count, default=40, help="of the sampler (default: 40)")
  add("--seed", type=_seed, default=0, help="of the noise (default: 0)")
  words = "classes of the samples, such as 3 or 0,1,2 (default: each in turn)"
  add("--label", type=_labels, metavar="N,N,...", help=words)
  words = "vectors of texts that the model's encoder has made"
  add("--text", metavar="FILE.npy", help=words)
  words = "their masks, False for vectors of padding (default: none are)"
  add("--text_mask", metavar="FILE.npy", help=words)
  words = "vectors of the text that guidance leads away from (default: zeros)"
  add("--text_none", metavar="FILE.npy", help=words)
  add("--text_none_mask", metavar="FILE.npy", help="their masks")
  words = "channels that the model reads beside, such as those of a first frame"
  add("--more", metavar="FILE.npy", help=words)
  words = "one number, or HIGH,LOW (default: that of the config)"
  add("--guidance", type=_guidance, metavar="G", help=words)
  average = "the moving average of a run's parameters (train.ema)"
  add("--ema", action="store_true", help=average)
  trained.add_mesh(parser)
  config_lib.add_trust(parser)
  args, overrides = config_lib.parse_overrides(parser, argv)
  if bool(args.wan) != bool(args.config):
    raise ConfigError(
      "--wan and --config belong together; give both, or --checkpoint"
    )
  if args.low and args.wan_low:
    raise ConfigError(
      "--low and --wan_low are of one network; give one of them"
    )
  return args, overrides


def _labels(text):
  return tuple(config_lib.at_least_0(one) for one in text.split(","))


def _seed(text):
  seed = config_lib.at_least_0(text)
  if seed >= 2**63:
    raise argparse.ArgumentTypeError(f"{text} is not below 2^63")
  return seed


def _guidance(text):
  numbers = tuple(float(one) for one in text.split(","))
  if len(numbers) > 2:
    raise argparse.ArgumentTypeError(f"{text} has more than two numbers")
  if not all(0 <= one < math.inf for one in numbers):
    raise argparse.ArgumentTypeError(f"{text} has no finite numbers from 0 on")
  return numbers if len(numbers) == 2 else numbers[0]


if __name__ == "__main__":
  command.run(main)
