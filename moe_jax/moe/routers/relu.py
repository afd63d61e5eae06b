"""ReMoE: the weights are relu(x W), and those above 0 are the choice (2412.14711).

  w_e = relu((x W)_e);  a token goes to every expert with w_e > 0      (eq. 3)

The weights are continuous in x, where those of top-k jump. An L1 term, the
balancer `l1`, drives the mean number of experts per token to a number in the config.
Without `l1` about half of all experts stay active for a token.

A step costs what the tokens choose, which falls to the wanted number in the first
hundreds of steps. `top_k` sets the most that a token may have, and with it the memory
of a step: K rows are kept ready for each token.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.core.options import integer, number, optional
from moe_jax.moe import scores
from moe_jax.moe.types import GIVEN, Router, Routing, TokenChoice

CONTRACT_OPTIONS = {"top_k": 4}
CONTRACT_EXCEPTIONS = {"extreme": "weights are unbounded, like logits"}


def build(
  top_k: integer(1), average: optional(number(above=0)) = None
) -> Router:
  """A router whose weights above 0 are the choice.

  Args:
    top_k: K, the most experts of a token; as many as there are: no limit.
    average: experts of a token that are counted as active; None: K.
  """

  def route(params, x_TD, *, num_experts, select, side, rng):
    del num_experts, select, rng  # Weights are the choice.
    logits_TE = scores.logits(params, x_TD)
    _, expert_TK = jax.lax.top_k(jax.lax.stop_gradient(logits_TE), top_k)
    expert_TK = checkpoint_name(expert_TK, "expert")
    weight_TE = jax.nn.relu(logits_TE)
    weight_TK = jnp.take_along_axis(weight_TE, expert_TK, axis=-1)
    valid_TK = (weight_TK > 0) & side.mask_T[:, None]
    valid_TK = checkpoint_name(valid_TK, "expert")
    choice = TokenChoice(expert_TK, weight_TK, valid_TK)
    return Routing(choice, shares(weight_TE), logits_TE)

  return Router(
    *(scores.linear, scores.LINEAR_AXES, route),
    causal=True,
    top_k=top_k,
    fixed=False,
    average_k=average,
    gives=(GIVEN - {"selection"}) | {"weights"},
  )


def shares(weight_TE):
  """Weights over their sum; equal shares where all are 0.

  Args:
    weight_TE: 0 or more.
  """
  whole_T1 = weight_TE.sum(-1, keepdims=True)
  shares_TE = weight_TE / jnp.where(whole_T1 > 0, whole_T1, 1)
  return jnp.where(whole_T1 > 0, shares_TE, 1 / weight_TE.shape[-1])
