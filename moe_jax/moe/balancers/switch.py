"""The load-balancing loss E * sum_i f_i P_i (Switch, 2101.03961, eq. 4-6).

f is the share of assignments an expert got and P its mean probability, so the
loss is 1 when either is uniform and E/m when both sit evenly on m experts,
whatever K is. Published codes of the same coefficient differ by K, E or T.
"""

import jax.numpy as jnp

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import number, word
from moe_jax.moe.types import Balancer, Mean

SCOPES = ("sequence", "group", "micro_batch", "global_batch")


def build(
  coefficient: number(0),
  scope: word(*SCOPES) = "micro_batch",
  count: word("all", "first") = "all",
) -> Balancer:
  """Args:
  coefficient: what the loss is multiplied by; 0.01 in Switch, 0.001 in
    DeepSeekMoE. Summed over layers.
  scope: over which tokens f and P are formed before they are multiplied:
    "sequence" (DeepSeek-V3), "group" (GShard), "micro_batch": all tokens of
    one forward pass over all devices, or "global_batch": f from the counts
    of the step so far, P from this micro-batch (2501.11873).
  count: "all" choices (divided by K), or the "first" alone (GShard, Switch).
  """
  if scope == "global_batch" and count == "first":
    raise ConfigError(
      'balancers/switch: scope = "global_batch" counts all choices; set count ='
      ' "all", or another scope'
    )

  def loss(state, stats, so_far_E, router_params):
    del state, router_params
    count = stats.count_E if count_all else stats.first_choice_E
    tokens, prob = stats.tokens, stats.prob_E
    if scope in ("micro_batch", "global_batch"):
      count, prob, tokens = count.sum((0, 1)), prob.sum((0, 1)), tokens.sum()
    elif scope == "sequence":
      count, prob, tokens = (
        _whole_sequences(x, stats.groups_per_sequence)
        for x in (count, prob, tokens)
      )
    elif scope == "group":
      count, prob, tokens = count.sum(1), prob.sum(1), tokens.sum(1)
    if scope == "global_batch":
      count = count + so_far_E
    return _weighted(_load_loss(count, prob), tokens, coefficient)

  count_all = count == "all"
  return Balancer(loss=loss)


def _load_loss(count_E, prob_E):
  """E * sum_i f_i P_i over the last axis; 0 where there are no tokens."""
  f_E = count_E / jnp.maximum(count_E.sum(-1, keepdims=True), 1)
  prob_E = prob_E / _positive(prob_E.sum(-1, keepdims=True))
  return prob_E.shape[-1] * (f_E.astype(prob_E.dtype) * prob_E).sum(-1)


def _whole_sequences(x, groups):
  """Sums the groups of a sequence, where they are fractions of one."""
  return x.reshape(-1, groups, *x.shape[1:]).sum(1, dtype=x.dtype)


def _positive(x):
  return jnp.where(x > 0, x, 1)


def _weighted(loss, tokens, coefficient):
  """Each sequence or group counts by its unpadded tokens."""
  weight = tokens.astype(loss.dtype)
  return Mean(coefficient * (loss * weight).sum(), weight.sum())
