"""A model with its weights and its tokenizer: from a run, or published."""

import argparse
import logging
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from moe_jax.core import files, hub
from moe_jax.core.errors import ConfigError
from moe_jax.data.text import tokenizers
from moe_jax.run import config as config_lib


class Trained(NamedTuple):
  """A model with its weights and its tokenizer.

  model, variables: for `model.apply`, on one device or a mesh.
  tokenizer: of its text.
  ends: tokens that end a text, the first of which stands for the end of a
    document.
  config: of the run; None for published weights.
  step: of the run's checkpoint.
  start: tokens that the decoder of an encoder-decoder begins with.
  """

  model: Any
  variables: dict
  tokenizer: tokenizers.Tokenizer
  ends: tuple[int, ...]
  config: Any = None
  step: int = 0
  start: tuple[int, ...] = ()


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags that `load` takes."""
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument(
    "--checkpoint", metavar="DIR", help="a work directory, or one checkpoint"
  )
  words = "folder of config.json, safetensors and tokenizer.json, or ORG/NAME"
  source.add_argument("--hf", metavar="DIR", help=f"{words} on the hub")
  average = "the moving average of a run's parameters (train.ema)"
  parser.add_argument("--ema", action="store_true", help=average)
  parser.add_argument(
    "--dtype",
    choices=("float32", "bfloat16"),
    default="float32",
    help="of --hf; a run has its own",
  )
  add_mesh(parser)
  config_lib.add_trust(parser)


def add_mesh(parser: argparse.ArgumentParser) -> None:
  """Adds the flag --mesh."""
  parser.add_argument(
    "--mesh",
    type=_sizes,
    metavar="DATA,FSDP,EXPERT,TENSOR",
    help="devices along each axis, -1: what is left; default: one device",
  )


def _sizes(text):
  try:
    return tuple(int(size) for size in text.strip("()").split(","))
  except ValueError:
    raise argparse.ArgumentTypeError(
      f"{text!r} is not four whole numbers, such as 1,1,-1,1"
    ) from None


def load(
  args: argparse.Namespace, dropless: bool = True, overrides=()
) -> Trained:
  """Returns the weights that the flags of `add_flags` name.

  Args:
    args: from a parser with these flags. A name on the hub in `args.hf` is
      replaced by its folder.
    dropless: see `of_run`.
    overrides: see `of_run`; none for published weights.

  Raises:
    ConfigError: as in `of_run` and `published`, or an impossible mesh.
  """
  from moe_jax.core import parallel

  mesh = args.mesh and parallel.mesh_or_none(args.mesh)
  if args.checkpoint:
    trust, ema = args.trust_plugins, args.ema
    options = {"trust_plugins": trust, "dropless": dropless, "ema": ema}
    return of_run(args.checkpoint, mesh, overrides=overrides, **options)
  if args.ema:
    raise ConfigError("--ema is of a run: give --checkpoint, or leave it out")
  args.hf = hub.weights(args.hf)
  return published(args.hf, args.dtype, mesh)


def of_run(
  path: str,
  mesh=None,
  *,
  trust_plugins: bool = False,
  dropless: bool = True,
  ema: bool = False,
  overrides: Sequence[str] = (),
) -> Trained:
  """Returns the newest checkpoint of a run, or the one that the path names.

  Args:
    path: a work directory, or WORKDIR/checkpoints/STEP.
    mesh: from `parallel.make_mesh`; None: one device.
    trust_plugins: whether code may be run that the run's config.json names.
    dropless: experts take all their tokens; False: they have the run's capacity
      and groups of tokens.
    ema: the moving average of the parameters in their place.
    overrides: values of the config, as `config_lib.overridden` takes them.

  Raises:
    ConfigError: there is no run, or its task has no text; or its checkpoint
      cannot be read or is of another model; or the model does not divide over
      the mesh; or it has plugins that are not trusted.
  """
  from moe_jax import models
  from moe_jax.training import program

  config = config_of(path, overrides, trust_plugins)
  if not has_text(config):
    raise ConfigError(
      f"{path} is a run of the task {config.task.name}, which has no text; this"
      " command is for models of text"
    )
  task = program.build_task(config, prepare=False)
  section = config.model.to_dict()
  section = models.dropless(section) if dropless else section
  tokenizer = tokenizers.load(config.data.tokenizer)
  # A run trains on text alone: it knows no special token.
  tokenizer = tokenizer._replace(prompt=tokenizer.encode, begin=())
  plugins = config.plugins
  model = models.build(section, mesh=mesh, plugins=plugins, **task.given)
  step, variables = weights(path, model, ema)
  end = tokenizer.end if task.end is None else task.end
  start = end if task.start is None else task.start
  return Trained(model, variables, tokenizer, (end,), config, step, (start,))


def config_of(
  path: str, overrides: Sequence[str] = (), trust_plugins: bool = False
):
  """Returns the config of a run, checked.

  Args:
    path, overrides, trust_plugins: as in `of_run`.

  Raises:
    ConfigError: there is no run, or an impossible value.
  """
  from moe_jax.training import program

  file = str(_run_of(path) / "config.json")
  config = config_lib.load(file, overrides, trust_plugins=trust_plugins)
  program.check(config)
  return config


def facts_of(path: str) -> dict:
  """Returns the run.json of a run, or {}; `path` is as in `of_run`."""
  file = _run_of(path) / "run.json"
  remedy = "bring it back, or remove it"
  return (
    files.read_json(file, "the facts of a run", remedy) if file.exists() else {}
  )


def _run_of(path):
  """The work directory that a path is in."""
  folder = pathlib.Path(path).absolute()
  for one in (folder, *folder.parents[:2]):
    if (one / "config.json").exists():
      return one
  raise ConfigError(
    f"{path} has no config.json of a run; give a run's work directory or a checkpoint"
    " in one"
  )


def is_of_text(config) -> bool:
  """Whether the task of a config has text, or may have some."""
  from moe_jax.core import registry

  module = registry.find("tasks", config.task.name, config.plugins, "task.name")
  return getattr(module, "TEXT", True)


def has_text(config) -> bool:
  """Whether the task of a config has text, and so a vocabulary."""
  from moe_jax.training import program

  if not is_of_text(config):
    return False
  return "vocab_size" in program.build_task(config, prepare=False).given


def weights(path: str, model, ema: bool = False) -> tuple[int, dict]:
  """Returns (step, variables) of a run's checkpoint, for any model.

  Args:
    path, ema: see `of_run`.
    model: from `models.build`.

  Raises:
    ConfigError: no checkpoint can be read, or its parameters are not the
      model's.
  """
  from moe_jax.training import checkpoint

  step, variables = checkpoint.load_step(pathlib.Path(path).absolute(), ema)
  _check_shapes(path, _shapes(variables), model)
  return step, placed(variables, model)


def placed(variables: dict, model) -> dict:
  """Returns variables on the devices of the model's mesh, if it has one.

  Args:
    variables: of the model.
    model: from `models.build`.
  """
  import jax

  from moe_jax import models

  if models.mesh_of(model) is None:
    return variables
  return jax.device_put(variables, models.shardings(model))


def check(path: str, model, ema: bool = False) -> None:
  """Raises ConfigError as `weights` does, but reads no array.

  Args:
    path, model, ema: as in `weights`.
  """
  import orbax.checkpoint as ocp

  from moe_jax.training import checkpoint

  folder = checkpoint.folders_of(pathlib.Path(path).absolute())[0]
  tree = ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree
  params = tree.get("ema" if ema else "params")
  if not params:
    weights(path, model, ema)  # Raises with the reason.
  _check_shapes(path, _shapes({"params": params}), model)


def _shapes(variables):
  from flax import traverse_util

  flat = traverse_util.flatten_dict(dict(variables["params"]), sep="/")
  return {name: tuple(x.shape) for name, x in flat.items()}


def _check_shapes(path, found, model):
  from flax import linen as nn

  from moe_jax import models

  wanted = _shapes(nn.unbox(models.variables(model)))
  names = sorted({*wanted, *found})
  differ = [k for k in names if found.get(k) != wanted.get(k)]
  if differ:
    name = differ[0]
    raise ConfigError(
      f"{len(differ)} of {len(names)} parameters of {path} are not those of the config:"
      f" {name} has the shape {found.get(name, 'of nothing')} there and"
      f" {wanted.get(name, 'of nothing')} here; change nothing that makes other"
      " parameters, and use the version of moe_jax that run.json names"
    )


def is_published(path: pathlib.Path) -> bool:
  """Whether a folder holds published weights, and no run."""
  return any(path.glob("*.safetensors"))


def of_folder(path: str) -> Trained:
  """Returns the weights of a run, or published ones, on one device."""
  one = published if is_published(pathlib.Path(path)) else of_run
  return one(path)


def published(path: str, dtype: str = "float32", mesh=None) -> Trained:
  """Returns published weights: config.json, safetensors and tokenizer.json.

  Args:
    path: the folder. Without a tokenizer.json tokens are bytes.
    dtype: of parameters and activations.
    mesh: as in `of_run`.

  Raises:
    ConfigError: see `hf.load`; or the vocabulary is too small.
  """
  from moe_jax import hf

  folder = pathlib.Path(path)
  model, variables = hf.load(folder, mesh, dtype=dtype)
  source, file = model.arch.source, folder / "tokenizer.json"
  tokenizer = tokenizers.load(file if file.exists() else "bytes")
  if not file.exists():
    logging.warning("%s is not there: tokens are the bytes of the text", file)
  # The tokenizer's own last token is our end of a document.
  if tokenizer.vocab_size - 1 > model.arch.vocab_size:
    raise ConfigError(
      f"the tokenizer of {path} has {tokenizer.vocab_size - 1} tokens, and the"
      f" model {model.arch.vocab_size}; put the model's tokenizer.json beside it"
    )
  start = () if source.start is None else (source.start,)
  return Trained(model, variables, tokenizer, source.ends, start=start)


def with_tokens(config, loaded: Trained):
  """Returns a config with the tokenizer, end and start of published weights.

  Args:
    config: of a task that knows such tokens; it stays unchanged. The tokens
      that its task names take precedence.
    loaded: from `published`.

  Raises:
    ConfigError: the task has no such tokens.
  """
  from moe_jax.core import registry
  from moe_jax.core.options import of

  name = config.task.name
  build = registry.find("tasks", name, config.plugins, "task.name").build
  if not {"end", "start"} <= {*of(build)}:
    raise ConfigError(
      f"task.name = {name} has no end and start, which the published model has; give"
      " a config of a task that has them"
    )
  values, tokens = config.to_dict(), {"end": loaded.ends, "start": loaded.start}
  known = {key: ids[0] for key, ids in tokens.items() if ids}
  values["data"]["tokenizer"] = loaded.tokenizer.name
  values["task"] = known | values["task"]
  return config_lib.locked(values)
