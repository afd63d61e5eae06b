"""Forced loads: experts by number, whatever the tokens are, for benchmarks.

  load of expert e is proportional to (e + 1)^-exponent;  w = softmax(x W)

Exponent 0 gives equal loads, and a larger one more uneven loads, but no expert has
more than every token. Token t takes the experts at the points u_t, u_t + 1, ... of the
running sum of the shares times K, with u_t = t * golden ratio mod 1: different experts
for a token, and loads that are right for any number of tokens, not only on average.

Weights are softmax scores, so that the whole layer is computed as in training, and
benchmarks measure the cost of imbalance alone (Megatron-Core has a similar router).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from moe_jax.core.options import integer, number
from moe_jax.moe import scores
from moe_jax.moe.types import GIVEN, Router, Routing

CONTRACT_EXCEPTIONS = {
  "expert_symmetry": "chooses by number of expert",
  "token_symmetry": "chooses by place",
  "causality": "neither choices nor slots depend on any token",
}
_GOLDEN = (5**0.5 - 1) / 2


def build(top_k: integer(1), exponent: number(0, high=30) = 0.0) -> Router:
  """A router whose loads are given.

  Args:
    top_k: K.
    exponent: of the loads, see the head of this file; 0: balanced.
  """

  def route(params, x_TD, *, num_experts, select, side, rng):
    del select, rng
    logits_TE = scores.logits(params, x_TD)
    prob_TE = jax.nn.softmax(logits_TE)
    expert_TK = jnp.asarray(table(len(x_TD), num_experts, top_k, exponent))
    expert_TK = checkpoint_name(expert_TK, "expert")
    weight_TK = jnp.take_along_axis(prob_TE, expert_TK, axis=-1)
    choice = scores.choice(expert_TK, weight_TK, side.mask_T)
    return Routing(choice, prob_TE, logits_TE)

  return Router(
    *(scores.linear, scores.LINEAR_AXES, route),
    causal=True,
    top_k=top_k,
    gives=GIVEN - {"selection"},
  )


def shares(num_experts: int, top_k: int, exponent: float) -> np.ndarray:
  """Experts' chances to be among a token's K: they add up to K, none above 1.

  Args:
    num_experts: E.
    top_k: K.
    exponent: of the loads.

  Returns:
    share_E, float64.
  """
  wanted_E = np.arange(1, num_experts + 1) ** -float(exponent)
  full = 0  # The first experts have every token.
  while True:
    rest_E = wanted_E[full:] / wanted_E[full:].sum() * (top_k - full)
    more = int((rest_E > 1).sum())
    if not more:
      return np.concatenate([np.ones(full), rest_E])
    full += more


@functools.lru_cache(maxsize=32)
def table(tokens: int, num_experts: int, top_k: int, exponent: float):
  """The experts of every token of a group.

  Args:
    tokens: T.
    num_experts: E.
    top_k: K.
    exponent: of the loads.

  Returns:
    expert_TK, int32, different experts for a token.
  """
  ends_E = np.cumsum(shares(num_experts, top_k, exponent))
  start_T = np.arange(tokens) * _GOLDEN % 1
  points_TK = start_T[:, None] + np.arange(top_k)
  expert_TK = np.searchsorted(ends_E, points_TK, side="right")
  return np.minimum(expert_TK, num_experts - 1).astype(np.int32)
