"""BIP-based balancing: biases of a batch, found inside of the batch (2502.15451).

The balanced assignment of n tokens to E experts, K each, is a linear programme. Its
dual has a price p_t for every token and q_e for every expert, which some sweeps find
before the tokens choose by s_te - q_e:

  p_t = max(0, the (K+1)-th largest of s_te - q_e over experts)
  q_e = max(0, the (n K/E + 1)-th largest of s_te - p_t over tokens)

At exactly this q two scores tie, and rounding would decide. The midpoint between the
two neighbouring scores balances as well, and is used here. A router that chooses inside
of groups of experts is refused: prices are of a choice among all of them.

Loads are even from the first step on. Prices see all tokens of a group, so that a
token's experts depend on later tokens: for decoders it is an upper bound, and needs
model.allow_noncausal. `quantile` is the same dual with the prices of the step before.

We read the paper's abstract and its discussion only. Sweeps start at q = 0, and not
with the prices of the step before.
"""

import jax
import jax.numpy as jnp

from moe_jax.core.options import integer
from moe_jax.moe.types import Balancer

CONTRACT_OPTIONS = {"top_k": 2}


def build(top_k: integer(1), sweeps: integer(1) = 4) -> Balancer:
  """A balancer that subtracts prices from the scores that choose.

  Args:
    top_k: K, which has to be that of the router.
    sweeps: updates of p and q before a choice; 2 to 14 in the paper.
  """

  def select(state, score_TE, mask_T):
    del state
    score_TE = jax.lax.stop_gradient(score_TE)
    price_E = prices(score_TE, mask_T, top_k, sweeps)
    return score_TE - price_E[None, :]

  # Prices are 0 or more, and so scores have to be.
  needs = frozenset({"score_range", "ungrouped"})
  per_token = lambda num_experts: top_k  # noqa: E731
  return Balancer(select=select, causal=False, per_token=per_token, needs=needs)


def prices(score_TE, mask_T, top_k: int, sweeps: int):
  """The prices q of the experts for one group: q_E, 0 or more.

  Args:
    score_TE: scores, 0 or more.
    mask_T: bool, False for padding.
    top_k: K.
    sweeps: updates of p and q, from q = 0 on.
  """
  tokens, num_experts = score_TE.shape
  most = tokens * top_k // num_experts
  full = (mask_T.sum() * top_k) // num_experts  # Tokens of a full expert.
  last = min(top_k + 1, num_experts)

  def sweep(_, price_E):
    net_TE = score_TE - price_E[None, :]
    price_T = jnp.maximum(jax.lax.top_k(net_TE, last)[0].min(-1), 0)
    left_TE = score_TE - price_T[:, None]
    left_TE = jnp.where(mask_T[:, None], left_TE, -jnp.inf)
    # top_k is used without slices of its result, for which XLA would sort.
    down_EC = jax.lax.top_k(left_TE.T, min(most + 1, tokens))[0]
    place_1C = jnp.arange(down_EC.shape[1])[None, :]
    # Without a token beyond the full experts nothing has a price.
    next_E = jnp.where(place_1C <= full, down_EC, jnp.inf).min(-1)
    last_E = jnp.where(place_1C < jnp.maximum(full, 1), down_EC, jnp.inf)
    last_E = last_E.min(-1)
    middle_E = (jnp.maximum(next_E, 0) + jnp.maximum(last_E, 0)) / 2
    return jnp.where((mask_T.sum() > full) & (next_E > 0), middle_E, 0)

  zero_E = jnp.zeros_like(score_TE[0])
  return jax.lax.fori_loop(0, sweeps, sweep, zero_E)
