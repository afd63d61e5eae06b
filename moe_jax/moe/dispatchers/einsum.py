"""One-hot matrix products, as in GShard (2006.16668, Algorithm 2).

Simple and friendly to any compiler; its cost grows with T * E * C.
"""

import flax.struct
import jax
import jax.numpy as jnp

from moe_jax.core.options import word
from moe_jax.moe import capacity, dispatchers, plans
from moe_jax.moe.types import Array, Dispatcher, Rows


@flax.struct.dataclass
class EinsumPlan(plans.TokenPlan):
  """One-hot weights of tokens in slots, and of slots in tokens."""

  dispatch_GTEC: Array
  combine_GTEC: Array

  def dispatch(self, x_GTD: Array) -> Rows:
    mask = self.dispatch_GTEC.astype(x_GTD.dtype)
    return Rows(jnp.einsum("GTEC,GTD->GECD", mask, x_GTD))

  def combine(self, rows: Rows) -> Array:
    y_GTD = jnp.einsum(
      "GTEC,GECD->GTD",
      self.combine_GTEC,
      rows.x,
      preferred_element_type=self.combine_GTEC.dtype,
    )
    return y_GTD.astype(rows.x.dtype)


def build(order: word(*capacity.ORDERS) = "token") -> Dispatcher:
  """Args: order: who gets slots first, "token" or "choice" (`capacity.rank`)."""

  def plan(choice, num_experts, bound):
    dispatchers.check_bound(bound, num_experts)
    slot_GTK, kept_GTK = dispatchers.assign(choice, num_experts, bound, order)
    weight_GTK = choice.weight_TK
    dtype = weight_GTK.dtype
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
    return EinsumPlan(choice, kept_GTK, num_experts, False, mask, weights)

  return Dispatcher(
    plan,
    causal=lambda top_k, bound: dispatchers.causal(order, top_k, bound),
    ragged=False,
  )
