"""What every seed of one config shares: data, model, compiled functions."""

import functools
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import models
from moe_jax.core import parallel
from moe_jax.core.errors import ConfigError
from moe_jax.data import batches, mixture
from moe_jax.run import writers
from moe_jax.training import (
  checkpoint,
  evaluation,
  mesh_check,
  optim,
  train_step,
)


class Program:
  """What every seed of one config shares: data, model, compiled functions."""

  def __init__(self, config, fingerprint: str | None = None):
    """Prepares the data, builds the model, compiles the steps.

    Args:
      config: see `configs/base.py`.
      fingerprint: of the data, where a run goes on that has seen it; None: any.

    Raises:
      ConfigError: impossible values; before anything is compiled.
      RunError: the mesh changes what a layer computes, see `mesh_check`.
    """
    check(config)
    data = config.data
    self.config = config
    self.mesh = parallel.mesh_or_none(config.mesh)
    self.corpus = mixture.prepare(
      data, plugins=config.plugins, fingerprint=fingerprint
    )
    self.model = models.build(
      config.model,
      vocab_size=self.corpus.vocab_size,
      end_of_document=(
        self.corpus.end_of_document if data.separate_documents else None
      ),
      seq_len=data.seq_len,
      batch_sizes=(self._micro_batch, config.eval.batch_size),
      mesh=self.mesh,
      plugins=config.plugins,
    )
    self.optimizer = optim.build(
      config.optim,
      config.train.num_steps,
      [name for name, *_ in self.model.arch.segments],
    )
    self.validation()  # Refuses now, not after training.
    self.mesh_check = None
    if self.mesh is not None and config.train.check_mesh:
      self.mesh_check = mesh_check.check(config, self.mesh)
    self._compile()

  @property
  def mesh_shape(self) -> dict[str, int]:
    """Devices along each axis."""
    return (
      dict(self.mesh.shape) if self.mesh else dict.fromkeys(parallel.AXES, 1)
    )

  def batches(self, seed: int):
    """The training batches of a seed, by step: this process's rows of them."""
    data = self.config.data
    return batches.train_batches(
      self.corpus,
      seq_len=data.seq_len,
      batch_size=data.batch_size,
      seed=seed,
      accumulation=self.config.train.accumulation,
      separate_documents=data.separate_documents,
      rows=parallel.local_rows(self.mesh, self._micro_batch),
    )

  def put(self, batch):
    """A training batch on the devices of all processes."""
    return self._put(batch, self._micro_batch, axis=1)

  def _put(self, batch, size, axis):
    rows = parallel.local_rows(self.mesh, size)
    return {
      k: parallel.global_batch(batch[k], self.mesh, size, rows, axis)
      for k in ("inputs", "targets", "mask")
    }

  @property
  def _micro_batch(self):
    return self.config.data.batch_size // self.config.train.accumulation

  def validation(self):
    """(domain, batch) pairs of the validation split: this process's rows."""
    config = self.config
    return batches.validation_batches(
      self.corpus,
      seq_len=config.data.seq_len,
      batch_size=config.eval.batch_size,
      batches_per_domain=config.eval.batches_per_domain,
      separate_documents=config.data.separate_documents,
      rows=parallel.local_rows(self.mesh, config.eval.batch_size),
    )

  def evaluate(
    self, state: train_step.TrainState, stop=lambda: False
  ) -> dict[str, float] | None:
    """All metrics of the validation split; None if `stop()` came true."""

    def step(batch, index):
      batch = self._put(batch, self.config.eval.batch_size, axis=0)
      return self.eval_step(state.params, state.balance, batch, np.int32(index))

    return evaluation.evaluate(
      step,
      self.validation(),
      stop,
      segments=self.model.arch.segments,
      recipe=self.model.arch.recipe,
    )

  def _compile(self):
    started = time.monotonic()
    config, data = self.config, self.config.data
    shared = dict(model=self.model, optimizer=self.optimizer)
    num_bytes_V = np.asarray(self.corpus.num_bytes_V, np.int32)
    init = functools.partial(
      train_step.init_state,
      **shared,
      seq_len=data.seq_len,
      batch=config.eval.batch_size,
    )
    boxed = jax.eval_shape(init, jax.random.key(0))
    shardings = {}
    if self.mesh is not None:
      state = train_step.shardings(boxed, self.mesh)
      all_of_it = self._sharding()
      micro = self._sharding(None, parallel.TOKENS)
      rows = self._sharding(parallel.TOKENS)
      shardings = {
        "init": dict(out_shardings=state),
        "train": dict(
          in_shardings=(state, micro), out_shardings=(state, all_of_it)
        ),
        "eval": dict(
          in_shardings=(state.params, state.balance, rows, all_of_it),
          out_shardings=all_of_it,
        ),
      }
    rng = jax.random.key(0)
    self.init = jax.jit(
      lambda rng: nn.unbox(init(rng)), **shardings.get("init", {})
    )
    self.init = self.init.lower(rng).compile()
    state = nn.unbox(boxed)
    self.abstract_state = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      state,
      shardings["init"]["out_shardings"]
      if shardings
      else jax.tree.map(
        lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), state
      ),
    )
    train_batch, eval_batch = self._batch_shapes()
    self.train_step = (
      jax.jit(
        functools.partial(
          train_step.train_step, **shared, num_bytes_V=num_bytes_V
        ),
        donate_argnums=0,
        **shardings.get("train", {}),
      )
      .lower(state, train_batch)
      .compile()
    )
    self.eval_step = (
      jax.jit(
        functools.partial(
          evaluation.eval_step, model=self.model, num_bytes_V=num_bytes_V
        ),
        **shardings.get("eval", {}),
      )
      .lower(
        state.params,
        state.balance,
        eval_batch,
        jax.ShapeDtypeStruct((), jnp.int32),
      )
      .compile()
    )
    self.compile_seconds = time.monotonic() - started

  def _batch_shapes(self):
    config = self.config
    accumulation = config.train.accumulation

    def shapes(*leading):
      shape = (*leading, config.data.seq_len)
      integers = jax.ShapeDtypeStruct(shape, jnp.int32)
      return {
        "inputs": integers,
        "targets": integers,
        "mask": jax.ShapeDtypeStruct(shape, jnp.bool_),
      }

    return (
      shapes(accumulation, self._micro_batch),
      shapes(config.eval.batch_size),
    )

  def _sharding(self, *axes):
    return jax.NamedSharding(self.mesh, jax.P(*axes))


