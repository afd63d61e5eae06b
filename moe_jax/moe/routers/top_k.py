"""Token choice: every token goes to the K experts it scores highest.

  s = score(x W);  chosen = top-k of the shifted s;  w = scale * s / sum of chosen s

Switch, GShard, GLaM, Mixtral, DBRX, DeepSeek, Llama 4, Mistral Large 3 and
OLMoE are settings of this one router.

The options of `build`:

  top_k: K, experts per token.
  score: "softmax", "sigmoid" (DeepSeek-V3) or "sqrt_softplus".
  score_before_top_k: score all logits, then choose; False: choose by logit,
    then score the chosen ones (Mixtral, gpt-oss, Llama 4).
  renormalize: divide the chosen weights by their sum.
  scale: a factor on the weights, after renormalising.
  num_expert_groups: contiguous groups of experts.
  top_expert_groups: if it is lower, a token chooses in its best groups only
    (DeepSeek-V3, 2412.19437, 2.1.2).
  group_score: of a group, from the selection scores: "max" or "sum_top_2".
  expert_group_mask: score of the experts outside, "-inf" or "0". Published
    codes differ, and so does the choice when biased scores are negative.
  jitter: multiply the router's input by U[1 - jitter, 1 + jitter] (Switch).
  cosine: logits = cos(x, w_e) / temperature, with a temperature that is learnt
    (X-MoE, 2204.09179, 3.2, there on a projection of x).
  noise: add N(0, noise^2) to the logits in training (V-MoE, 2106.05974, takes
    1/E). It changes choices and weights; the losses see the logits without it,
    and the chance of each expert that `cv_squared` asks for.
  second_expert: "all" or "random": use the second expert in training with
    probability min(1, w_2 / second_threshold), where w_1 + w_2 = 1; needs top_k = 2.
  second_threshold: 0.5 in GShard (2006.16668, Algorithm 1), 0.2 in ST-MoE
    (2202.08906, appendix G).
  output_masking: chance that a token gets nothing of its experts in training;
    otherwise all weights are 1 - output_masking times as large (NLLB, 2207.04672).
  apply_to: weights multiply the expert's "output", or its "input" (Llama 4).
  priority: "none", or "score": tokens with the larger best score take their
    slots first (batch prioritised routing, 2106.05974). Not causal.
  use_bias: logits = x W + b (gpt-oss, 2508.10925).
  precision: of the router's matmul on accelerators: "highest" is float32;
    "high" and "default" round the inputs, and flip choices.
  dtype: of the router, from its input to its weights: "float32", or "bfloat16",
    which is the ablation of Switch (2101.03961, Table 2).
  expert_scale: weights times a learnt number for each expert (Gemma 4).
  init_scale: W is truncated normal with variance init_scale / D.
  allow_constant_weight: build a router whose one weight is always 1, as some
    published models have; it would learn nothing from the task.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import integer, number, word
from moe_jax.moe import scores
from moe_jax.moe.scores import SATURATED, SCORES
from moe_jax.moe.types import GIVEN, Router, Routing, TokenChoice

GROUP_SCORES = {
  "max": lambda score_TGE: score_TGE.max(-1),
  "sum_top_2": lambda score_TGE: jnp.sort(score_TGE)[..., -2:].sum(-1),
}


def build(
  top_k: integer(1),
  score: word(*scores.SCORES) = "softmax",
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
  second_threshold: number(above=0, high=1) = 0.5,
  output_masking: number(0, below=1) = 0.0,
  apply_to: word("output", "input") = "output",
  priority: word("none", "score") = "none",
  use_bias: bool = False,
  precision: word("default", "high", "highest") = "highest",
  cosine: bool = False,
  dtype: word("float32", "bfloat16") = "float32",
  expert_scale: bool = False,
  init_scale: number(above=0) = 1.0,
  allow_constant_weight: bool = False,
) -> Router:
  """w = scale * s[chosen] / norm. The head of this file has all options."""
  constant = renormalize or (score == "softmax" and not score_before_top_k)
  groups = num_expert_groups, top_expert_groups
  threshold = second_threshold if second_expert == "random" else None
  _check(top_k, constant and not allow_constant_weight, second_expert, *groups)
  own = use_bias, cosine, expert_scale
  init = functools.partial(_init, own, init_scale, top_k, groups)

  def route(params, x_TD, *, num_experts, select, side, rng):
    rngs = (None,) * 3 if rng is None else jax.random.split(rng, 3)
    x_TD = _jittered(x_TD, rngs[0], jitter)
    clean_TE = _logits(params, x_TD, precision, cosine, dtype)
    logits_TE = _noisy(clean_TE, rngs[1], noise)
    score_TE, saturated_TE = _scored(logits_TE, score_before_top_k and score)
    judged = jax.lax.stop_gradient(select(score_TE)), logits_TE, saturated_TE
    judged = _in_groups(*judged, *groups, group_score, expert_group_mask)
    expert_TK, made_TK = _chosen(*judged, top_k, side)
    chosen_TK, shares_TK = scores.weigh(expert_TK, logits_TE, score_TE, score)
    weight_TK = (shares_TK if renormalize else chosen_TK) * scale
    choice = TokenChoice(
      expert_TK,
      scores.wide(_times_own(weight_TK, expert_TK, params)),
      made_TK & _valid(side.mask_T, shares_TK, threshold, rngs[2]),
      _best_first(chosen_TK) if priority == "score" else None,
      weight_input=apply_to == "input",
    )
    choice = _masked(choice, rng, output_masking)
    routing = _routing(choice, clean_TE, score_TE, score)
    return _with_chances(routing, logits_TE, noise if rng is not None else 0)

  axes = dict.fromkeys(_vectors(1, *own), (None,)) | scores.LINEAR_AXES
  gives = _gives(noise, score_before_top_k and score, *groups)
  # Second experts that are not used are in no trace.
  told = {"gives": gives, "replays": threshold is None}
  return Router(init, axes, route, priority == "none", top_k, **told)


def _init(own, init_scale, top_k, groups, rng, d_model, num_experts):
  """The parameters at the start; `own` says which vectors are there."""
  _check_groups(num_experts, top_k, *groups)
  kernel = scores.linear(rng, d_model, num_experts, init_scale)
  return _vectors(num_experts, *own) | kernel


def _vectors(num_experts, use_bias, cosine, expert_scale):
  """The parameters beside the kernel, at the start."""
  values = {
    "kernel_bias": (use_bias, num_experts, 0.0),
    "temperature": (cosine, 1, 0.07),
    "expert_scale": (expert_scale, num_experts, 1.0),
  }
  return {k: jnp.full(*rest) for k, (wanted, *rest) in values.items() if wanted}


def _scored(logits_TE, score):
  """(scores that choose, where they are saturated); logits if there is no score."""
  if not score:
    return logits_TE, None
  score_TE = SCORES[score](logits_TE)
  return score_TE, SATURATED[score](score_TE)


def _routing(choice, logits_TE, score_TE, score):
  """The decision with what losses and balancers see, without noise."""
  logits_TE, score_TE = scores.wide(logits_TE), scores.wide(score_TE)
  prob_TE = scores.probabilities(logits_TE, score)
  return Routing(choice, prob_TE, logits_TE, score_TE=score_TE)


def _with_chances(routing, noisy_TE, noise):
  """The decision with the chances of experts, where there is noise."""
  if not noise:
    return routing
  args = routing.logits_TE, noisy_TE, routing.choice.expert_TK
  return routing.replace(chance_TE=chances(*args, noise))


def _gives(noise, score, num_groups, top_groups):
  """`Router.gives` of these options; `score` is the one that chooses, if any."""
  if top_groups < num_groups:
    # Quantiles and smooth loads are wrong for a choice inside of groups.
    return _gives(0, score, 1, 1) - {"ungrouped"}
  chance = {"chance_TE"} if noise else set()
  in_range = {"score_range"} if score in ("softmax", "sigmoid") else set()
  return GIVEN | chance | in_range


def _check(top_k, constant, second_expert, num_groups, top_groups):
  """Raises ConfigError for options that do not fit together."""
  remedy = "set renormalize = False, and for softmax score_before_top_k ="
  remedy += " True, or allow_constant_weight = True"
  scores.refuse_constant(top_k, constant, remedy)
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


def _jittered(x_TD, rng, jitter):
  """The router's input, times U[1 - jitter, 1 + jitter] if there is a key."""
  x_TD = scores.wide(x_TD)
  if not jitter or rng is None:
    return x_TD
  low, high = 1 - jitter, 1 + jitter
  return x_TD * jax.random.uniform(rng, x_TD.shape, x_TD.dtype, low, high)


