"""One-hot matrix products, as in GShard (2006.16668, Algorithm 2).

Simple and friendly to any compiler; its cost grows with T * E * C.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from moe_jax.core.options import word
from moe_jax.moe import dispatchers, plans
from moe_jax.moe.types import Dispatcher


@flax.struct.dataclass
class EinsumPlan(plans.TokenPlan, plans.MixturePlan):
  """One-hot weights of tokens in slots, and of slots in tokens."""


def build(order: word(*dispatchers.ORDERS) = "token") -> Dispatcher:
  """Args: order: who gets slots first, "token" or "choice" (`dispatchers.rank`)."""

  def plan(choice, num_experts, bound):
    slot_GTK, kept_GTK = dispatchers.assign(choice, num_experts, bound, order)
    weight_GTK, dtype = choice.weight_TK, choice.weight_TK.dtype
    expert_GTKE = jax.nn.one_hot(choice.expert_TK, num_experts, dtype=dtype)
    slot_GTKC = jax.nn.one_hot(slot_GTK, bound.slots, dtype=dtype)
    slot_GTKC *= kept_GTK[..., None]

    def scatter(value_GTK):
      return jnp.einsum(
        "GTK,GTKE,GTKC->GTEC", value_GTK, expert_GTKE, slot_GTKC
      )

    mask, weights = scatter(jnp.ones_like(weight_GTK)), scatter(weight_GTK)
    if choice.weight_input:
      mask, weights = weights, mask
    return EinsumPlan(mask, weights, choice, kept_GTK, num_experts, bound)

  causal = functools.partial(dispatchers.causal, order)
  return Dispatcher(plan, causal, ragged=False)
