"""The parameters that a run starts with, when they come from another model."""

import functools
import json
import pathlib
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils

from moe_jax import models
from moe_jax.core import files, hub, parallel
from moe_jax.core.errors import ConfigError
from moe_jax.core.options import of, section
from moe_jax.data.text import tokenizers
from moe_jax.hf import of_config
from moe_jax.run import config as config_lib
from moe_jax.training import checkpoint, trained
from moe_jax.training.starts import fit, parts, upcycling

KEY = "init_from"
OPTIONS = {
  KEY: str | None,
  parts.NEW: parts.OPTION,
  "upcycle": section(of(upcycling.Upcycling), required=()),
}


def check_config(config) -> None:
  """Raises ConfigError for options of other weights where there are none."""
  if config.init_from is not None:
    return
  for name in (parts.NEW, "upcycle"):
    if value := config.to_dict()[name]:
      raise ConfigError(
        f"{name} = {value} has no weights to begin with; set {KEY} to those of"
        f" another model, or leave {name} empty"
      )


def read(path: str, model, config) -> dict | None:
  """Returns {"params", "balance"} of another model; None if it is upcycled.

  Args:
    path: a run's work directory, one of its checkpoints, a folder of
      `moe_jax.upcycle` or published weights, a name on the Hugging Face hub, or
      a source of `hf.of_config`.
    model, config: of the run. Parameters of `config.init_new` are not taken.

  Raises:
    ConfigError: there are no such weights, or those of a model that does not
      fit; the message says where.
  """
  check(path)
  if config.upcycle:
    return None
  source = functools.partial(_source, config=config, model=model)
  given, parts_there = _read(source, path)
  if hasattr(model, "adapted"):
    adapted = functools.partial(model.adapted, given["params"])
    given = {**given, "params": _read(adapted, path)}
  of_model = model, config.init_new, path, parts_there
  return {**given, "params": parts.taken(given["params"], *of_model)}


def replaced(state, given: Mapping | None, model, config, path: str, seed: int):
  """Returns a new TrainState with parameters of another model.

  Balancers go on from the state that they had there, where both have it and the
  router is not new; optimizer and random key are those of a new run.

  Args:
    state: of step 0.
    given: from `read`; None: they are made by `config.upcycle`.
    model, config: of the run. Without `config.upcycle`, the other model is the
      same.
    path: as in `read`.
    seed: of the run; added to that of `config.upcycle`.

  Raises:
    ConfigError: as in `read`.
  """
  if given is None:
    source = _read(lambda path: trained.of_folder(place(path)), path)
    fit.check_text(source, config, path)
    initial = {"params": state.params, "balance": state.balance}
    initial = multihost_utils.process_allgather(initial, tiled=True)
    made = upcycling.Upcycling(**config.upcycle)
    made = made._replace(seed=made.seed + seed)
    args = source.model, source.variables, model, initial, made
    given = upcycling.upcycled(*args)
    made = given["params"], model, config.init_new, path, dict
    given = {**given, "params": parts.taken(*made)}
  # The average has arrays of its own: a step donates those of the state.
  ema = state.ema and _placed(given["params"], state.ema)
  params = _placed(given["params"], state.params)
  balance, before = state.balance, given.get("balance", {})
  before = {} if "router" in config.init_new else before
  if _shapes(before) == _shapes(balance):
    balance = _placed(before, balance)
  return state.replace(params=params, balance=balance, ema=ema)


def check(path: str | None) -> None:
  """Raises ConfigError for a path that has no weights; None is no path.

  Weights of a name on the hub are downloaded when it returns.
  """
  if path is None or of_config.exists(path):
    return
  folder = pathlib.Path(_read(place, path))
  if not folder.is_dir():
    raise ConfigError(
      f"{KEY} = {path} is no folder; give a run's work directory, one of its"
      " checkpoints, a folder of published weights, the prefix of a checkpoint's"
      " files, or hf:ORG/NAME for a model on the Hugging Face hub"
    )
  if not trained.is_published(folder):
    _read(checkpoint.folders_of, folder.absolute())


def place(path: str) -> str:
  """Returns the path; a name on the hub becomes the folder of its snapshot."""
  return path if pathlib.Path(path).exists() else hub.weights(path)


