"""Importance and load losses: the squared variation of sums (1701.06538; 2106.05974).

  loss = coefficient * (1 + (std_e / mean_e)^2)  of one number for each expert

  of = "importance"  sum over tokens of the probability, without the router's noise
                     (V-MoE; Shazeer et al., eq. 6 and 7, sum the noisy gates of
                     the chosen experts instead, which is another loss)
  of = "load"        sum over tokens of the chance that fresh noise would choose the
                     expert (eq. 8 to 11), which has a gradient where counts have none

The papers leave the 1 out. It changes no gradient, and makes the loss 1 where experts
are equal, as all losses here are. Where m experts share all it is E/m, as `switch` is.
V-MoE uses both with 0.005.

Losses of importance alone can be low while one expert gets all tokens with low
probabilities; "load" needs a router with noise, in training.
"""

import jax.numpy as jnp

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import number, word
from moe_jax.moe.balancers import switch
from moe_jax.moe.types import Balancer, Mean

SCOPES = {k: v for k, v in switch.SCOPES.items() if k != "global_batch"}


def build(
  coefficient: number(0),
  of: word("importance", "load") = "importance",
  scope: word(*SCOPES) = "group",
) -> Balancer:
  """A balancer with the importance loss, or with the load loss.

  Args:
    coefficient: factor of the loss.
    of: "importance" or "load", see the head of this file.
    scope: over which tokens sums are formed, as in `switch`; "load" has the sums of
      whole groups and no smaller ones.

  Raises:
    ConfigError: "load" with the scope "sequence".
  """
  if of == "load" and scope == "sequence":
    raise ConfigError('of = "load" knows no scope "sequence"; use "group"')

  def observe(state, routing, mask_T):
    del state
    if routing.chance_TE is None:  # At evaluation.
      return {"load_E": jnp.zeros_like(routing.prob_TE[0])}
    return {"load_E": jnp.where(mask_T[:, None], routing.chance_TE, 0).sum(0)}

  def loss(state, stats, so_far_E, router_params):
    del state, so_far_E, router_params
    groups = stats.groups_per_sequence
    sums, tokens = stats.prob_E, stats.tokens
    if of == "load":
      # Groups have their sums in the place of their first sequence.
      sums, groups = stats.observed["load_E"], 1
      tokens = tokens.sum(1, keepdims=True)
    sum_E, tokens = (SCOPES[scope](x, groups) for x in (sums, tokens))
    value = squared(sum_E)
    weight = tokens.astype(value.dtype)
    return Mean(coefficient * (value * weight).sum(), weight.sum())

  return Balancer(
    loss=loss,
    observe=observe if of == "load" else None,
    needs=frozenset({"chance_TE" if of == "load" else "prob_TE"}),
  )


def squared(sum_E):
  """1 + (std / mean)^2 over the last axis; 0 where all are 0.

  Args:
    sum_E: a sum for each expert, 0 or more, with any axes before.
  """
  mean = sum_E.mean(-1)
  safe = jnp.where(mean > 0, mean, 1)
  return jnp.where(mean > 0, jnp.square(sum_E).mean(-1) / safe**2, 0)
