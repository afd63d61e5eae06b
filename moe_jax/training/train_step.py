"""The train state, and the pure train step."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from moe_jax import models
from moe_jax.core import parallel, roles
from moe_jax.moe.types import Array
from moe_jax.training import balancing, optimizers


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes.

  step: int32, optimizer steps done, skipped ones included.
  skipped: int32, steps that were not applied, as their loss or gradient was
    not finite; skipped_in_a_row: of them those since the last that was.
  rng: the key that all noise is drawn from.
  balance: the balancers' state, nested by the path of the sublayer.
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
  """The numbers of a config that the step takes as an argument.

  Runs that differ in nothing else share a compiled step.

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


def init_state(rng: Array, *, model, task, optimizer, numbers) -> TrainState:
  """A new TrainState, parameters boxed with their logical axes.

  Args:
    rng: the key of the run's seed.
    model: from `models.build`.
    task: `task.Task`.
    optimizer: (roles of the parameters, numbers["optim"]) -> optax optimizer,
      such as `optimizers.build` of a direction.
    numbers: from `numbers`.
  """
  init_rng, rng = jax.random.split(rng)
  variables = task.init(model, init_rng)
  params = variables["params"]
  optimizer = optimizer(roles.of(params), numbers["optim"])
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    skipped=jnp.zeros((), jnp.int32),
    skipped_in_a_row=jnp.zeros((), jnp.int32),
    rng=rng,
    params=params,
    balance=variables.get("balance", {}),
    opt_state=optimizer.init(nn.unbox(params)),
    ema=None if numbers["ema"] is None else params,
  )


def shardings(boxed: TrainState, mesh) -> TrainState:
  """The sharding of every array of a state.

  The optimizer's arrays lie like the parameters that they belong to; one that
  has lost an axis, as factored moments have, like the axes it still shares.

  Args:
    boxed: shapes, from `init_state` under `jax.eval_shape`.
    mesh: from `parallel.make_mesh`.
  """
  found = parallel.shardings(boxed, mesh)
  flat = jax.tree_util.tree_leaves_with_path
  of_params = {
    _names(path): (leaf.shape, sharding)
    for (path, leaf), sharding in zip(
      flat(nn.unbox(boxed.params)), jax.tree.leaves(found.params)
    )
  }

  def like_its_parameter(path, leaf):
    names = _names(path)
    suffixes = (names[i:] for i in range(len(names)))
    name = next((s for s in suffixes if s in of_params), None)
    if name is None:
      return jax.NamedSharding(mesh, jax.P())
    shape, sharding = of_params[name]
    same = 0
    while (
      same < len(leaf.shape)
      and leaf.shape[same : same + 1] == (shape[same : same + 1])
    ):
      same += 1
    return jax.NamedSharding(mesh, jax.P(*tuple(sharding.spec)[:same]))

  return found.replace(
    opt_state=jax.tree_util.tree_map_with_path(
      like_its_parameter, boxed.opt_state
    )
  )


def _names(path):
  return tuple(p.key for p in path if hasattr(p, "key"))


def train_step(state: TrainState, batch, numbers, *, model, task, optimizer):
  """One optimizer step over all micro-batches.

  The loss is the sum over micro-batches divided once by the step's weight;
  the balance losses are averaged over micro-batches; balancers are updated
  once from the sums of the whole step. A step whose loss, gradient or balance
  is not finite changes nothing but the counters.

  Args:
    state: before the step.
    batch: arrays [A, B/A, ...], A micro-batches.
    numbers: from `numbers`; none of them is compiled into the step.
    model: from `models.build`.
    task: `task.Task`.
    optimizer: numbers["optim"] -> optax optimizer.

  Returns:
    The new state, and {"loss": Mean, "task": the task's sums, "stats",
    "balance", "aux_loss", "grad_norm", "skipped", "skipped_in_a_row"}, sums
    over the step.
  """
  sublayers = balancing.rebuilt(models.sublayers(model), numbers["balancers"])
  (grads, sums), weight = _accumulate(state, batch, model, task, sublayers)
  updates, opt_state = optimizer(numbers["optim"]).update(
    grads, state.opt_state, state.params
  )
  params = optax.apply_updates(state.params, updates)
  balance = balancing.update(
    sublayers, state.balance, sums["stats"], state.step
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
    ema=_averaged(state.ema, params, numbers["ema"]),
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
  return state, sums


def _averaged(ema, params, numbers):
  """The moving average after a step to `params`; None where there is none."""
  if numbers is None:
    return None
  return jax.tree.map(
    lambda e, p: numbers["old"] * e + numbers["new"] * p, ema, params
  )


def _accumulate(state, batch, model, task, sublayers):
  """((gradients, sums), weight) of all micro-batches."""
  accumulation, batch_size = jax.tree.leaves(batch)[0].shape[:2]
  weight = task.weight(batch)
  rng = jax.random.fold_in(state.rng, state.step)

  def objective(params, micro, index, so_far):
    variables = {"params": params, "balance": state.balance}
    loss, task_sums, aux = task.loss(
      model, variables, micro, rng, index * batch_size, train=True
    )
    stats = balancing.statistics(aux, sublayers)
    balance = balancing.loss(sublayers, state.balance, stats, so_far, params)
    balance /= accumulation
    sums = {
      "loss": loss,
      "task": task_sums,
      "stats": balancing.sum_groups(stats),
      "aux_loss": balance,
    }
    return loss.total / weight + balance, sums

  gradient = jax.grad(objective, has_aux=True)

  def micro_step(carry, micro):
    grads, sums = carry
    index, micro = micro
    so_far = {k: s.count_E.sum((1, 2)) for k, s in sums["stats"].items()}
    new_grads, new_sums = gradient(state.params, micro, index, so_far)
    return jax.tree.map(jnp.add, (grads, sums), (new_grads, new_sums)), None

  # Zeros with the shapes of (gradients, sums): where the scan begins.
  none_so_far = {
    path: jnp.zeros((len(parts.numbers), parts.recipe.num_experts), jnp.int32)
    for path, parts in sublayers.items()
  }
  first = jax.tree.map(lambda x: x[0], batch)
  shapes = jax.eval_shape(gradient, state.params, first, 0, none_so_far)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  carry, _ = jax.lax.scan(micro_step, zeros, (jnp.arange(accumulation), batch))
  return carry, weight
