"""The train state, the pure train step, and the loop."""

import functools
import time

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax import (
  batches,
  evaluate,
  grouped_matmul,
  losses,
  metrics,
  models,
  optim,
  parallel,
  params,
  run_directory,
  tokens,
)
from moe_jax.errors import ConfigError
from moe_jax.models import moe
from moe_jax.progress import Progress
from moe_jax.types import Array, Mean


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes.

  step: int32, optimizer steps done.
  rng: the key that all noise is drawn from.
  balance: the balancers' state, {segment: {position: {"moe": ...}}}.
  """

  step: Array
  rng: Array
  params: dict
  balance: dict
  opt_state: optax.OptState


def init_state(rng: Array, *, model, optimizer, seq_len: int, batch: int):
  """A new TrainState, parameters boxed with their logical axes."""
  tokens_BL = jnp.zeros((batch, seq_len), jnp.int32)
  init_rng, rng = jax.random.split(rng)
  variables = model.init(init_rng, tokens_BL)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    rng=rng,
    params=variables["params"],
    balance=variables.get("balance", {}),
    opt_state=optimizer.init(variables["params"]),
  )


def train_step(state: TrainState, batch, *, model, optimizer):
  """One optimizer step over all micro-batches.

  The loss is the sum over micro-batches divided once by the step's tokens;
  the balance losses are averaged over micro-batches; balancers are updated
  once from the counts of the whole step.

  Args:
    state: before the step.
    batch: inputs, targets, mask [A, B/A, L], A micro-batches.
    model: from `models.build`.
    optimizer: from `optim.build`.

  Returns:
    The new state, and {"loss": Mean, "bytes", "stats", "balance", "aux_loss",
    "grad_norm"}, sums over the step.
  """
  arch = model.arch
  accumulation, batch_size, length = batch["inputs"].shape
  step_tokens = batch["mask"].sum()
  step_rng = jax.random.fold_in(state.rng, state.step)

  def objective(params, micro, index, so_far):
    rng_G = None
    if arch.grouping is not None:
      first = index * batch_size
      rng_G = moe.keys(step_rng, batch_size, length, arch.grouping, first)
    logits_BLV, aux = model.apply(
      {"params": params, "balance": state.balance},
      micro["inputs"],
      micro["mask"],
      rng_G,
      train=True,
    )
    loss = losses.cross_entropy(logits_BLV, micro["targets"], micro["mask"])
    stats = {
      segment: {i: entry["stats"] for i, entry in positions.items()}
      for segment, positions in aux.items()
    }
    balance = losses.balance(arch.recipe, state.balance, stats, so_far)
    balance /= accumulation
    sums = {
      "loss": loss,
      "bytes": metrics.byte_tokens(micro["targets"], micro["mask"]),
      "stats": evaluate.statistics(aux),
      "aux_loss": balance,
    }
    return loss.total / step_tokens + balance, sums

  gradient = jax.grad(objective, has_aux=True)

  def micro_step(carry, micro):
    grads, sums = carry
    index, micro = micro
    so_far = _counts(sums["stats"])
    new_grads, new_sums = gradient(state.params, micro, index, so_far)
    return jax.tree.map(jnp.add, (grads, sums), (new_grads, new_sums)), None

  zeros = _zeros_like_first(gradient, state, batch, model)
  (grads, sums), _ = jax.lax.scan(
    micro_step, zeros, (jnp.arange(accumulation), batch)
  )
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  state = state.replace(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    opt_state=opt_state,
    balance=losses.update(
      arch.recipe, state.balance, sums["stats"], state.step
    ),
  )
  sums["grad_norm"] = optax.tree.norm(grads)
  sums["balance"] = state.balance
  return state, sums


def _counts(stats):
  """count_E [R, E] of every MoE layer out of summed Stats."""
  is_stats = lambda x: hasattr(x, "count_E")  # noqa: E731
  return jax.tree.map(lambda s: s.count_E.sum((1, 2)), stats, is_leaf=is_stats)


def _zeros_like_first(gradient, state, batch, model):
  """Zeros with the shapes of (gradients, sums): where the scan begins."""
  micro = jax.tree.map(lambda x: x[0], batch)
  num_experts = model.arch.recipe.num_experts if model.arch.recipe else 0
  so_far = {
    segment: {
      str(i): jnp.zeros((repeats, num_experts), jnp.int32)
      for i, kind in enumerate(pattern)
      if kind == "moe"
    }
    for segment, pattern, repeats, _ in model.arch.segments
  }
  shapes = jax.eval_shape(gradient, state.params, micro, 0, so_far)
  return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


class Program:
  """What every seed of one config shares: data, model, compiled functions."""

  def __init__(self, config):
    """Prepares the data, builds the model, compiles the steps.

    Raises:
      ConfigError: impossible values; before anything is compiled.
    """
    data, accumulation = config.data, config.train.accumulation
    if accumulation < 1 or data.batch_size % accumulation:
      raise ConfigError(
        f"train.accumulation = {accumulation} does not divide data.batch_size ="
        f" {data.batch_size}"
      )
    for key in ("num_steps", "log_every"):
      if config.train[key] < 1:
        raise ConfigError(f"train.{key} is at least 1, not {config.train[key]}")
    if config.eval.every < 0:
      raise ConfigError(
        f"eval.every = {config.eval.every} is negative; 0 evaluates at the end"
      )
    self.config = config
    self.mesh = parallel.mesh_or_none(config.mesh)
    self.corpus = tokens.prepare(
      data.name,
      data_dir=data.dir,
      cache_dir=data.cache_dir,
      plugins=config.plugins,
    )
    self.model = models.build(
      config.model,
      vocab_size=self.corpus.vocab_size,
      seq_len=data.seq_len,
      batch_sizes=(data.batch_size // accumulation, config.eval.batch_size),
      mesh=self.mesh,
      plugins=config.plugins,
    )
    self.optimizer = optim.build(config.optim, config.train.num_steps)
    self.validation()  # Refuses now, not after training.
    self._compile()

  @property
  def mesh_shape(self) -> dict[str, int]:
    """Devices along each axis."""
    return (
      dict(self.mesh.shape) if self.mesh else dict.fromkeys(parallel.AXES, 1)
    )

  def batches(self, seed: int):
    """The training batches of a seed, by step."""
    data = self.config.data
    return batches.train_batches(
      self.corpus,
      seq_len=data.seq_len,
      batch_size=data.batch_size,
      seed=seed,
      accumulation=self.config.train.accumulation,
    )

  def put(self, batch):
    """A training batch on the devices."""
    batch = {k: batch[k] for k in ("inputs", "targets", "mask")}
    if self.mesh is None:
      return batch
    return jax.device_put(batch, self._sharding(None, parallel.TOKENS))

  def validation(self):
    """(domain, batch) pairs of the validation split."""
    config = self.config
    return batches.validation_batches(
      self.corpus,
      seq_len=config.data.seq_len,
      batch_size=config.eval.batch_size,
      max_batches_per_domain=config.eval.batches_per_domain,
    )

  def evaluate(self, state: TrainState) -> dict[str, float]:
    """All metrics of the validation split."""

    def step(batch, index):
      batch = {k: batch[k] for k in ("inputs", "targets", "mask")}
      if self.mesh is not None:
        batch = jax.device_put(batch, self._sharding(parallel.TOKENS))
      return self.eval_step(state.params, state.balance, batch, np.int32(index))

    return evaluate.evaluate(
      step,
      self.validation(),
      segments=self.model.arch.segments,
      recipe=self.model.arch.recipe,
    )

  def _compile(self):
    started = time.monotonic()
    config, data = self.config, self.config.data
    shared = dict(model=self.model, optimizer=self.optimizer)
    init = functools.partial(
      init_state, **shared, seq_len=data.seq_len, batch=config.eval.batch_size
    )
    boxed = jax.eval_shape(init, jax.random.key(0))
    shardings = {}
    if self.mesh is not None:
      state, all_of_it = parallel.shardings(boxed, self.mesh), self._sharding()
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
    train_batch, eval_batch = self._batch_shapes()
    self.train_step = (
      jax.jit(
        functools.partial(train_step, **shared),
        donate_argnums=0,
        **shardings.get("train", {}),
      )
      .lower(state, train_batch)
      .compile()
    )
    self.eval_step = (
      jax.jit(
        functools.partial(evaluate.eval_step, model=self.model),
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
    a, b = config.train.accumulation, config.data.batch_size

    def shapes(*leading):
      shape = (*leading, config.data.seq_len)
      integers = jax.ShapeDtypeStruct(shape, jnp.int32)
      return {
        "inputs": integers,
        "targets": integers,
        "mask": jax.ShapeDtypeStruct(shape, jnp.bool_),
      }

    return shapes(a, b // a), shapes(config.eval.batch_size)

  def _sharding(self, *axes):
    return jax.NamedSharding(self.mesh, jax.P(*axes))


def train_and_evaluate(config, workdir) -> dict[str, float]:
  """One run from a config: builds, trains, evaluates, writes the run's files.

  Args:
    config: see `configs/base.py`.
    workdir: the run's folder.

  Returns:
    The final metrics of the validation split.

  Raises:
    ConfigError: impossible values, or a folder that holds a run already.
  """
  directory = run_directory.RunDirectory(workdir, config)
  program = Program(config)
  progress = Progress(config.train.num_steps, "steps")
  return run(program, config.seed, directory, progress)


def run(program: Program, seed: int, directory, progress) -> dict[str, float]:
  """Trains one seed with a program.

  Args:
    program: compiled functions; shared by all seeds.
    seed: of the parameters, the data's order and the router's noise.
    directory: RunDirectory to write to.
    progress: Progress, told of every step.

  Returns:
    The final metrics of the validation split.
  """
  config = program.config
  directory.describe(
    seed=seed,
    data=program.corpus.fingerprint,
    data_sources=program.corpus.sources,
    mesh=program.mesh_shape,
    grouped_matmul=grouped_matmul.backend_for(parallel.platform(program.mesh))
    if config.model.moe.grouped_matmul is None
    else config.model.moe.grouped_matmul,
    recipe=params.describe(config.model, config.plugins),
    parameters=params.count(program.model, config.data.seq_len),
    compile_seconds=program.compile_seconds,
  )
  state, stream = program.init(jax.random.key(seed)), program.batches(seed)
  every, end = config.eval.every or config.train.num_steps, 0
  while end < config.train.num_steps:
    start, end = end, min(end + every, config.train.num_steps)
    state = loop(program, state, stream, range(start, end), directory, progress)
    final = program.evaluate(state)
    directory.log(end, "validation", final)
  return final


def loop(program: Program, state, stream, steps: range, directory, progress):
  """Trains for some steps; every `train.log_every` of them writes a line.

  A line is written while the devices compute the step after it.

  Args:
    program, directory, progress: as in `run`.
    state: TrainState before the first step.
    stream: batches by step.
    steps: which steps, counted from 0.

  Returns:
    TrainState after the last step.
  """
  pending, full, since = [], [], time.monotonic()

  def write(done, sums):
    nonlocal since
    sums = jax.device_get(sums)
    found = step_metrics(sums, program.model.arch)
    tokens = sum(float(s["loss"].weight) for s in sums)
    found["tokens_per_second"] = tokens / (time.monotonic() - since)
    since = time.monotonic()
    directory.log(done, "train", found)
    note = f"loss {found['loss']:.3f}"
    if "max_vio" in found:
      note += f", max_vio {found['max_vio']:.2f}"
    progress.update(len(sums), note)

  for step in steps:
    state, sums = program.train_step(state, program.put(stream[step]))
    if full:  # Now that the devices have something to do.
      write(step, full)
      full = []
    pending.append(sums)
    if (step + 1) % program.config.train.log_every == 0:
      pending, full = [], pending
  if full or pending:
    write(steps.stop, full or pending)
  return state


def step_metrics(steps: list[dict], arch) -> dict[str, float]:
  """Metrics of several steps: each computed per step, then averaged.

  Args:
    steps: what `train_step` returned for each, on the host.
    arch: of the model.
  """
  found = []
  for sums in steps:
    means = evaluate.loss_means(sums)
    means["grad_norm"] = Mean(float(sums["grad_norm"]), 1.0)
    means["aux_loss"] = Mean(float(sums["aux_loss"]), 1.0)
    if arch.recipe is not None:
      layers = metrics.by_layer(sums["stats"], arch.segments)
      means |= metrics.routing(layers, arch.recipe.router.top_k)
      means["bias_range"] = metrics.bias_range(sums["balance"])
      floor = metrics.max_vio_floor(
        int(sums["loss"].weight),
        arch.recipe.num_experts,
        arch.recipe.router.top_k,
      )
      means["max_vio_floor"] = Mean(floor, 1.0)
    found.append(means)
  return metrics.divide(metrics.add_up(found))