def _logits(params, x_TD, precision, cosine, dtype):
  """The raw scores, without noise, in the dtype of the router."""
  if dtype == "bfloat16":
    x_TD, params = jax.tree.map(_rounded, (x_TD, params))
  if cosine:
    x_TD, kernel_DE = scores.unit(x_TD, -1), scores.unit(params["kernel"], 0)
    logits_TE = scores.logits({"kernel": kernel_DE}, x_TD, precision)
    logits_TE /= params["temperature"].astype(logits_TE.dtype)[None, :]
    if "kernel_bias" in params:
      logits_TE += params["kernel_bias"].astype(logits_TE.dtype)[None, :]
  else:
    logits_TE = scores.logits(params, x_TD, precision)
  return logits_TE.astype(jnp.bfloat16) if dtype == "bfloat16" else logits_TE


def _rounded(x):
  """x with the values of bfloat16."""
  return x.astype(jnp.bfloat16).astype(x.dtype)


def _noisy(logits_TE, rng, noise):
  """The logits plus N(0, noise^2), if there is a key."""
  if not noise or rng is None:
    return logits_TE
  return logits_TE + noise * jax.random.normal(
    rng, logits_TE.shape, logits_TE.dtype
  )


def chances(logits_TE, noisy_TE, expert_TK, noise):
  """The chance that an expert, with fresh noise, reaches the K-th score.

  Args:
    logits_TE: without noise.
    noisy_TE: with the noise of this step.
    expert_TK: the chosen experts.
    noise: standard deviation of the noise, above 0.
  """
  last_T1 = jnp.take_along_axis(noisy_TE, expert_TK, axis=-1).min(
    -1, keepdims=True
  )
  far_TE = (scores.wide(logits_TE) - scores.wide(last_T1)) / noise
  return scores.normal_cdf(far_TE)


