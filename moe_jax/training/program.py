"""The compiled functions of a config, which all its seeds share."""

import functools
import json
import time
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import models
from moe_jax.core import parallel, registry
from moe_jax.core.errors import ConfigError
from moe_jax.core.options import (
  integer,
  items,
  number,
  optional,
  part,
  section,
)
from moe_jax.data import batches
from moe_jax.data.text import mixed
from moe_jax.models import counts
from moe_jax.models.parts import layers
from moe_jax.run import provenance, writers
from moe_jax.training import (
  checkpoint,
  evaluation,
  hooks,
  mesh_check,
  optimizers,
  starts,
  train_step,
)

# Every key of a config, by the code that uses it.
OPTIONS = {
  "seed": integer(0),
  "mesh": parallel.SIZES,
  "writers": writers.NAMES,
  "plugins": items(str),
  **starts.OPTIONS,
  "task": part(),
  "data": section(mixed.OPTIONS | batches.OPTIONS),
  "model": section(models.OPTIONS),
  "optim": section(optimizers.OPTIONS),
  "train": section(
    {
      "num_steps": integer(1),
      "ema": optional(number(above=0, below=1)),
      "accumulation": integer(1),
      "log_every": integer(1),
      "loads_every": integer(0),
      "check_mesh": bool,
      "reduce_experts_once": bool,
      "hooks": hooks.OPTIONS,
      "profile_steps": items(integer(0)),
      "max_skipped_in_a_row": integer(1),
    }
  ),
  "checkpoint": section(checkpoint.OPTIONS),
  "eval": section(
    {
      "every": integer(0),
      "batch_size": integer(1),
      "batches_per_domain": optional(integer(1)),
    }
  ),
}


class Program:
  """Task, model and compiled functions of a config, for any seed.

  Attributes:
    config, mesh, task, model: the parts that it was made of.
    lengths: of the model, see `models.lengths`.
    mesh_check: see `mesh_check.check`; None without a mesh.
    init: rng -> TrainState.
    train_step: (state, batch) -> (state, sums), see `train_step.train_step`.
    eval_step: (params, balance, batch, index) -> sums.
    abstract_state: shapes and shardings of the TrainState.
    sizes: numbers of parameters, see `counts.count`.
    compile_seconds: time that compiling took.
  """

  def __init__(
    self,
    config,
    fingerprint: str | None = None,
    compiled: dict | None = None,
    before=lambda program, facts: None,
  ):
    """Prepares the data, builds the model, compiles the steps.

    Args:
      config: see `configs/base.py`.
      fingerprint: of the data, for a run that goes on; None: any.
      compiled: functions of other programs, which configs that differ only in
        numbers of the optimizer and the balancers share. This program adds its
        own.
      before: called before the steps are compiled, with this and what
        `provenance.of_model` returns.

    Raises:
      ConfigError: impossible values; before anything is compiled.
      RunError: the mesh changes what a layer computes, see `mesh_check`.
    """
    writers.check(config.writers)
    self.config = config
    self.mesh, self.task, self.model = build(config, fingerprint=fingerprint)
    self.lengths = models.lengths(self.model, self.task.lengths)
    self.task.train(0, None)  # Refuses too little data before compiling.
    self.task.validation(None)
    self._micro_batch = config.data.batch_size // config.train.accumulation
    self.mesh_check = None
    if self.mesh is not None and config.train.check_mesh:
      self.mesh_check = mesh_check.check(
        self.model, self.lengths, config.model.dtype, self.mesh
      )
    started = time.monotonic()
    numbers = train_step.numbers(config, self.model)
    key = _structure(config, self.task, numbers)
    made = {} if compiled is None else compiled
    if key not in made:
      made[key] = self._compile(numbers, before)
    self.init, step, self.eval_step, self.abstract_state, self.sizes = made[key]
    numbers = jax.tree.map(self._everywhere, numbers)
    self.train_step = lambda state, batch: step(state, batch, numbers)
    self.compile_seconds = time.monotonic() - started

  def facts(self) -> dict:
    """Returns the facts about it for run.json."""
    of_run = self.config, self.mesh, self.task, self.model, self.sizes
    return provenance.of_model(*of_run) | {
      "mesh_check": self.mesh_check and self.mesh_check._asdict(),
      "compile_seconds": self.compile_seconds,
    }

  def batches(self, seed: int):
    """Returns the training batches of a seed, by step: this process's rows."""
    return self.task.train(seed, self._rows(self._micro_batch))

  def put(self, batch):
    """Returns a training batch on the devices of all processes."""
    return self._put(batch, self._micro_batch, axis=1)

  def evaluate(self, state, stop=lambda: False) -> dict[str, float] | None:
    """Returns all metrics of the validation split; None if `stop()` came true.

    Metrics of the parameters' moving average, where there is one, are ema/NAME.

    Args:
      state: TrainState.
      stop: asked between batches whether to stop.
    """
    values = self._evaluate(state.params, state.balance, stop)
    if values is None or state.ema is None:
      return values
    averaged = self._evaluate(state.ema, state.balance, stop)
    return averaged and values | {f"ema/{k}": x for k, x in averaged.items()}

  def _evaluate(self, params, balance, stop):
    size = self.config.eval.batch_size

    def step(batch, index):
      batch = self._put(batch, size, axis=0)
      return self.eval_step(params, balance, batch, np.int32(index))

    batches = self.task.validation(self._rows(size))
    sums = evaluation.by_domain(step, batches, stop)
    return sums and evaluation.table(sums, self.task, self.model)

  def _rows(self, size):
    return parallel.local_rows(self.mesh, size)

  def _put(self, batch, size, axis):
    return {
      k: parallel.global_batch(batch[k], self.mesh, size, axis)
      for k in self.task.spec
    }

  def _compile(self, numbers, before):
    """Makes the shared (init, train_step, eval_step, abstract_state, sizes)."""
    of_run = self.config, self.mesh, self.task, self.model
    made = functions(*of_run, numbers)
    before(self, provenance.of_model(*of_run, made.sizes))
    calls = made.init, made.train_step, made.eval_step
    lowered = [call.function.lower(*call.arguments) for call in calls]
    return *(one.compile() for one in lowered), made.state, made.sizes

  def _everywhere(self, number):
    """A number of Python on all devices of all processes."""
    # device_put would compare its double precision with the others' numbers.
    x = np.asarray(number, jax.dtypes.canonicalize_dtype(type(number)))
    return jax.make_array_from_callback((), _sharding(self.mesh), lambda _: x)


