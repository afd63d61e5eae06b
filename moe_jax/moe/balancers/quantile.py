"""Quantile balancing: biases at which every expert gets its share of the tokens.

The bias is a fixed point of the dual of the balanced assignment problem
(kexue.fm/archives/11619; Kimi K3, 2607.24653; Megatron-Core). With s the scores, b the
bias and K experts of a token out of E,

  cutoff of token t  a_t = the (K+1)-th largest of s_te + b_e over experts
  bias of expert e   b_e = the K/E quantile over tokens of a_t - s_te

so that K/E of the tokens have s_te + b_e above their cutoff. Every step counts a - s
of each expert in bins of [min b - r, max b + r], where r is the most that two scores
differ by, so that the statistics are sums: the same on every mesh and over
micro-batches. The quantile is read from the sums and lies within a bin of the exact
one. `decay` keeps a moving average.

There is no rate to tune, and loads are even after some steps. It follows each batch,
so that small batches make it noisy: use `decay` there. Its cost is E * bins numbers a
layer and group. Cutoffs are of a choice among all experts, so that routers that choose
inside of groups of experts are refused.

We know the rule from published code and notes, not from the text of the report.
"""

import jax
import jax.numpy as jnp

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import integer, number, optional
from moe_jax.moe.types import Balancer, Routing


def build(
  decay: number(0, below=1) = 0.0,
  bins: integer(2, 100_000) = 1000,
  width: optional(number(1)) = None,
) -> Balancer:
  """A balancer whose biases follow the quantiles of each step.

  Args:
    decay: of the moving average of the bias; 0: the last step alone.
    bins: of each expert's histogram; wider than 0.1, they raise ConfigError.
    width: the largest distance of a score from 0, 1 or more; None: scores are
      between 0 and 1. Values outside of the bins are counted in the last ones.
  """
  # The largest difference of two scores.
  reach = 1.0 if width is None else 2 * width
  if isinstance(reach, int | float) and 2 * reach / bins > 0.1:
    raise ConfigError(
      f"bins = {bins} for scores that differ by up to {reach:g} are bins wider than"
      " 0.1, which is too coarse to balance; raise bins, or lower width"
    )

  def init(num_experts):
    return {"bias_E": jnp.zeros(num_experts)}

  def observe(state, routing, mask_T):
    score_TE, bias_E = scores_of(routing), state["bias_E"]
    _, top_k = routing.choice.expert_TK.shape
    far_TE = cutoffs(score_TE, bias_E, top_k)[:, None] - score_TE
    low, high = _ends(bias_E, reach)
    count_EB = histogram(far_TE, mask_T, low, high, bins)
    # The sum of all loads, of which each expert should have an equal share.
    assigned = routing.choice.valid_TK.sum(dtype=jnp.int32)
    return {"far_EB": count_EB, "assigned": assigned}

  def update(state, stats, step):
    del step
    bias_E = state["bias_E"]
    count_EB = stats.observed["far_EB"].sum((0, 1))
    assigned = stats.observed["assigned"].sum().astype(bias_E.dtype)
    low, high = _ends(bias_E, reach)
    quantile_E = quantiles(count_EB, assigned / len(bias_E), low, high)
    new_E = quantile_E - quantile_E.mean()
    new_E = decay * bias_E + (1 - decay) * new_E
    return {"bias_E": jnp.where(assigned > 0, new_E, bias_E)}

  def select(state, score_TE, mask_T):
    del mask_T
    return score_TE + state["bias_E"].astype(score_TE.dtype)[None, :]

  needs = {"token_choice", "fixed", "ungrouped"} | (
    {"score_range"} if width is None else set()
  )
  return Balancer(
    init=init,
    select=select,
    observe=observe,
    update=update,
    needs=frozenset(needs),
  )


def scores_of(routing: Routing):
  """The scores that chose, without a gradient.

  Args:
    routing: of one group.

  Raises:
    ConfigError: the router does not return them.
  """
  if routing.score_TE is None:
    raise ConfigError(
      "the balancers quantile and threshold need the scores that choose: the"
      " router has to return them as Routing.score_TE"
    )
  return jax.lax.stop_gradient(routing.score_TE)


def cutoffs(score_TE, bias_E, top_k: int):
  """The (K+1)-th largest score of each token, with the bias: cutoff_T.

  Where K = E it is the token's smallest score.

  Args:
    score_TE: scores without the bias.
    bias_E: the bias.
    top_k: K.
  """
  biased_TE = score_TE + bias_E.astype(score_TE.dtype)[None, :]
  last = min(top_k + 1, score_TE.shape[-1])
  # A minimum in place of a slice, for which XLA on CPU would sort all scores.
  return jax.lax.top_k(biased_TE, last)[0].min(-1)


def _ends(bias_E, reach):
  """Ends of the bins: a cutoff less a score lies between them."""
  return bias_E.min() - reach, bias_E.max() + reach


def histogram(value_TE, mask_T, low, high, bins: int):
  """Counts the unpadded tokens whose value is in each bin: count_EB.

  Args:
    value_TE: what is counted. Values outside of the bins are in the first or last.
    mask_T: bool, False for padding.
    low: lower end of the first bin.
    high: upper end of the last bin.
    bins: B, bins of equal width.
  """
  bin_TE = jnp.floor((value_TE - low) / (high - low) * bins).astype(jnp.int32)
  bin_TE = jnp.clip(bin_TE, 0, bins - 1)
  tokens, num_experts = value_TE.shape
  expert_TE = jnp.broadcast_to(jnp.arange(num_experts), (tokens, num_experts))
  ones_TE = jnp.broadcast_to(mask_T[:, None], bin_TE.shape).astype(jnp.int32)
  count_EB = jnp.zeros((num_experts, bins), jnp.int32)
  return count_EB.at[expert_TE, bin_TE].add(ones_TE)


def quantiles(count_EB, wanted, low, high):
  """The value of each expert that `wanted` tokens lie below: quantile_E.

  Inside of a bin tokens are taken to be spread evenly.

  Args:
    count_EB: from `histogram`.
    wanted: number of tokens.
    low: lower end of the first bin.
    high: upper end of the last bin.
  """
  bins, wide = count_EB.shape[-1], low.dtype
  below_EB = jnp.cumsum(count_EB, axis=-1)
  bin_E = jnp.minimum((below_EB < wanted).sum(-1), bins - 1)
  at = lambda x_EB: jnp.take_along_axis(x_EB, bin_E[:, None], -1)[:, 0]  # noqa: E731
  inside_E = at(count_EB).astype(wide)
  before_E = at(below_EB).astype(wide) - inside_E
  part_E = (wanted - before_E) / jnp.maximum(inside_E, 1)
  part_E = jnp.clip(part_E, 0, 1)
  return low + (high - low) * (bin_E.astype(wide) + part_E) / bins
