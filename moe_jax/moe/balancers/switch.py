"""The load-balancing loss (Switch, 2101.03961, eq. 4-6).

  loss = coefficient * E * sum_i f_i P_i

f is the share of assignments an expert got and P its mean probability, so the
loss is 1 when either is uniform and E/m when both sit evenly on m experts,
whatever K is. For one coefficient, published codes differ by K, E or T.
"""

import jax.numpy as jnp

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import number, word
from moe_jax.moe.types import Balancer, Mean


def _whole_sequences(x, groups):
  """Sums the groups of a sequence, where they are fractions of one."""
  return x.reshape(-1, groups, *x.shape[1:]).sum(1, dtype=x.dtype)


# {scope: the sums [..., E] of x [G, S, E] that f and P are formed of}.
SCOPES = {
  "sequence": _whole_sequences,
  "group": lambda x, groups: x.sum(1),
  "micro_batch": lambda x, groups: x.sum((0, 1)),
  "global_batch": lambda x, groups: x.sum((0, 1)),
}


def build(
  coefficient: number(0),
  scope: word(*SCOPES) = "micro_batch",
  count: word("all", "first") = "all",
) -> Balancer:
  """A balancer with the load-balancing loss.

  Args:
    coefficient: factor of the loss; 0.01 in Switch, 0.001 in
      DeepSeekMoE. Summed over layers.
    scope: over which tokens f and P are formed before they are multiplied:
      "sequence" (DeepSeek-V3), "group" (GShard), "micro_batch": all tokens of
      one forward pass over all devices, or "global_batch": f from the counts
      of the step so far, P from this micro-batch (2501.11873).
    count: "all" choices (divided by K), or the "first" alone (GShard, Switch).

  Raises:
    ConfigError: the scope "global_batch" with first choices alone.
  """
  if scope == "global_batch" and count == "first":
    raise ConfigError(
      'scope = "global_batch" counts all choices; set count ='
      ' "all", or another scope'
    )

  def loss(state, stats, so_far_E, router_params):
    del state, router_params
    counts = stats.count_E if count == "all" else stats.first_choice_E
    count_E, prob_E, tokens = (
      SCOPES[scope](x, stats.groups_per_sequence)
      for x in (counts, stats.prob_E, stats.tokens)
    )
    if scope == "global_batch":
      count_E = count_E + so_far_E
    loss = load_loss(count_E, prob_E)
    # Each sequence or group counts by its unpadded tokens.
    weight = tokens.astype(loss.dtype)
    return Mean(coefficient * (loss * weight).sum(), weight.sum())

  return Balancer(loss=loss, needs=frozenset({"prob_TE", "loads"}))


def load_loss(count_E, prob_E):
  """E * sum_i f_i P_i over the last axis; 0 where there are no tokens.

  Args:
    count_E: assignments of each expert, with any axes before.
    prob_E: summed probability of each expert, with the same axes.
  """
  f_E = count_E / jnp.maximum(count_E.sum(-1, keepdims=True), 1)
  total = prob_E.sum(-1, keepdims=True)
  prob_E = prob_E / jnp.where(total > 0, total, 1)
  return prob_E.shape[-1] * (f_E.astype(prob_E.dtype) * prob_E).sum(-1)