def _in_groups(
  selection_TE, logits_TE, saturated_TE, num_groups, top_groups, score, outside
):
  """The arguments of `choose`, with the selection score `outside` for experts
  beyond the best groups."""
  if top_groups == num_groups:
    return selection_TE, logits_TE, saturated_TE

  def by_group(x_TE):
    return x_TE.reshape(len(x_TE), num_groups, -1)

  of_groups = [
    GROUP_SCORES[score](by_group(x)) for x in (selection_TE, logits_TE)
  ]
  full_TG = None if saturated_TE is None else by_group(saturated_TE).any(-1)
  best = scores.choose(*of_groups, full_TG, top_groups)
  inside = jax.nn.one_hot(best, num_groups, dtype=bool).any(1)
  selection_TGE = by_group(selection_TE)
  selection_TGE = jnp.where(inside[..., None], selection_TGE, float(outside))
  return selection_TGE.reshape(selection_TE.shape), logits_TE, saturated_TE


def _chosen(selection_TE, logits_TE, saturated_TE, top_k, side):
  """(expert_TK, whether each choice was made): the best ones, or replayed ones."""
  expert_TK = scores.choose(selection_TE, logits_TE, saturated_TE, top_k)
  made_TK = jnp.ones(expert_TK.shape, bool)
  if (replayed_TK := side.features.get("replayed")) is not None:
    forced_TK = jnp.broadcast_to(
      (replayed_TK >= 0).any(-1)[:, None], made_TK.shape
    )
    made_TK = ~forced_TK | (replayed_TK >= 0)
    replayed_TK = jnp.maximum(replayed_TK, 0).astype(expert_TK.dtype)
    expert_TK = jnp.where(forced_TK, replayed_TK, expert_TK)
  return checkpoint_name(expert_TK, "expert"), made_TK


def _times_own(weight_TK, expert_TK, params):
  """The weights times the experts' own scales, if they have any."""
  if "expert_scale" not in params:
    return weight_TK
  own_E = jnp.asarray(params["expert_scale"], weight_TK.dtype)
  return weight_TK * own_E[expert_TK]


def _valid(mask_T, shares_TK, threshold, rng):
  """Choices of no padding; a random second expert is used by its share."""
  valid_TK = jnp.broadcast_to(mask_T[:, None], shares_TK.shape)
  if threshold is not None and rng is not None:
    draw_T = jax.random.uniform(rng, mask_T.shape, shares_TK.dtype)
    valid_TK = valid_TK.at[:, 1].min(draw_T < shares_TK[:, 1] / threshold)
  return valid_TK


def _masked(choice, rng, chance):
  """A choice in which the weights of some tokens are 0, or all are smaller."""
  if not chance:
    return choice
  factor = 1 - chance
  if rng is not None:
    own = jax.random.fold_in(rng, 3)  # A key beside the three of `route`.
    factor = jax.random.bernoulli(own, factor, choice.weight_TK.shape[:1])
    factor = factor[:, None].astype(choice.weight_TK.dtype)
  return choice.replace(weight_TK=choice.weight_TK * factor)


def _best_first(chosen_TK):
  """The priority of tokens by their best score."""
  best_T1 = jax.lax.stop_gradient(chosen_TK.max(-1, keepdims=True))
  return jnp.broadcast_to(best_T1, chosen_TK.shape)
