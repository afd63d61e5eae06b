"""One-hot matrix products, as in GShard (2006.16668, Algorithm 2).

Simple and friendly to any compiler; its cost grows with T * E * C.
"""

import jax
import jax.numpy as jnp

from moe_jax.core.options import word
from moe_jax.moe import dispatchers, plans
from moe_jax.moe.types import Dispatcher


class EinsumPlan(dispatchers.TokenPlan, plans.MixturePlan):
  """One-hot weights of tokens in slots, and of slots in tokens."""


def build(
  order: word(*dispatchers.ORDERS) = "token", renormalize: bool = False
) -> Dispatcher:
  """A dispatcher with one-hot products; it needs a capacity.

  Args:
    order: who gets slots first, "token" or "choice" (`dispatchers.rank`).
    renormalize: give the weights of dropped assignments to the token's other experts,
      so that their sum stays the same (NLLB-MoE, 2207.04672).
  """
  return dispatchers.in_order(order, renormalize, _lay_out, ragged=False)


def _lay_out(plan, slot_GTK):
  choice, weight_GTK = plan.choice, plan.choice.weight_TK
  dtype = weight_GTK.dtype
  expert_GTKE = jax.nn.one_hot(choice.expert_TK, plan.num_experts, dtype=dtype)
  slot_GTKC = jax.nn.one_hot(slot_GTK, plan.bound.slots, dtype=dtype)
  slot_GTKC *= plan.kept_GTK[..., None]

  def scatter(value_GTK):
    return jnp.einsum("GTK,GTKE,GTKC->GTEC", value_GTK, expert_GTKE, slot_GTKC)

  mask, weights = scatter(jnp.ones_like(weight_GTK)), scatter(weight_GTK)
  if choice.weight_input:
    mask, weights = weights, mask
  return EinsumPlan(mask, weights, **vars(plan))
