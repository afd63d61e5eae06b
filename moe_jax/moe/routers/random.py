"""The control: K distinct experts drawn uniformly for every token.

  chosen = K different numbers, drawn;  w = 1 / K

A useful router beats it, and its loads are the floor of MaxVio.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.core.options import integer
from moe_jax.moe import scores
from moe_jax.moe.types import Router, Routing

CONTRACT_EXCEPTIONS = {
  "gradient": "has no parameters at all",
  "expert_symmetry": "draws by number of expert",
  "token_symmetry": "draws by place",
}


def build(top_k: integer(1)) -> Router:
  """A router that draws. Without any key one fixed draw is used for every group.

  Weights are 1/K, probabilities 1/E; it has no parameters, no logits and
  nothing that a balancer could change.

  Args:
    top_k: K.
  """

  def route(params, x_TD, *, num_experts, select, side, rng):
    del params, select
    dtype = jnp.promote_types(x_TD.dtype, jnp.float32)
    shape = (x_TD.shape[0], num_experts)
    rng = jax.random.key(0) if rng is None else rng
    _, expert_TK = jax.lax.top_k(jax.random.uniform(rng, shape), top_k)
    expert_TK = checkpoint_name(expert_TK, "expert")
    weight_TK = jnp.full(expert_TK.shape, 1 / top_k, dtype)
    choice = scores.choice(expert_TK, weight_TK, side.mask_T)
    return Routing(choice, prob_TE=jnp.full(shape, 1 / num_experts, dtype))

  init = lambda rng, d_model, num_experts: {}  # noqa: E731
  return Router(
    init,
    {},
    route,
    causal=True,
    top_k=top_k,
    always_draws=True,
    gives=frozenset({"token_choice"}),
  )
