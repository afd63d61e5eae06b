"""Expert threshold routing: every expert has a threshold for tokens (2603.11535).

  s = score(x W);  a token goes to every expert with s_e > threshold_e;  w_e = s_e

The thresholds are the state of the balancer `threshold`: moving quantiles of each
expert's scores, so that an expert has K/E of the tokens on average. It is expert
choice with the thresholds of earlier steps: loads are even, a token's number of experts
varies, and its experts depend on itself alone, so that it is for decoders.

Before the first step thresholds are 0, and every token has `top_k` experts; later a
token may have no expert at all, and then only the residual carries it. `top_k` sets the
most that a token may have; `average` is the mean that the thresholds aim at, for counts
of FLOPs.
We know the method from the paper's abstract.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.core.options import integer, number, optional, word
from moe_jax.moe import scores
from moe_jax.moe.types import GIVEN, Router, Routing, TokenChoice

CONTRACT_OPTIONS = {"top_k": 4}


def build(
  top_k: integer(1),
  score: word("softmax", "sigmoid") = "sigmoid",
  average: optional(number(above=0)) = None,
) -> Router:
  """A router that needs the balancer `threshold`.

  Args:
    top_k: K, the most experts of a token.
    score: "softmax" or "sigmoid" of the logits.
    average: experts of a token that are counted as active; None: K.
  """

  def route(params, x_TD, *, num_experts, select, side, rng):
    del num_experts, rng
    logits_TE = scores.logits(params, x_TD)
    score_TE = scores.SCORES[score](logits_TE)
    above_TE = jax.lax.stop_gradient(select(score_TE))
    above_TK, expert_TK = jax.lax.top_k(above_TE, top_k)
    expert_TK = checkpoint_name(expert_TK, "expert")
    valid_TK = checkpoint_name((above_TK > 0) & side.mask_T[:, None], "expert")
    weight_TK = jnp.take_along_axis(score_TE, expert_TK, axis=-1)
    choice = TokenChoice(expert_TK, weight_TK, valid_TK)
    prob_TE = scores.probabilities(logits_TE, score)
    return Routing(choice, prob_TE, logits_TE, score_TE=score_TE)

  return Router(
    *(scores.linear, scores.LINEAR_AXES, route),
    causal=True,
    top_k=top_k,
    fixed=False,
    average_k=average,
    gives=GIVEN | {"score_range"},
    needs=frozenset({"thresholds"}),
  )
