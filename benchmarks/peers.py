"""MoE layers as other codes compute them, as short as possible.

Each is f(shape, [its capacity factor], params, x_TD) -> y_TD, with the
parameters of `moe_jax.moe.layer`.
"""

import jax
import jax.numpy as jnp


def _chosen(shape, params, x_TD):
  """The same router: weight_TK, expert_TK."""
  prob_TE = jax.nn.softmax(x_TD @ params["router"]["kernel"])
  return jax.lax.top_k(prob_TE, shape.top_k)


def ragged_dot(shape, params, x_TD):
  """Rows sorted by expert, three ragged_dot, rows unsorted again."""
  weight_TK, expert_TK = _chosen(shape, params, x_TD)
  expert_N, w = expert_TK.reshape(-1), params["experts"]
  order_N = jnp.argsort(expert_N)
  sizes_E = jnp.bincount(expert_N, length=shape.num_experts)
  x_ND = x_TD[order_N // shape.top_k]
  dot = lambda x, w: jax.lax.ragged_dot(x, w, sizes_E)  # noqa: E731
  hidden = jax.nn.silu(dot(x_ND, w["gate"])) * dot(x_ND, w["up"])
  y_ND = dot(hidden, w["down"])[jnp.argsort(order_N)]
  y_TKD = y_ND.reshape(len(x_TD), shape.top_k, -1)
  return (y_TKD * weight_TK[..., None]).sum(1)


def scatter(shape, capacity, params, x_TD):
  """Tokens scattered to slots of equal number, batched products, a gather."""
  weight_TK, expert_TK = _chosen(shape, params, x_TD)
  expert_N, w = expert_TK.reshape(-1), params["experts"]
  slots = int(capacity * len(x_TD) * shape.top_k / shape.num_experts)
  chosen_NE = jax.nn.one_hot(expert_N, shape.num_experts, dtype=jnp.int32)
  rank_N = (jnp.cumsum(chosen_NE, 0) * chosen_NE).sum(1) - 1
  slot_N = jnp.where(rank_N < slots, expert_N * slots + rank_N, -1)
  x_ND = jnp.repeat(x_TD, shape.top_k, axis=0)
  empty = jnp.zeros((shape.num_experts * slots, shape.d_model))
  x_ECD = empty.at[slot_N].add(x_ND, mode="drop", wrap_negative_indices=False)
  x_ECD = x_ECD.reshape(shape.num_experts, slots, -1)
  hidden = jax.nn.silu(x_ECD @ w["gate"]) * (x_ECD @ w["up"])
  y_ND = (hidden @ w["down"]).reshape(-1, shape.d_model)
  y_ND = y_ND.at[slot_N].get(
    mode="fill", fill_value=0, wrap_negative_indices=False
  )
  y_TKD = y_ND.reshape(len(x_TD), shape.top_k, -1)
  return (y_TKD * weight_TK[..., None]).sum(1)


def all_experts(shape, params, x_TD):
  """Every expert on every token, weighted by zero where it is not chosen."""
  weight_TK, expert_TK = _chosen(shape, params, x_TD)
  tokens = len(x_TD)
  token_T1 = jnp.arange(tokens)[:, None]
  weight_TE = jnp.zeros((tokens, shape.num_experts))
  weight_TE = weight_TE.at[token_T1, expert_TK].set(weight_TK)

  def one(y_TD, expert):
    w, weight_T = expert
    hidden = jax.nn.silu(x_TD @ w["gate"]) * (x_TD @ w["up"])
    return y_TD + weight_T[:, None] * (hidden @ w["down"]), None

  each = (params["experts"], weight_TE.T)
  return jax.lax.scan(one, jnp.zeros_like(x_TD), each)[0]


def experts_alone(shape, params, x_TD):
  """No routing: every expert gets equally many rows, in batched products.

  What XLA would take for a layer that costs nothing besides its experts.
  """
  w = params["experts"]
  x_ECD = jnp.tile(x_TD, (shape.top_k, 1)).reshape(
    shape.num_experts, -1, shape.d_model
  )
  hidden = jax.nn.silu(x_ECD @ w["gate"]) * (x_ECD @ w["up"])
  return (hidden @ w["down"]).reshape(shape.top_k, *x_TD.shape).sum(0)