def check(config) -> None:
  """Raises ConfigError for numbers that no run takes."""
  data, accumulation = config.data, config.train.accumulation
  for section, key in (
    ("data", "seq_len"),
    ("data", "batch_size"),
    ("eval", "batch_size"),
    ("train", "num_steps"),
    ("train", "log_every"),
    ("train", "max_skipped_in_a_row"),
  ):
    if config[section][key] < 1:
      raise ConfigError(
        f"{section}.{key} = {config[section][key]} is not 1 or more"
      )
  if not 0 <= config.seed < 2**31:  # jax takes 32 bits of it.
    raise ConfigError(f"seed = {config.seed} is not in 0 to {2**31 - 1}")
  if accumulation < 1 or data.batch_size % accumulation:
    raise ConfigError(
      f"train.accumulation = {accumulation} does not divide data.batch_size ="
      f" {data.batch_size}"
    )
  if config.model.dtype == "float64" and not jax.config.jax_enable_x64:
    raise ConfigError(
      "model.dtype = float64 is float32 unless JAX_ENABLE_X64=1 is set"
    )
  for section in ("eval", "checkpoint"):
    if config[section].every < 0:
      raise ConfigError(
        f"{section}.every = {config[section].every} is negative; 0 is at the"
        " end only"
      )
  profile = tuple(config.train.profile_steps)
  if profile and not (
    len(profile) == 2 and 0 <= profile[0] < profile[1] <= config.train.num_steps
  ):
    raise ConfigError(
      f"train.profile_steps = {profile} is not (first step, end) within"
      f" train.num_steps = {config.train.num_steps}; () is no profile"
    )
  writers.check(config.writers)
  checkpoint.check(config.checkpoint.keep_last, config.checkpoint.keep_every)
