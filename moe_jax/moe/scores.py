"""Scores of experts, and what routers make of them: choices and weights.

Everything is in at least float32.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.core.errors import ConfigError
from moe_jax.moe.types import Array, TokenChoice


def _log_softplus(logits):
  """log(log(1 + e^x)), which is x itself long before e^x underflows."""
  small = logits < -20
  safe = jnp.where(small, 0, logits)
  return jnp.where(small, logits, jnp.log(jax.nn.softplus(safe)))


SCORES = {
  "softmax": jax.nn.softmax,
  "sigmoid": jax.nn.sigmoid,
  "sqrt_softplus": lambda logits: jnp.exp(_log_softplus(logits) / 2),
}
LOG_SCORES = {
  "softmax": lambda logits: logits,
  "sigmoid": jax.nn.log_sigmoid,
  "sqrt_softplus": lambda logits: _log_softplus(logits) / 2,
}
# Tests whether rounding has stopped a score from growing with its logit.
SATURATED = dict.fromkeys(SCORES, lambda score_TE: score_TE <= 0)
SATURATED["sigmoid"] = lambda score_TE: (score_TE <= 0) | (score_TE >= 1)


def linear(
  rng: Array, d_model: int, num_experts: int, init_scale: float = 1.0
) -> dict[str, Array]:
  """{"kernel": W}, truncated normal with variance init_scale / D.

  Args:
    rng: a key.
    d_model: D.
    num_experts: E.
    init_scale: variance times fan-in.
  """
  initializer = jax.nn.initializers.variance_scaling(
    init_scale, "fan_in", "truncated_normal"
  )
  return {"kernel": initializer(rng, (d_model, num_experts))}


LINEAR_AXES = {"kernel": ("embed", None)}


def wide(x: Array) -> Array:
  """x in float32, or as wide as it is if that is wider.

  Args:
    x: any floats.
  """
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def logits(
  params: Mapping[str, Array], x_TD: Array, precision: str = "highest"
) -> Array:
  """x W + b: logits_TE, in at least float32.

  Args:
    params: of `linear`, and a "kernel_bias" if any.
    x_TD: tokens.
    precision: of the product, as in jax.numpy.dot.
  """
  x_TD = wide(x_TD)
  kernel_DE = params["kernel"].astype(x_TD.dtype)
  logits_TE = jnp.dot(x_TD, kernel_DE, precision=precision)
  if "kernel_bias" in params:
    logits_TE += params["kernel_bias"].astype(x_TD.dtype)[None, :]
  return logits_TE


def refuse_constant(
  top_k: int, constant: bool, remedy: str = "set renormalize = False"
) -> None:
  """Raises ConfigError for weights that are always 1, in which nothing is learnt.

  Args:
    top_k: K.
    constant: whether a token's weights always add up to 1.
    remedy: what to do, for the message.
  """
  if top_k == 1 and constant:
    raise ConfigError(
      "with top_k = 1 a weight over the sum of a token's weights is always 1, so"
      f" the router would learn nothing from the task; {remedy}"
    )


def choice(expert_TK: Array, weight_TK: Array, mask_T: Array) -> TokenChoice:
  """The choice in which every token that is no padding has all its experts.

  Args:
    expert_TK: int32 in [0, E), different for a token.
    weight_TK: their weights.
    mask_T: bool, False for padding.
  """
  valid_TK = jnp.broadcast_to(mask_T[:, None], expert_TK.shape)
  return TokenChoice(expert_TK, weight_TK, valid_TK)


def over_sum(weight_TK: Array, valid_TK: Array) -> Array:
  """Weights over the sum of those that are valid, if it is above 0.

  Args:
    weight_TK: 0 or more, with any axes before.
    valid_TK: bool.
  """
  whole_T1 = jnp.where(valid_TK, weight_TK, 0).sum(-1, keepdims=True)
  return weight_TK / jnp.where(whole_T1 > 0, whole_T1, 1)


@jax.custom_jvp
def normal_cdf(x: Array) -> Array:
  """Phi(x) of the normal distribution, as exactly as the dtype has numbers near 1.

  jax 0.12 has no `erf` inside of a shard_map that checks axes. This is the midpoint
  rule of its integral, with the term for its poles (Matta and Reichel, 1971).

  Args:
    x: any floats.
  """
  far = jnp.abs(x) / math.sqrt(2)
  steps = np.arange(0.25, 6, 0.5) ** 2
  terms = sum(math.exp(-s) / (s + far**2) for s in steps)
  poles = 2 * jax.nn.sigmoid(-4 * math.pi * far)
  tail = (far * jnp.exp(-(far**2)) * terms / math.pi + poles) / 2
  return jnp.where(x < 0, tail, 1 - tail)


@normal_cdf.defjvp
def _normal_cdf_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  return normal_cdf(x), jax.scipy.stats.norm.pdf(x) * dx


def unit(x: Array, axis: int) -> Array:
  """x over its length along an axis; zeros stay zeros.

  Args:
    x: any floats.
    axis: of the length.
  """
  square = jnp.square(x).sum(axis, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, jnp.finfo(x.dtype).tiny))


def probabilities(logits_TE: Array, score: str) -> Array:
  """Scores over their sum, also where they all underflow (2412.19437, 2.1.2).

  Args:
    logits_TE: raw scores.
    score: a key of `SCORES`.
  """
  return jax.nn.softmax(LOG_SCORES[score](logits_TE))


def choose(selection_TE, logits_TE, saturated_TE, top_k: int):
  """The K experts with the largest selection scores, best first: expert_TK.

  A score that has saturated, at 0 or 1, no longer tells experts apart: of such
  experts with the same selection score those with larger logits are chosen.

  Args:
    selection_TE: scores that choose.
    logits_TE: the router's raw scores.
    saturated_TE: bool; None: no score can saturate.
    top_k: K.
  """
  if saturated_TE is None or top_k == selection_TE.shape[1]:
    return jax.lax.top_k(selection_TE, top_k)[1]
  # No slice of these: XLA on CPU would sort all scores for that.
  best_TK, expert_TK = jax.lax.top_k(selection_TE, top_k)
  last_T1 = best_TK.min(-1, keepdims=True)
  tied_TE = selection_TE == last_T1
  more_T1 = (selection_TE >= last_T1).sum(-1, keepdims=True) > top_k
  unclear_T1 = more_T1 & (tied_TE & saturated_TE).any(-1, keepdims=True)
  tied_TE = jnp.where(tied_TE, logits_TE, -jnp.inf)
  _, tied_TK = jax.lax.top_k(tied_TE, top_k)
  # The j-th of the tied stands behind those above them.
  above_TK = best_TK > last_T1
  place_TK = jnp.maximum(jnp.cumsum(~above_TK, axis=1) - 1, 0)
  tied_TK = jnp.take_along_axis(tied_TK, place_TK, axis=1)
  # Computed for every token: to ask whether any needs it stops an accelerator.
  return jnp.where(unclear_T1 & ~above_TK, tied_TK, expert_TK)


def weigh(expert_TK, logits_TE, score_TE, score):
  """(the scores of the chosen experts, these over their sum), both [T, K].

  Where the scores that chose are the logits, the chosen ones are scored here.

  Args:
    expert_TK: the chosen experts.
    logits_TE: raw scores.
    score_TE: the scores that chose, or `logits_TE` itself.
    score: a key of `SCORES`.
  """
  # Read by index, not from top_k: a recompute must use the same experts.
  chosen_TK = jnp.take_along_axis(logits_TE, expert_TK, axis=-1)
  # Scores over their sum, also where they all underflow.
  shares_TK = jax.nn.softmax(LOG_SCORES[score](chosen_TK))
  if score_TE is logits_TE:
    return SCORES[score](chosen_TK), shares_TK
  return jnp.take_along_axis(score_TE, expert_TK, axis=-1), shares_TK
