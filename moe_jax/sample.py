"""Images or short videos from a diffusion transformer, as PNG or GIF files.

python -m moe_jax.sample --checkpoint=RUN --out=samples --number=16 --label=3
"""

import argparse
import pathlib

from moe_jax.core import files
from moe_jax.core.errors import ConfigError
from moe_jax.run import command
from moe_jax.run import config as config_lib
from moe_jax.training import trained


def main(argv=None) -> int:
  """The command."""
  args, overrides = _arguments(argv)

  import jax
  import jax.numpy as jnp

  from moe_jax import models
  from moe_jax.models.generation import flow

  config, model = _read(args, overrides)
  options = _options(config)
  # Parts are of whole groups of tokens, and may be of more samples than are asked for.
  parts = -(-args.number // args.batch_size)
  at_once = models.whole_batch(model, -(-args.number // parts))
  number = parts * at_once
  condition, none, more = _condition(args, model.arch, number)
  networks = _networks(args, model, options)
  how = flow.Sampling(args.steps, options["shift"], options["predict"])
  shape = number, *model.arch.shape
  noise = jax.random.normal(jax.random.key(args.seed), shape, jnp.float32)
  out, ran = pathlib.Path(args.out), []
  with files.writing(out):  # Not after minutes.
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
  _write(found[: args.number], out)
  return 0


def _read(args, overrides):
  """(config, model) of the run, or of --config."""
  from moe_jax.core import parallel
  from moe_jax.training import program

  mesh = args.mesh and parallel.mesh_or_none(args.mesh)
  if args.checkpoint:
    config = trained.config_of(args.checkpoint, overrides, args.trust_plugins)
  else:
    config = config_lib.load(args.config, overrides)
    program.check(config)
  if config.task.name != "denoise":
    raise ConfigError(
      f"the task is {config.task.name}, and samples are of denoise; give a run of it"
    )
  # Sizes of the data are those that the run has read.
  prepare = bool(args.checkpoint) and config.task.get("shape") is None
  task = program.build_task(config, prepare=prepare)
  return config, program.build_model(config, task, mesh)


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
    if folder:  # It is checked before the steps of another network.
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
    return (Network("all", 0.0, reader(args.checkpoint, args.wan), both[0]),)
  if not low or own == "low":
    lacking = (
      "--low (or --wan_low)" if own != "low" else "of task.expert = high"
    )
    raise ConfigError(
      f"task.boundary = {boundary} parts two networks, and the weights {lacking} are"
      " missing; give --checkpoint=RUN for high noise and --low=RUN for low noise"
    )
  if args.low:
    other = trained.config_of(args.low, (), args.trust_plugins).task
    if (other.get("boundary"), other.get("expert")) != (boundary, "low"):
      raise ConfigError(
        f"--low={args.low} has task.boundary = {other.get('boundary')} and task.expert"
        f" = {other.get('expert')!r}, not {boundary} and 'low'; give the run of low noise"
      )
  return (
    Network("high", boundary, reader(args.checkpoint, args.wan), both[0]),
    Network("low", 0.0, reader(args.low, args.wan_low), both[1]),
  )


def _condition(args, arch, number):
  """(Condition, what guidance leads away from or None, more channels) of the flags."""
  import numpy as np

  from moe_jax.models.diffusion import Condition

  label = text = mask = none = more = None
  _refuse(args, ("label",), arch.num_classes, "classes")
  _refuse(args, ("text", "text_mask", "text_none"), arch.text, "texts")
  _refuse(args, ("more",), arch.more_channels, "channels beside")
  if arch.num_classes:
    labels = args.label or range(arch.num_classes)
    for one in labels:
      if one >= arch.num_classes:
        raise ConfigError(
          f"--label={one} is not below the {arch.num_classes} classes of the run"
        )
    label = np.resize(np.array([*labels], np.int32), number)
  if arch.text:
    text = _array("--text", args.text, arch.text, number)
    if args.text_mask:
      shape = arch.text[:1]
      mask = _array("--text_mask", args.text_mask, shape, number) != 0
    if args.text_none:
      away = _array("--text_none", args.text_none, arch.text, number)
      none = Condition(label, text, mask).none._replace(text_BMT=away)
  if arch.more_channels:
    shape = (*arch.shape[:3], arch.more_channels)
    more = _array("--more", args.more, shape, number)
  return Condition(label, text, mask), none, more


def _refuse(args, names, there, what):
  """Raises ConfigError for flags of what a model does not read."""
  for name in names:
    if getattr(args, name) is not None and not there:
      raise ConfigError(
        f"--{name} is of {what}, and this model has none; leave it out"
      )


def _array(flag, path, shape, number):
  """The array of a file, repeated as often as there are samples."""
  import numpy as np

  from moe_jax.data.images import videos

  if path is None:
    raise ConfigError(
      f"the model needs {flag}=FILE.npy with an array [..., {', '.join(map(str, shape))}]"
    )
  try:
    array = np.load(path, allow_pickle=False)
  except (OSError, ValueError, EOFError) as e:
    raise ConfigError(
      f"{flag}={path} cannot be read ({e}); write it with numpy.save"
    ) from e
  if not isinstance(array, np.ndarray):
    raise ConfigError(
      f"{flag}={path} has several arrays; write one with numpy.save"
    )
  if array.shape[-len(shape) :] != tuple(shape):
    raise ConfigError(
      f"{flag}={path} has the shape {array.shape}, and the model needs"
      f" [..., {', '.join(map(str, shape))}]"
    )
  array = np.asarray(videos.numbers(array.reshape(-1, *shape)))
  return np.resize(array, (number, *shape))


def _write(found, folder):
  """One PNG of all images, a GIF of each video, or latents as an array."""
  import numpy as np

  number, frames, *_, channels = found.shape
  if channels not in (1, 3):
    np.save(folder / "latents.npy", found)
    print(
      f"The latents are in {folder}/latents.npy, for the decoder of their VAE."
    )
    return
  pixels = np.clip((found + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)
  if frames == 1:
    _save(_sheet(pixels[:, 0]), folder / "samples.png")
    print(f"The images are in {folder}/samples.png.")
    return
  for i, video in enumerate(pixels):
    _save(video, folder / f"{i:03}.gif")
  print(f"The videos are in {folder}/000.gif to {number - 1:03}.gif.")


def _sheet(pixels):
  """All images [N, H, W, C] as one, in rows."""
  import numpy as np

  columns = int(np.ceil(len(pixels) ** 0.5))
  rows = -(-len(pixels) // columns)
  room = np.zeros((rows * columns, *pixels.shape[1:]), np.uint8)
  room[: len(pixels)] = pixels
  _, height, width, channels = room.shape
  sheet = room.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
  return sheet.reshape(1, rows * height, columns * width, channels)


def _save(frames, path):
  """Frames [F, H, W, C] as a file."""
  from PIL import Image

  frames = frames[..., 0] if frames.shape[-1] == 1 else frames
  first, *others = map(Image.fromarray, frames)
  if others:
    more = {
      "save_all": True,
      "append_images": others,
      "duration": 125,
      "loop": 0,
    }
    first.save(path, **more)
  else:
    first.save(path)


def _arguments(argv):
  parser = config_lib.Parser(__doc__, prog="python -m moe_jax.sample")
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
  add("--seed", type=int, default=0, help="of the noise (default: 0)")
  words = "classes of the samples, such as 3 or 0,1,2 (default: each in turn)"
  add("--label", type=_labels, metavar="N,N,...", help=words)
  words = "vectors of texts that the model's encoder has made"
  add("--text", metavar="FILE.npy", help=words)
  words = "their masks, False for vectors of padding (default: none are)"
  add("--text_mask", metavar="FILE.npy", help=words)
  words = "vectors of the text that guidance leads away from (default: zeros)"
  add("--text_none", metavar="FILE.npy", help=words)
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


def _guidance(text):
  numbers = tuple(float(one) for one in text.split(","))
  if len(numbers) > 2:
    raise argparse.ArgumentTypeError(f"{text} has more than two numbers")
  return numbers if len(numbers) == 2 else numbers[0]


if __name__ == "__main__":
  command.run(main)
