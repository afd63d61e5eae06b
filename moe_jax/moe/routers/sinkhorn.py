"""Sinkhorn routing: choices by a balanced plan of the whole group.

The plan is exp(x W) with rows and columns scaled in turn, until every token has the
same total and every expert too:

  chosen = top-k of the plan;  w = score(x W) of the chosen, over their sum if
  `renormalize`

(S-BASE of Clark et al., 2202.01169, 3; Megatron-Core has a softmax for K above 1 and
else a sigmoid.) Weights are computed from x W alone, and no gradient flows
through the plan. Outside of training (without a key) logits choose.

Loads are nearly even from the first step without any loss. The plan depends on all
tokens of the group, so it is not for decoders: they refuse it unless
model.allow_noncausal is set.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.core.options import integer, word
from moe_jax.moe import scores
from moe_jax.moe.types import GIVEN, Router, Routing

CONTRACT_OPTIONS = {"top_k": 2, "at_evaluation": True}


def build(
  top_k: integer(1),
  sweeps: integer(1) = 8,
  score: word("softmax", "sigmoid") = "sigmoid",
  renormalize: bool = False,
  at_evaluation: bool = False,
) -> Router:
  """A router by a balanced plan.

  Args:
    top_k: K.
    sweeps: of scaling rows and columns.
    score: of the weights: "sigmoid", or "softmax" over all experts.
    renormalize: divide the weights by their sum.
    at_evaluation: whether the plan chooses without a key too.

  Raises:
    ConfigError: the one weight of a token is always 1.
  """
  scores.refuse_constant(top_k, renormalize)

  def route(params, x_TD, *, num_experts, select, side, rng):
    del num_experts, select  # The plan is the selection.
    logits_TE = scores.logits(params, x_TD)
    selection_TE = jax.lax.stop_gradient(logits_TE)
    if at_evaluation or rng is not None:
      selection_TE = log_plan(selection_TE, side.mask_T, sweeps)
    _, expert_TK = jax.lax.top_k(selection_TE, top_k)
    expert_TK = checkpoint_name(expert_TK, "expert")
    weights_TK = scores.weigh(
      expert_TK, logits_TE, scores.SCORES[score](logits_TE), score
    )
    choice = scores.choice(expert_TK, weights_TK[renormalize], side.mask_T)
    return Routing(choice, jax.nn.softmax(logits_TE), logits_TE)

  return Router(
    *(scores.linear, scores.LINEAR_AXES, route),
    causal=False,
    top_k=top_k,
    gives=GIVEN - {"selection"},
  )


def log_plan(logits_TE, mask_T, sweeps: int):
  """The logarithm of the plan, up to a number for each token.

  Args:
    logits_TE: of one group.
    mask_T: bool, False for padding, which takes no part in the plan.
    sweeps: of scaling rows and columns.
  """
  masked_TE = jnp.where(mask_T[:, None], logits_TE, -jnp.inf)

  def sweep(_, column_E):
    row_T1 = jax.nn.logsumexp(
      masked_TE - column_E[None, :], axis=1, keepdims=True
    )
    row_T1 = jnp.where(mask_T[:, None], row_T1, 0)
    column_E = jax.nn.logsumexp(masked_TE - row_T1, axis=0)
    return jnp.where(mask_T.any(), column_E, 0)

  column_E = jax.lax.fori_loop(0, sweeps, sweep, jnp.zeros_like(logits_TE[0]))
  return logits_TE - column_E[None, :]
