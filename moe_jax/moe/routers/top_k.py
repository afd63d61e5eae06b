"""Token choice: every token goes to the K experts it scores highest.

Switch, GShard, GLaM, Mixtral, DBRX, DeepSeek, Llama 4, Mistral Large 3 and
OLMoE are settings of this one router.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.core.errors import ConfigError, did_you_mean
from moe_jax.moe.types import Router, Routing


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
GROUP_SCORES = {
  "max": lambda score_TGE: score_TGE.max(-1),
  "sum_top_2": lambda score_TGE: jnp.sort(score_TGE)[..., -2:].sum(-1),
}


def build(
  top_k: int,
  score: str = "softmax",
  score_before_top_k: bool = True,
  renormalize: bool = False,
  scale: float = 1.0,
  num_expert_groups: int = 1,
  top_expert_groups: int = 1,
  group_score: str = "max",
  expert_group_mask: str = "-inf",
  jitter: float = 0.0,
  noise: float = 0.0,
  second_expert: str = "all",
  apply_to: str = "output",
  priority: str = "none",
  use_bias: bool = False,
  precision: str = "highest",
  init_scale: float = 1.0,
) -> Router:
  """The router.

  s = score(x W); chosen = top-k(select(s)); w = scale * s[chosen] / norm.

  Args:
    top_k: K, experts per token, >= 1.
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

  Raises:
    ConfigError: an option outside the values above.
  """
  _one_of("score", score, SCORES)
  _one_of("group_score", group_score, GROUP_SCORES)
  _one_of("expert_group_mask", expert_group_mask, ("-inf", "0"))
  _one_of("second_expert", second_expert, ("all", "random"))
  _one_of("apply_to", apply_to, ("output", "input"))
  _one_of("priority", priority, ("none", "score"))
  _one_of("precision", precision, ("default", "high", "highest"))
  for name, value in (("jitter", jitter), ("noise", noise)):
    if value < 0:
      raise ConfigError(f"the router top_k takes {name} >= 0, not {value}")
  if top_k < 1:
    raise ConfigError(f"top_k is at least 1, not {top_k}")
  if top_k == 1 and (
    renormalize or (score == "softmax" and not score_before_top_k)
  ):
    raise ConfigError(
      "with top_k = 1 the one renormalised weight is always 1, so the router"
      " would learn nothing from the task; set renormalize = False"
      " (and score_before_top_k = True for softmax)"
    )
  if second_expert == "random" and top_k != 2:
    raise ConfigError(
      f'second_expert="random" needs top_k = 2, not {top_k};'
      ' set second_expert="all"'
    )
  if not 1 <= top_expert_groups <= num_expert_groups:
    raise ConfigError(
      f"top_expert_groups = {top_expert_groups} is not between 1 and"
      f" num_expert_groups = {num_expert_groups}"
    )

  def init(rng, d_model, num_experts):
    if num_experts % num_expert_groups:
      raise ConfigError(
        f"num_expert_groups = {num_expert_groups} does not divide"
        f" num_experts = {num_experts}"
      )
    inside = num_experts // num_expert_groups * top_expert_groups
    if top_k > inside:
      raise ConfigError(
        f"top_k = {top_k} is more than the {inside} experts it may choose from;"
        " lower top_k, or raise num_experts or top_expert_groups"
      )
    initializer = jax.nn.initializers.variance_scaling(
      init_scale, "fan_in", "truncated_normal"
    )
    params = {"kernel": initializer(rng, (d_model, num_experts))}
    if use_bias:
      params["kernel_bias"] = jnp.zeros(num_experts)
    return params

  def route(params, x_TD, *, num_experts, select, side, rng):
    del num_experts
    dtype = jnp.promote_types(x_TD.dtype, jnp.float32)
    x_TD = x_TD.astype(dtype)
    rngs = (None,) * 3 if rng is None else jax.random.split(rng, 3)
    if jitter and rng is not None:
      low, high = 1 - jitter, 1 + jitter
      x_TD *= jax.random.uniform(rngs[0], x_TD.shape, dtype, low, high)
    kernel_DE = params["kernel"].astype(dtype)
    logits_TE = jnp.dot(x_TD, kernel_DE, precision=precision)
    if use_bias:
      logits_TE += params["kernel_bias"].astype(dtype)[None, :]
    if noise and rng is not None:
      logits_TE += noise * jax.random.normal(rngs[1], logits_TE.shape, dtype)

    score_TE = logits_TE
    if score_before_top_k:
      score_TE = SCORES[score](logits_TE)
    expert_TK = choose(jax.lax.stop_gradient(select(score_TE)))
    # Not top_k's values: a recompute must read what this pass chose.
    chosen_TK = jnp.take_along_axis(logits_TE, expert_TK, axis=-1)
    # Scores over their sum, also where they all underflow.
    shares_TK = jax.nn.softmax(LOG_SCORES[score](chosen_TK))
    if score_before_top_k:
      chosen_TK = jnp.take_along_axis(score_TE, expert_TK, axis=-1)
    else:
      chosen_TK = SCORES[score](chosen_TK)
    weight_TK = shares_TK if renormalize else chosen_TK
    valid_TK = jnp.broadcast_to(side.mask_T[:, None], expert_TK.shape)
    if second_expert == "random" and rng is not None:
      draw_T = jax.random.uniform(rngs[2], side.mask_T.shape, dtype)
      valid_TK = valid_TK.at[:, 1].min(draw_T < 2 * shares_TK[:, 1])
    return Routing(
      expert_TK=expert_TK,
      weight_TK=weight_TK * scale,
      valid_TK=valid_TK,
      priority_TK=best_first(chosen_TK) if priority == "score" else None,
      # Again scores over their sum (2412.19437, 2.1.2).
      prob_TE=jax.nn.softmax(LOG_SCORES[score](logits_TE)),
      logits_TE=logits_TE,
      weight_input=apply_to == "input",
    )

  def choose(selection_TE):
    if top_expert_groups < num_expert_groups:
      selection_TE = best_groups(selection_TE)
    _, expert_TK = jax.lax.top_k(selection_TE, top_k)
    return checkpoint_name(expert_TK, "expert")

  def best_groups(selection_TE):
    by_group = selection_TE.reshape(len(selection_TE), num_expert_groups, -1)
    score_TG = GROUP_SCORES[group_score](by_group)
    _, best = jax.lax.top_k(score_TG, top_expert_groups)
    inside = jax.nn.one_hot(best, num_expert_groups, dtype=bool).any(1)
    outside = float(expert_group_mask)
    by_group = jnp.where(inside[:, :, None], by_group, outside)
    return by_group.reshape(selection_TE.shape)

  def best_first(chosen_TK):
    best_T1 = jax.lax.stop_gradient(chosen_TK.max(-1, keepdims=True))
    return jnp.broadcast_to(best_T1, chosen_TK.shape)

  axes = {"kernel": ("embed", None)}
  if use_bias:
    axes["kernel_bias"] = (None,)
  return Router(
    init=init,
    axes=axes,
    route=route,
    causal=priority == "none",
    top_k=top_k,
  )


def _one_of(option, value, known):
  if value not in known:
    raise ConfigError(
      f'the router top_k has no {option} "{value}"'
      + did_you_mean(str(value), known)
    )
