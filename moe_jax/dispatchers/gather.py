"""Slots filled by gathering tokens, and emptied by gathering slots."""

import flax.struct
import jax
import jax.numpy as jnp

from moe_jax import dispatchers
from moe_jax.types import Array, Dispatcher, Rows


@flax.struct.dataclass
class Plan:
  """assignment_GEC: t * K + k of the slot's owner, T * K for an empty slot.
  place_GTK: e * C + c of an assignment's slot, E * C if it has none."""

  assignment_GEC: Array
  place_GTK: Array
  weight_GTK: Array
  kept_GTK: Array
  weight_input: bool = flax.struct.field(pytree_node=False)

  def dispatch(self, x_GTD: Array) -> Rows:
    top_k = self.place_GTK.shape[2]

    def one_group(x_TD, weight_TK, assignment_EC):
      x_ECD = _take(x_TD, assignment_EC // top_k)
      if self.weight_input:
        weight_EC = _take(weight_TK.reshape(-1), assignment_EC)
        x_ECD *= weight_EC[..., None].astype(x_ECD.dtype)
      return x_ECD

    return Rows(
      jax.vmap(one_group)(x_GTD, self.weight_GTK, self.assignment_GEC)
    )

  def combine(self, rows: Rows) -> Array:
    x_GND = rows.x.reshape(rows.x.shape[0], -1, rows.x.shape[-1])
    return weighted_sum(
      jax.vmap(_take)(x_GND, self.place_GTK),
      jnp.ones_like(self.weight_GTK) if self.weight_input else self.weight_GTK,
    )


def weighted_sum(x_GTKD: Array, weight_GTK: Array) -> Array:
  """sum_k weight * x, added up in the weights' dtype, returned in x's."""
  y_GTD = jnp.einsum(
    "GTK,GTKD->GTD",
    weight_GTK,
    x_GTKD,
    preferred_element_type=weight_GTK.dtype,
  )
  return y_GTD.astype(x_GTKD.dtype)


def build(order: str = "token") -> Dispatcher:
  """Args: order: who gets slots first, "token" or "choice" (`slots.rank`)."""
  dispatchers.check_order(order)

  def plan(routing, num_experts, bound):
    dispatchers.check_bound(bound, num_experts)
    slot_GTK, kept_GTK = dispatchers.assign(routing, num_experts, bound, order)
    places = num_experts * bound.slots
    place_GTK = routing.expert_TK * bound.slots + slot_GTK
    place_GTK = jnp.where(kept_GTK, place_GTK, places)

    def owners(place_TK):
      none = jnp.full(places, place_TK.size, jnp.int32)
      owner = jnp.arange(place_TK.size, dtype=jnp.int32)
      return none.at[place_TK.reshape(-1)].set(owner, mode="drop")

    assignment_GEC = jax.vmap(owners)(place_GTK)
    return Plan(
      assignment_GEC.reshape(-1, num_experts, bound.slots),
      place_GTK,
      routing.weight_TK,
      kept_GTK,
      routing.weight_input,
    )

  return Dispatcher(
    plan,
    causal=lambda top_k, bound: dispatchers.causal(order, top_k, bound),
    ragged=False,
  )


def _take(x, index):
  return x.at[index].get(mode="fill", fill_value=0)
