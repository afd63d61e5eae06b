"""The train state, and the pure train step."""

import functools
import itertools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from moe_jax import models
from moe_jax.core import parallel, roles
from moe_jax.moe import reduction
from moe_jax.moe.types import Array
from moe_jax.training import balancing, optimizers, traces


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes.

  step: int32, optimizer steps done, skipped ones included.
  skipped: int32, steps that were not applied, because their loss or gradient
    was not finite.
  skipped_in_a_row: int32, those since the last step that was applied.
  rng: the key of all noise.
  params: the parameters.
  balance: the balancers' state, nested by the path of the sublayer.
  opt_state: of the optimizer.
  ema: exponential moving average of the parameters; None: there is none.
  """

  step: Array
  skipped: Array
  skipped_in_a_row: Array
  rng: Array
  params: dict
  balance: dict
  opt_state: optax.OptState
  ema: dict | None = None


def numbers(config, model) -> dict:
  """Returns the numbers of a config that the step takes as an argument.

  Runs that differ in nothing else share a compiled step.

  Args:
    config: see `configs/base.py`.
    model: from `models.build`.

  Returns:
    {"optim": see `optimizers.numbers`, "balancers": see `balancing.numbers`,
    "ema": of `train.ema`, or None}.
  """
  decay = config.train.ema
  return {
    "optim": optimizers.numbers(
      config.optim, config.train.num_steps, config.plugins
    ),
    "balancers": balancing.numbers(models.sublayers(model)),
    "ema": None if decay is None else {"old": decay, "new": 1 - decay},
  }


def parts(config, model, task) -> dict:
  """Returns the arguments of `init_state` and `train_step` that a config sets.

  Args:
    config: see `configs/base.py`.
    model: from `models.build`.
    task: `tasks.Task`.

  Returns:
    {"model", "task", "optimizer": numbers["optim"] -> optax optimizer}.
  """
  variables = models.variables(model)
  optimizer = functools.partial(
    optimizers.build,
    optimizers.load(config.optim, config.plugins).direction,
    roles.of(variables["params"]),
  )
  return {"model": model, "task": task, "optimizer": optimizer}


def init_state(rng: Array, *, model, task, optimizer, numbers) -> TrainState:
  """Returns a new TrainState, parameters boxed with their logical axes.

  Args:
    rng: the key of the run's seed.
    model, task, optimizer: from `parts`.
    numbers: from `numbers`.
  """
  init_rng, rng = jax.random.split(rng)
  init = parallel.automatic(functools.partial(models.init, model), jax.P())
  variables = init(init_rng)
  params = variables["params"]
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    skipped=jnp.zeros((), jnp.int32),
    skipped_in_a_row=jnp.zeros((), jnp.int32),
    rng=rng,
    params=params,
    balance=variables.get("balance", {}),
    opt_state=optimizer(numbers["optim"]).init(nn.unbox(params)),
    ema=None if numbers["ema"] is None else params,
  )


def shardings(boxed: TrainState, mesh) -> TrainState:
  """Returns the sharding of every array of a state.

  The optimizer's arrays lie like the parameters that they belong to. An array
  that has lost an axis, as factored moments have, lies like the axes it still
  shares.

  Args:
    boxed: shapes, from `init_state` under `jax.eval_shape`.
    mesh: from `parallel.make_mesh`.
  """
  state_shardings = parallel.shardings(boxed, mesh)
  params = traverse_util.flatten_dict(nn.unbox(boxed.params))
  placed = traverse_util.flatten_dict(state_shardings.params)

  def like_its_parameter(path, leaf):
    name = tuple(p.key for p in path if hasattr(p, "key"))
    while name and name not in params:
      name = name[1:]
    if not name:
      return jax.NamedSharding(mesh, jax.P())
    triples = zip(leaf.shape, params[name].shape, placed[name].spec)
    shared = itertools.takewhile(lambda x: x[0] == x[1], triples)
    return jax.NamedSharding(mesh, jax.P(*(axis for _, _, axis in shared)))

  like = jax.tree.map_with_path(like_its_parameter, boxed.opt_state)
  return state_shardings.replace(opt_state=like)


def once(config, mesh):
  """Returns the mesh over which a step adds experts' gradients once, or None.

  Args:
    config: see `configs/base.py`.
    mesh: of the model.
  """
  wanted = config.train.reduce_experts_once and config.train.accumulation > 1
  return parallel.of_automatic_axes(mesh) if wanted else None


def train_step(
  state: TrainState,
  batch,
  numbers,
  *,
  model,
  task,
  optimizer,
  once=None,
  collect=False,
):
  """Makes one optimizer step over all micro-batches.

  The loss is the sum over micro-batches divided once by the step's weight; the
  balance losses are averaged over micro-batches; balancers are updated once
  from the sums of the whole step. A step whose loss, gradient or balance is not
  finite changes nothing but the counters.

  Args:
    state: before the step.
    batch: arrays [A, B/A, ...], A micro-batches. Their axes may be explicit, as
      `jax.make_mesh` makes them.
    numbers: from `numbers`; none of them is compiled into the step.
    model, task, optimizer: from `parts`.
    once: from `once`.
    collect: also return the tokens' choices, as "routing", see `traces.routed`,
      with a leading axis of micro-batches.

  Returns:
    The new state, and {"loss": Mean, "task": the task's sums, "stats",
    "balance", "aux_loss", "grad_norm", "skipped", "skipped_in_a_row"}, sums
    over the step.
  """
  parts = {"model": model, "task": task, "optimizer": optimizer}
  parts |= {"once": once, "collect": collect}
  as_before = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, state)
  step = functools.partial(_train_step, **parts)
  step = parallel.automatic(step, (as_before, jax.P()))
  return step(state, batch, numbers)


def _train_step(state, batch, numbers, model, task, optimizer, once, collect):
  """`train_step` on automatic axes."""
  sublayers = balancing.rebuilt(models.sublayers(model), numbers["balancers"])
  (grads, sums), weight, routing = _accumulate(
    state, batch, model, task, sublayers, once, collect
  )
  updates, opt_state = optimizer(numbers["optim"]).update(
    grads, state.opt_state, state.params
  )
  params = optax.apply_updates(state.params, updates)
  balance = balancing.update(
    sublayers, state.balance, sums["stats"], state.step
  )
  average = numbers["ema"]
  ema = state.ema and jax.tree.map(
    lambda e, p: average["old"] * e + average["new"] * p, state.ema, params
  )
  sums["grad_norm"] = optax.tree.norm(grads)
  loss = sums["loss"].total / weight + sums["aux_loss"]
  finite = jnp.isfinite(loss) & jnp.isfinite(sums["grad_norm"])
  for leaf in jax.tree.leaves(balance):
    finite &= jnp.isfinite(leaf).all()
  new = state.replace(
    params=params,
    opt_state=opt_state,
    balance=balance,
    ema=ema,
    skipped_in_a_row=jnp.zeros_like(state.skipped_in_a_row),
  )
  old = state.replace(
    skipped=state.skipped + 1, skipped_in_a_row=state.skipped_in_a_row + 1
  )
  state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
  state = state.replace(step=state.step + 1)
  sums["balance"] = state.balance
  sums["skipped"] = state.skipped
  sums["skipped_in_a_row"] = state.skipped_in_a_row
  if collect:
    sums["routing"] = routing
  return state, sums


def _accumulate(state, batch, model, task, sublayers, once, collect):
  """((gradients, sums), weight, routing) of all micro-batches."""
  accumulation, batch_size = jax.tree.leaves(batch)[0].shape[:2]
  weight = task.weight(batch)
  rng = jax.random.fold_in(state.rng, state.step)
  learnt, weights = reduction.split(state.params, sublayers, once)

  def objective(learnt, micro, index, so_far):
    params = reduction.join(learnt, weights)
    variables = {"params": params, "balance": state.balance}
    more = {"collect": "routing"} if collect else {}
    loss, task_sums, aux = task.loss(
      model, variables, micro, rng, index * batch_size, train=True, **more
    )
    routing = {}
    if collect:
      lengths = models.lengths(model, task.lengths)
      routing = traces.routed(aux, model, batch_size, lengths)
    stats = balancing.statistics(aux, sublayers)
    balance = balancing.loss(sublayers, state.balance, stats, so_far, params)
    balance /= accumulation
    sums = {
      "loss": loss,
      "task": task_sums,
      "stats": balancing.sum_groups(stats),
      "aux_loss": balance,
    }
    return loss.total / weight + balance, (sums, routing)

  # One trace serves for the shapes and for the scan.
  gradient = jax.jit(jax.grad(objective, has_aux=True), inline=True)

  def micro_step(carry, micro):
    grads, sums = carry
    index, micro = micro
    so_far = {k: s.count_E.sum((1, 2)) for k, s in sums["stats"].items()}
    new_grads, (new_sums, routing) = gradient(learnt, micro, index, so_far)
    new = new_grads, new_sums
    return jax.tree.map(jnp.add, (grads, sums), new), routing

  # The scan begins with zeros of the shapes of (gradients, sums).
  none_so_far = {
    path: jnp.zeros((len(parts.numbers), parts.recipe.pool), int)
    for path, parts in sublayers.items()
  }
  numbered = jnp.arange(accumulation), batch
  index, first = jax.tree.map(lambda x: x[0], numbered)
  shapes = jax.eval_shape(gradient, learnt, first, index, none_so_far)
  shapes = shapes[0], shapes[1][0]
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  (grads, sums), routing = jax.lax.scan(micro_step, zeros, numbered)
  grads = reduction.reduced(grads, weights, sublayers, once)
  return (grads, sums), weight, routing
