"""What is minimised: next-token cross-entropy plus the balancers' losses."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax.moe import layer
from moe_jax.moe.types import Array, Mean


def cross_entropy(logits_BLV: Array, target_BL: Array, mask_BL: Array) -> Mean:
  """-log p(target), in nats, over unpadded tokens."""
  log_p_BLV = jax.nn.log_softmax(logits_BLV, axis=-1)
  nll_BL = -jnp.take_along_axis(log_p_BLV, target_BL[..., None], axis=-1)[
    ..., 0
  ]
  total = jnp.where(mask_BL, nll_BL, 0).sum()
  return Mean(total, mask_BL.sum().astype(total.dtype))


def balance(
  recipe: layer.Recipe | None,
  state: Mapping,
  stats: Mapping,
  so_far: Mapping,
) -> Array:
  """Sum over MoE layers and balancers of coefficient times loss.

  Args:
    recipe: of the MoE layers.
    state: the collection `balance`, {segment: {position: {"moe": ...}}}.
    stats: {segment: {position: Stats [R, G, S]}} of this micro-batch.
    so_far: {segment: {position: count_E [R, E]}} of the micro-batches before
      this one in the same step.
  """
  total = jnp.zeros(())
  for segment, positions in stats.items():
    for position, stats_R in positions.items():
      # Empty where no balancer has any state.
      states = state.get(segment, {}).get(position, {}).get("moe", {})
      for label, balancer in recipe.balancers:
        if balancer.loss is None:
          continue
        state_R = states.get(label, {})
        losses_R = jax.vmap(balancer.loss)(
          state_R, stats_R, so_far[segment][position]
        )
        total += losses_R.value().sum()
  return total


def update(
  recipe: layer.Recipe | None, state: Mapping, stats: Mapping, step: Array
) -> Mapping:
  """The balancers' new state, once per step, from that step's counts.

  Args:
    recipe, state: as in `balance`.
    stats: summed over the step's micro-batches.
    step: number of the step, from 0.
  """
  new = jax.tree.map(lambda x: x, state)
  for segment, positions in stats.items():
    for position, stats_R in positions.items():
      for label, balancer in recipe.balancers:
        states = new.get(segment, {}).get(position, {}).get("moe", {})
        if label in states:
          states[label] = jax.vmap(balancer.update, (0, 0, None))(
            states[label], stats_R, step
          )
  return new
