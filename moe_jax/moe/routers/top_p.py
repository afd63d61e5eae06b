"""Top-p routing: as many experts as it takes to reach probability p (2403.07652).

  p_e = softmax(x W);  chosen = the smallest set of the most probable experts whose
  probabilities add up to `threshold` or more;  w_e = p_e                (eq. 3 to 5)

A token that the router is sure about has one expert, a hard one has many. At first all
probabilities are alike, so that a token has about threshold * E of them; the balancer
`entropy` (1e-4 in the paper) brings the number down, and a load loss balances.

`top_k` sets the most that a token may have.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.core.options import integer, number, optional
from moe_jax.moe import scores
from moe_jax.moe.types import GIVEN, Router, Routing, TokenChoice

CONTRACT_OPTIONS = {"top_k": 4}


def build(
  top_k: integer(1),
  threshold: number(above=0, high=1) = 0.4,
  renormalize: bool = False,
  average: optional(number(above=0)) = None,
) -> Router:
  """A router with as many experts as a token needs to reach a probability.

  Args:
    top_k: K, the most experts of a token.
    threshold: p, the probability that the chosen ones have together at least.
    renormalize: divide the chosen weights by their sum.
    average: experts of a token that are counted as active; None: K.

  Raises:
    ConfigError: the one weight of a token is always 1.
  """
  scores.refuse_constant(top_k, renormalize)

  def route(params, x_TD, *, num_experts, select, side, rng):
    del num_experts, select, rng  # The probabilities are the choice.
    logits_TE = scores.logits(params, x_TD)
    prob_TE = jax.nn.softmax(logits_TE)
    expert_TK = scores.choose(
      jax.lax.stop_gradient(prob_TE), logits_TE, prob_TE <= 0, top_k
    )
    expert_TK = checkpoint_name(expert_TK, "expert")
    weight_TK = jnp.take_along_axis(prob_TE, expert_TK, axis=-1)
    before_TK = jnp.cumsum(weight_TK, axis=-1) - weight_TK
    valid_TK = (before_TK < threshold) & side.mask_T[:, None]
    valid_TK = checkpoint_name(valid_TK.at[:, 0].set(side.mask_T), "expert")
    if renormalize:
      weight_TK = scores.over_sum(weight_TK, valid_TK)
    choice = TokenChoice(expert_TK, weight_TK, valid_TK)
    return Routing(choice, prob_TE, logits_TE)

  return Router(
    *(scores.linear, scores.LINEAR_AXES, route),
    causal=True,
    top_k=top_k,
    fixed=False,
    average_k=average,
    gives=GIVEN - {"selection"},
  )
