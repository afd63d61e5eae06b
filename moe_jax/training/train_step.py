"""The train state, and the pure train step."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from moe_jax.core import parallel
from moe_jax.moe import groups
from moe_jax.moe.types import Array
from moe_jax.training import evaluation, losses, metrics


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes.

  step: int32, optimizer steps done, skipped ones included.
  skipped: int32, steps that were not applied, as their loss or gradient was
    not finite; skipped_in_a_row: of them those since the last that was.
  rng: the key that all noise is drawn from.
  balance: the balancers' state, {segment: {position: {"moe": ...}}}.
  """

  step: Array
  skipped: Array
  skipped_in_a_row: Array
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
    skipped=jnp.zeros((), jnp.int32),
    skipped_in_a_row=jnp.zeros((), jnp.int32),
    rng=rng,
    params=variables["params"],
    balance=variables.get("balance", {}),
    opt_state=optimizer.init(nn.unbox(variables["params"])),
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


def train_step(
  state: TrainState, batch, *, model, optimizer, num_bytes_V: Array
):
  """One optimizer step over all micro-batches.

  The loss is the sum over micro-batches divided once by the step's tokens;
  the balance losses are averaged over micro-batches; balancers are updated
  once from the counts of the whole step. A step whose loss or gradient is not
  finite changes nothing but the counters.

  Args:
    state: before the step.
    batch: inputs, targets, mask [A, B/A, L], A micro-batches.
    model: from `models.build`.
    optimizer: from `optim.build`.
    num_bytes_V: bytes of text that each token stands for.

  Returns:
    The new state, and {"loss": Mean, "bytes", "stats", "balance", "aux_loss",
    "grad_norm", "skipped", "skipped_in_a_row"}, sums over the step.
  """
  arch = model.arch
  accumulation, batch_size, length = batch["inputs"].shape
  step_tokens = batch["mask"].sum()
  step_rng = jax.random.fold_in(state.rng, state.step)

  def objective(params, micro, index, so_far):
    rng_G = None
    if arch.grouping is not None:
      first = index * batch_size
      rng_G = groups.keys(step_rng, batch_size, length, arch.grouping, first)
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
      "bytes": metrics.num_bytes(num_bytes_V, micro["targets"], micro["mask"]),
      "stats": evaluation.statistics(aux),
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
  balance = losses.update(arch.recipe, state.balance, sums["stats"], state.step)
  sums["grad_norm"] = optax.tree.norm(grads)
  loss = sums["loss"].total / step_tokens + sums["aux_loss"]
  finite = jnp.isfinite(loss) & jnp.isfinite(sums["grad_norm"])
  new = state.replace(
    params=optax.apply_updates(state.params, updates),
    opt_state=opt_state,
    balance=balance,
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