class Call(NamedTuple):
  """A jitted function, and the shapes and shardings of its arguments."""

  function: Any
  arguments: tuple


class Functions(NamedTuple):
  """The functions of a program before they are compiled.

  init, train_step, eval_step: Call.
  state: shapes and shardings of the TrainState.
  sizes: numbers of parameters, see `counts.count`.
  """

  init: Call
  train_step: Call
  eval_step: Call
  state: train_step.TrainState
  sizes: dict


def functions(config, mesh, task, model, numbers) -> Functions:
  """Returns the functions of a program, for its devices or for described ones.

  Args:
    config: see `configs/base.py`.
    mesh, task, model: from `build`.
    numbers: from `train_step.numbers`.
  """
  parts = train_step.parts(config, model, task)
  init = functools.partial(train_step.init_state, **parts, numbers=numbers)
  rng = jax.eval_shape(lambda: jax.random.key(0))
  boxed = jax.eval_shape(init, rng)
  state = abstract_state(boxed, mesh)
  placed = jax.tree.map(lambda x: x.sharding, state)
  everywhere = _sharding(mesh)
  once = train_step.once(config, mesh)
  collect = hooks.collects(config)
  options = {"once": once, "collect": collect}
  step = jax.jit(
    functools.partial(train_step.train_step, **parts, **options),
    donate_argnums=0,
    out_shardings=(placed, everywhere),
  )
  evaluate = jax.jit(
    functools.partial(evaluation.eval_step, model=model, task=task),
    out_shardings=everywhere,
  )
  accumulation = config.train.accumulation
  micro = accumulation, config.data.batch_size // accumulation
  batch = _batch(task, mesh, (config.eval.batch_size,), axis=0)
  index = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
  variables = {"params": boxed.params, "balance": boxed.balance}
  return Functions(
    Call(
      jax.jit(lambda rng: nn.unbox(init(rng)), out_shardings=placed), (rng,)
    ),
    Call(step, (state, _batch(task, mesh, micro, axis=1), numbers)),
    Call(evaluate, (state.params, state.balance, batch, index)),
    state,
    counts.count(model, variables),
  )


