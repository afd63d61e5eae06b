"""The parameters that a run starts with, when they are those of another model."""

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
from moe_jax.core import files, parallel
from moe_jax.core.errors import ConfigError
from moe_jax.data.text import tokenizers
from moe_jax.hf import of_config
from moe_jax.run import config as config_lib
from moe_jax.training import checkpoint, trained
from moe_jax.training.starts import fit, upcycling

KEY = "init_from"


def read(path: str, model, config) -> dict | None:
  """{"params", "balance"} of another model, adapted to this one, or None to upcycle.

  Args:
    path: a run's work directory, one of its checkpoints, a folder of
      `moe_jax.upcycle` or published weights, or what `hf.of_config` reads.
    model, config: of the run.

  Raises:
    ConfigError: there are none, or of a model that does not fit; says where.
  """
  check(path)
  if config.upcycle:
    return None
  given = _read(functools.partial(variables, config=config, model=model), path)
  if hasattr(model, "adapted"):
    adapted = functools.partial(model.adapted, given["params"])
    given = {**given, "params": _read(adapted, path)}
  _check_shapes(
    given["params"], nn.unbox(models.variables(model))["params"], path
  )
  return given


def replaced(state, given: Mapping | None, model, config, path: str, seed: int):
  """A new TrainState with parameters of another model.

  Balancers go on from the state that they had there, where both have it; optimizer
  and random key are those of a new run.

  Args:
    state: of step 0.
    given: from `read`; None: they are made by `config.upcycle`.
    model, config: of the run. Without `config.upcycle`, the other model is the same.
    path: as in `read`.
    seed: of the run; added to that of `config.upcycle`.

  Raises:
    ConfigError: as `read`.
  """
  if given is None:
    source = _read(trained.of_folder, path)
    fit.check_text(source, config, path)
    initial = {"params": state.params, "balance": state.balance}
    initial = multihost_utils.process_allgather(initial, tiled=True)
    made = upcycling.Upcycling(**config.upcycle)
    made = made._replace(seed=made.seed + seed)
    args = source.model, source.variables, model, initial, made
    given = upcycling.upcycled(*args)
  _check_shapes(given["params"], state.params, path)
  # Arrays of its own, because a step gives up those of the state.
  ema = state.ema and _placed(given["params"], state.ema)
  params = _placed(given["params"], state.params)
  balance, before = state.balance, given.get("balance", {})
  if _shapes(before) == _shapes(balance):
    balance = _placed(before, balance)
  return state.replace(params=params, balance=balance, ema=ema)


def check(path: str | None) -> None:
  """Raises ConfigError for a path that is no folder; None is no path."""
  if path is None or of_config.exists(path):
    return
  folder = pathlib.Path(path)
  if not folder.is_dir():
    raise ConfigError(
      f"{KEY} = {path} is no folder; give a run's work directory, one of its"
      " checkpoints, a folder of published weights, or the prefix of a checkpoint's"
      " files"
    )
  if not trained.is_published(folder):
    _read(checkpoint.folders_of, folder.absolute())


def variables(path: str, config, model=None) -> dict:
  """{"params", "balance"} of a run or of published weights, in numpy.

  Args:
    path: as in `replaced`.
    config: of the run that begins with them.
    model: of the run, which says where the arrays of `hf.of_config` belong.

  Raises:
    ConfigError: there are none at the path, they cannot be read, or their tokens
      are others.
  """
  if (params := of_config.load(path, model, fits=False)) is not None:
    return {"params": params}
  folder = pathlib.Path(path).absolute()
  if trained.is_published(folder):
    from moe_jax import hf

    model, found = hf.load(folder)
    file = folder / "tokenizer.json"
    known = tokenizers.load(file) if file.exists() else None
    fit.check_published(model.arch, known, config, path)
    fit.tell_differences(hf.section(folder), config, path)
    return jax.device_get(found)
  found = checkpoint.load_variables(folder)
  for place in (folder, *folder.parents[:2]):
    if (place / "config.json").exists():
      what = "the config of a run", "give a whole work directory"
      old = config_lib.complete(files.read_json(place / "config.json", *what))
      fit.check_run(old, config, path)
      fit.tell_differences(old["model"], config, path)
      break
  return found


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
  """The variables that a run of this seed starts with by itself, in numpy."""
  rng, _ = jax.random.split(jax.random.key(seed))  # As in `init_state`.
  made = jax.jit(lambda rng: nn.unbox(models.init(model, rng)))(rng)
  return jax.device_get(dict(made))


def distance(source, model, variables: Mapping, length: int = 32) -> float:
  """The largest difference of two models' logits, on random tokens of the source.

  Only logits of tokens that both know are compared.

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


def _check_shapes(given, wanted, path):
  """Raises ConfigError for parameters of other names or shapes than wanted."""
  there, here = _shapes(given), _shapes(wanted)
  for name in sorted({*there, *here}):
    if there.get(name) != here.get(name):
      raise ConfigError(
        f"{KEY} = {path} is of another model: its parameter {name} is"
        f" {there.get(name, 'not there')}, and this model's"
        f" {here.get(name, 'not there')}; make the sizes equal, or give"
        " other weights (python -m moe_jax.upcycle makes experts of dense ones)"
      )


def _placed(given, like):
  return jax.tree.map(
    lambda x, old: jax.make_array_from_callback(
      old.shape, old.sharding, lambda i: np.asarray(x[i], old.dtype)
    ),
    dict(given),
    dict(like),
  )


def _shapes(tree):
  flat = traverse_util.flatten_dict(dict(tree), sep="/")
  return {name: tuple(x.shape) for name, x in flat.items()}
