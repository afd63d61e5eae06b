"""Token choice: every token goes to the K experts it scores highest.

Switch, GShard, GLaM, Mixtral, DBRX, DeepSeek, Llama 4, Mistral Large 3 and
OLMoE are settings of this one router.

The options of `build`:

  top_k: K, experts per token.
  score: "softmax", "sigmoid" (DeepSeek-V3) or "sqrt_softplus".
  score_before_top_k: score all logits, then choose; False: choose by logit,
    then score the chosen ones (Mixtral, gpt-oss, Llama 4).
  renormalize: divide the chosen weights by their sum.
  scale: a factor on the weights, after renormalising.
  num_expert_groups: contiguous groups of experts; with top_expert_groups <
    num_expert_groups a token chooses in its best groups only
    (DeepSeek-V3, 2412.19437, 2.1.2).
  group_score: of a group, from the selection scores: "max" or "sum_top_2".
  expert_group_mask: score of the experts outside, "-inf" or "0". Published
    codes differ, and so does the choice when biased scores are negative.
  jitter: multiply the router's input by U[1 - jitter, 1 + jitter] (Switch).
  noise: add N(0, noise^2) to the logits (V-MoE takes 1/E).
  second_expert: "all" or "random": use the second expert with probability
    min(1, 2 w_2) (GShard, 2006.16668 Algorithm 1); needs top_k = 2.
  apply_to: weights multiply the expert's "output", or its "input" (Llama 4).
  priority: "none", or "score": tokens with the larger best score take their
    slots first (batch prioritised routing, 2106.05974). Not causal.
  use_bias: logits = x W + b (gpt-oss, 2508.10925).
  precision: of the router's matmul on accelerators: "highest" is float32;
    "high" and "default" round the inputs, and flip choices.
  init_scale: W is truncated normal with variance init_scale / D.
  allow_constant_weight: build a router whose one weight is always 1, as some
    published models have; it would learn nothing from the task.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import integer, number, word
from moe_jax.moe.types import Router, Routing, TokenChoice


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
GROUP_SCORES = {
  "max": lambda score_TGE: score_TGE.max(-1),
  "sum_top_2": lambda score_TGE: jnp.sort(score_TGE)[..., -2:].sum(-1),
}


def build(
  top_k: integer(1),
  score: word(*SCORES) = "softmax",
  score_before_top_k: bool = True,
  renormalize: bool = False,
  scale: number(above=0) = 1.0,
  num_expert_groups: integer(1) = 1,
  top_expert_groups: integer(1) = 1,
  group_score: word(*GROUP_SCORES) = "max",
  expert_group_mask: word("-inf", "0") = "-inf",
  jitter: number(0, 1) = 0.0,
  noise: number(0) = 0.0,
  second_expert: word("all", "random") = "all",
  apply_to: word("output", "input") = "output",
  priority: word("none", "score") = "none",
  use_bias: bool = False,
  precision: word("default", "high", "highest") = "highest",
  init_scale: number(above=0) = 1.0,
  allow_constant_weight: bool = False,
) -> Router:
  """s = score(x W); chosen = top-k(select(s)); w = scale * s[chosen] / norm.

  The head of this file describes the options.
  """
  constant = renormalize or (score == "softmax" and not score_before_top_k)
  groups = num_expert_groups, top_expert_groups
  _check(top_k, constant and not allow_constant_weight, second_expert, *groups)

  def init(rng, d_model, num_experts):
    _check_groups(num_experts, top_k, *groups)
    return _init(rng, d_model, num_experts, use_bias, init_scale)

  def route(params, x_TD, *, num_experts, select, side, rng):
    rngs = (None,) * 3 if rng is None else jax.random.split(rng, 3)
    logits_TE = _logits(params, x_TD, rngs, jitter, noise, precision)
    score_TE = SCORES[score](logits_TE) if score_before_top_k else logits_TE
    selection_TE = jax.lax.stop_gradient(select(score_TE))
    saturated_TE = SATURATED[score](score_TE) if score_before_top_k else None
    scores = selection_TE, logits_TE, saturated_TE
    if top_expert_groups < num_expert_groups:
      outside = float(expert_group_mask)
      scores = _in_groups(*scores, *groups, group_score, outside)
    expert_TK = checkpoint_name(choose(*scores, top_k), "expert")
    chosen_TK, shares_TK = weigh(expert_TK, logits_TE, score_TE, score)
    weight_TK = shares_TK if renormalize else chosen_TK
    choice = TokenChoice(
      expert_TK,
      weight_TK * scale,
      _valid(side.mask_T, shares_TK, second_expert, rngs[2]),
      _best_first(chosen_TK) if priority == "score" else None,
      weight_input=apply_to == "input",
    )
    # Again scores over their sum (2412.19437, 2.1.2).
    prob_TE = jax.nn.softmax(LOG_SCORES[score](logits_TE))
    return Routing(choice, prob_TE=prob_TE, logits_TE=logits_TE)

  axes = {"kernel": ("embed", None)}
  if use_bias:
    axes["kernel_bias"] = (None,)
  return Router(init, axes, route, causal=priority == "none", top_k=top_k)


def _check(top_k, constant, second_expert, num_groups, top_groups):
  """Raises ConfigError for options that do not fit together."""
  if top_k == 1 and constant:
    raise ConfigError(
      "with top_k = 1 a weight over the sum of a token's weights is always 1, so"
      " the router would learn nothing from the task; set renormalize = False,"
      " and for softmax score_before_top_k = True, or allow_constant_weight ="
      " True"
    )
  if second_expert == "random" and top_k != 2:
    raise ConfigError(
      f'second_expert="random" needs top_k = 2, not {top_k};'
      ' set second_expert="all"'
    )
  if top_groups > num_groups:
    raise ConfigError(
      f"top_expert_groups = {top_groups} is more than num_expert_groups ="
      f" {num_groups}; change one of them"
    )


def _check_groups(num_experts, top_k, num_groups, top_groups):
  """Raises ConfigError where a token cannot choose K experts."""
  if num_experts % num_groups:
    raise ConfigError(
      f"num_expert_groups = {num_groups} does not divide"
      f" num_experts = {num_experts}"
    )
  inside = num_experts // num_groups * top_groups
  if top_k > inside:
    raise ConfigError(
      f"top_k = {top_k} is more than the {inside} experts it may choose from;"
      " lower top_k, or raise num_experts or top_expert_groups"
    )


def _init(rng, d_model, num_experts, use_bias, init_scale):
  """The parameters."""
  initializer = jax.nn.initializers.variance_scaling(
    init_scale, "fan_in", "truncated_normal"
  )
  params = {"kernel": initializer(rng, (d_model, num_experts))}
  if use_bias:
    params["kernel_bias"] = jnp.zeros(num_experts)
  return params


def _logits(params, x_TD, rngs, jitter, noise, precision):
  """x W + b; rngs are keys for jitter and noise, or None for neither."""
  dtype = jnp.promote_types(x_TD.dtype, jnp.float32)
  x_TD = x_TD.astype(dtype)
  if jitter and rngs[0] is not None:
    low, high = 1 - jitter, 1 + jitter
    x_TD *= jax.random.uniform(rngs[0], x_TD.shape, dtype, low, high)
  kernel_DE = params["kernel"].astype(dtype)
  logits_TE = jnp.dot(x_TD, kernel_DE, precision=precision)
  if "kernel_bias" in params:
    logits_TE += params["kernel_bias"].astype(dtype)[None, :]
  if noise and rngs[1] is not None:
    logits_TE += noise * jax.random.normal(rngs[1], logits_TE.shape, dtype)
  return logits_TE


def _in_groups(
  selection_TE, logits_TE, saturated_TE, num_groups, top_groups, score, outside
):
  """The arguments of `choose`, with the selection score `outside` for experts
  beyond the best groups."""

  def by_group(x_TE):
    return x_TE.reshape(len(x_TE), num_groups, -1)

  of_groups = [
    GROUP_SCORES[score](by_group(x)) for x in (selection_TE, logits_TE)
  ]
  full_TG = None if saturated_TE is None else by_group(saturated_TE).any(-1)
  best = choose(*of_groups, full_TG, top_groups)
  inside = jax.nn.one_hot(best, num_groups, dtype=bool).any(1)
  selection_TGE = jnp.where(inside[..., None], by_group(selection_TE), outside)
  return selection_TGE.reshape(selection_TE.shape), logits_TE, saturated_TE


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
  """(the scores of the chosen experts, these over their sum).

  Where the scores that chose are the logits, the chosen ones are scored here.
  """
  # Not top_k's values: a recompute must read what this pass chose.
  chosen_TK = jnp.take_along_axis(logits_TE, expert_TK, axis=-1)
  # Scores over their sum, also where they all underflow.
  shares_TK = jax.nn.softmax(LOG_SCORES[score](chosen_TK))
  if score_TE is logits_TE:
    return SCORES[score](chosen_TK), shares_TK
  return jnp.take_along_axis(score_TE, expert_TK, axis=-1), shares_TK


def _valid(mask_T, shares_TK, second_expert, rng):
  """Choices of no padding; a random second expert is used by its share."""
  valid_TK = jnp.broadcast_to(mask_T[:, None], shares_TK.shape)
  if second_expert == "random" and rng is not None:
    draw_T = jax.random.uniform(rng, mask_T.shape, shares_TK.dtype)
    valid_TK = valid_TK.at[:, 1].min(draw_T < 2 * shares_TK[:, 1])
  return valid_TK


def _best_first(chosen_TK):
  """The priority of tokens by their best score."""
  best_T1 = jax.lax.stop_gradient(chosen_TK.max(-1, keepdims=True))
  return jnp.broadcast_to(best_T1, chosen_TK.shape)