def _batch(task, mesh, leading, axis):
  """Shapes and shardings of a batch whose rows are this axis."""
  sharding = _sharding(mesh, *(None,) * axis, parallel.TOKENS)
  return {
    k: jax.ShapeDtypeStruct((*leading, *x.shape), x.dtype, sharding=sharding)
    for k, x in task.spec.items()
  }


def _sharding(mesh, *axes):
  return jax.NamedSharding(parallel.grid(mesh), jax.P(*axes))


def _structure(config, task, numbers) -> tuple:
  """A key that is equal for configs whose compiled functions are the same."""

  values = config.to_dict()
  values = {k: values[k] for k in ("task", "data", "model", "mesh", "plugins")}
  model = values["model"]
  for layer in (model, *model["variants"].values()):
    balancers = layer.get("moe", {}).get("balancers", {})
    for label, own in balancers.items():
      made = registry.spec("balancers", own, label, plugins=config.plugins)
      numeric = registry.number_options(made)
      options = {k: v for k, v in made.options.items() if k not in numeric}
      balancers[label] = {**options, "name": made.name}
  return (
    json.dumps(values, sort_keys=True),
    optimizers.load(config.optim, config.plugins).direction,
    config.train.accumulation,
    config.train.reduce_experts_once,
    hooks.collects(config),
    config.eval.batch_size,
    task.fingerprint,
    str(jax.tree.map(lambda x: str(jax.typeof(x)), numbers)),
  )


def build(config, devices=None, **options) -> tuple:
  """Returns (mesh or None, task, model) of a config that is checked first.

  Args:
    config: see `check`.
    devices: the devices to build for; None: all of this machine's.
    **options: see `build_task`.
  """
  check(config)
  mesh = parallel.mesh_or_none(config.mesh, devices)
  task = build_task(config, mesh, **options)
  return mesh, task, build_model(config, task, mesh)


def build_task(
  config, mesh=None, fingerprint: str | None = None, prepare: bool = True
):
  """Returns the task of a config.

  Args:
    config, mesh, fingerprint, prepare: as in `next_token.build`.

  Raises:
    ConfigError: there is no such task, or it has other options.
  """
  given = {"mesh": mesh, "fingerprint": fingerprint, "prepare": prepare}
  section, plugins = config.task, config.plugins
  return registry.make("tasks", section, "task", plugins, config, **given)


def build_model(config, task, mesh=None):
  """Returns the model of a config, checked for the batches of its task.

  Args:
    config, task, mesh: see `configs/base.py`, `build_task`, `parallel`.
  """
  model = models.build(
    config.model, mesh=mesh, plugins=config.plugins, **task.given
  )
  micro = config.data.batch_size // config.train.accumulation
  batches = {
    "data.batch_size over train.accumulation": micro,
    "eval.batch_size": config.eval.batch_size,
  }
  lengths = models.lengths(model, task.lengths)
  models.check(model, lengths=lengths, batches=batches, mesh=mesh)
  task.check(model)
  return model


def abstract_state(boxed, mesh):
  """Returns the shapes and shardings of a state.

  Args:
    boxed: shapes, from `train_step.init_state` under `jax.eval_shape`.
    mesh: from `parallel.make_mesh`; None: one device.
  """
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    nn.unbox(boxed),
    train_step.shardings(boxed, parallel.grid(mesh)),
  )


def check(config) -> None:
  """Raises ConfigError for a value that no run takes.

  Parts check their own options when the model is built.
  """
  section(OPTIONS).check(config, "config")
  layers.check(config.model, config.plugins)
  optimizers.numbers(config.optim, config.train.num_steps, config.plugins)
  hooks.check(config)
  starts.check_config(config)
  data, train = config.data, config.train
  if data.batch_size % train.accumulation:
    raise ConfigError(
      f"train.accumulation = {train.accumulation} does not divide"
      f" data.batch_size = {data.batch_size}; change one of them"
    )
  if config.model.dtype == "float64" and not jax.config.jax_enable_x64:
    raise ConfigError(
      "model.dtype = float64 is float32 unless JAX_ENABLE_X64=1 is set"
    )
  profile = tuple(train.profile_steps)
  ends = (*profile, train.num_steps)
  if profile and not (len(ends) == 3 and ends[0] < ends[1] <= ends[2]):
    raise ConfigError(
      f"train.profile_steps = {profile} is not (first step, end)"
      f" within train.num_steps = {train.num_steps}; () turns it off"
    )