def variables(path: str, config, model=None) -> dict:
  """Returns {"params", "balance"} of a run or of published weights, in numpy.

  Args:
    path: as in `read`.
    config: of the run that begins with them.
    model: of the run, which says where the arrays of `hf.of_config` belong.

  Raises:
    ConfigError: there are none at the path, they cannot be read, or their
      tokens are others.
  """
  return _source(path, config, model)[0]


def _source(path, config, model):
  """(`variables`, () -> {parameter: its part} of their model, or {})."""
  if (params := of_config.load(place(path), model, fits=False)) is not None:
    return {"params": params}, dict
  folder = pathlib.Path(place(path)).absolute()
  if trained.is_published(folder):
    from moe_jax import hf

    model, found = hf.load(folder)
    file = folder / "tokenizer.json"
    known = tokenizers.load(file) if file.exists() else None
    fit.check_published(model.arch, known, config, path)
    fit.tell_differences(hf.section(folder), config, path)
    return jax.device_get(found), functools.partial(parts.of, model)
  found = checkpoint.load_variables(folder)
  for run in (folder, *folder.parents[:2]):
    if (file := run / "config.json").exists():
      what = "the config of a run", "give a whole work directory"
      old = config_lib.complete(files.read_json(file, *what))
      fit.check_run(old, config, path)
      fit.tell_differences(old["model"], config, path)
      of_run = parts.of_run, str(file), config.plugins
      return found, functools.partial(*of_run)
  return found, dict


def write(path: str, config, variables: Mapping) -> None:
  """Writes a folder that `init_from`, generate and evaluate take.

  It appears as a whole or not at all.

  Args:
    path: folder to make; not there yet, or empty.
    config: of the model.
    variables: of the model.

  Raises:
    ConfigError: the folder is not empty.
  """
  with files.whole_folder(path) as whole:
    text = json.dumps(config.to_dict(), indent=2)
    files.write_text(whole / "config.json", f"{text}\n")
    checkpoints = checkpoint.Checkpoints(whole / "checkpoints")
    arrays = {k: x for k, x in variables.items() if x}
    checkpoints.save(0, jax.tree.map(jnp.asarray, arrays), {})
    checkpoints.close()


def own(task, model, seed: int) -> dict:
  """Returns the variables that a run starts with by itself, in numpy.

  Args:
    task, model: of the run.
    seed: of the run.
  """
  rng, _ = jax.random.split(jax.random.key(seed))  # Split as in `init_state`.
  made = jax.jit(lambda rng: nn.unbox(models.init(model, rng)))(rng)
  return jax.device_get(dict(made))


def distance(source, model, variables: Mapping, length: int = 32) -> float:
  """Returns the largest difference of two models' logits, on random tokens.

  Tokens are those of the source, and only logits of tokens that both models
  have are compared.

  Args:
    source: a `trained.Trained`.
    model, variables: the other model.
    length: tokens of a row.
  """
  rows = parallel.token_shards(source.model.arch.mesh)
  shape = rows, length
  token_BL = np.random.default_rng(0).integers(
    0, source.model.arch.vocab_size, shape
  )
  pairs = (source.model, source.variables), (model, variables)
  logits = [
    jax.jit(one.apply)(weights, *one.arguments(token_BL.astype(np.int32)))[0]
    for one, weights in pairs
  ]
  most = logits[0].shape[-1]
  return float(jnp.abs(logits[0] - logits[1][..., :most]).max())


def _read(load, path):
  try:
    return load(path)
  except ConfigError as e:
    raise ConfigError(f"{KEY} = {path}: {e}") from e


def _placed(given, like):
  """A tree like another one, with the given numbers where there are any."""
  flat = traverse_util.flatten_dict(dict(given))

  def one(path, old):
    x = flat.get(tuple(part.key for part in path))
    if x is None:
      return old
    return jax.make_array_from_callback(
      old.shape, old.sharding, lambda i: np.asarray(x[i], old.dtype)
    )

  return jax.tree.map_with_path(one, dict(like))


def _shapes(tree):
  flat = traverse_util.flatten_dict(dict(tree), sep="/")
  return {name: tuple(x.shape) for name, x in flat.items()}
