"""Noisy top-k gating: the noise has a size that the router learns (1701.06538).

  H_e = (x W)_e + N(0, 1) * (0.01 + softplus((x V)_e))    (eq. 4)
  chosen = top-k(H); w = softmax of H over the chosen     (eq. 3 and 5)

Noise is added in training only. Losses see the probabilities
without noise, softmax(x W), as in V-MoE, and the chance of each expert if its noise
were drawn again (eq. 9), which `cv_squared` with of = "load" sums up. W and V begin at
zero in the paper; here W is drawn, so that evaluation without noise has no ties. The
0.01 is not in the paper: without any noise a chance has no gradient.

The first sparse mixture of experts of today's form. With noise of a fixed size use
`noise` of the router `top_k` (V-MoE).
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import integer
from moe_jax.moe import scores
from moe_jax.moe.types import GIVEN, Router, Routing

LEAST_NOISE = 0.01
CONTRACT_OPTIONS = {"top_k": 2}
CONTRACT_EXCEPTIONS = {
  "gradient": "the matrix of the noise has none without noise",
}


def build(top_k: integer(2)) -> Router:
  """A router with learnt noise.

  Args:
    top_k: K, 2 or more; with 1 the weight would always be 1.
  """

  def init(rng, d_model, num_experts):
    if top_k >= num_experts:
      raise ConfigError(
        f"the router noisy_top_k needs top_k = {top_k} below num_experts ="
        f" {num_experts}, so that noise can change a choice"
      )
    zeros = jnp.zeros((d_model, num_experts))
    return scores.linear(rng, d_model, num_experts) | {"noise_kernel": zeros}

  def route(params, x_TD, *, num_experts, select, side, rng):
    del num_experts
    noisy_TE = logits_TE = scores.logits(params, x_TD)
    if rng is not None:
      wide_TE = scores.logits({"kernel": params["noise_kernel"]}, x_TD)
      size_TE = LEAST_NOISE + jax.nn.softplus(wide_TE)
      draw_TE = jax.random.normal(rng, logits_TE.shape, logits_TE.dtype)
      noisy_TE = logits_TE + draw_TE * size_TE
    selection_TE = jax.lax.stop_gradient(select(noisy_TE))
    expert_TK = scores.choose(selection_TE, noisy_TE, None, top_k)
    expert_TK = checkpoint_name(expert_TK, "expert")
    chosen_TK = jnp.take_along_axis(noisy_TE, expert_TK, axis=-1)
    choice = scores.choice(expert_TK, jax.nn.softmax(chosen_TK), side.mask_T)
    chance_TE = None
    if rng is not None:
      chance_TE = chances(logits_TE, noisy_TE, size_TE, top_k)
    prob_TE = jax.nn.softmax(logits_TE)
    return Routing(choice, prob_TE, logits_TE, chance_TE, noisy_TE)

  axes = scores.LINEAR_AXES | {"noise_kernel": ("embed", None)}
  return Router(
    *(init, axes, route),
    causal=True,
    top_k=top_k,
    gives=GIVEN | {"chance_TE"},
  )


def chances(logits_TE, noisy_TE, size_TE, top_k: int):
  """Chance of each expert to be chosen, the others' noise as drawn (eq. 9).

  Args:
    logits_TE: without noise.
    noisy_TE: with the noise of this step.
    size_TE: standard deviation of the noise, above 0.
    top_k: K, below E.

  Returns:
    chance_TE, in [0, 1].
  """
  best_TK = jax.lax.top_k(noisy_TE, top_k + 1)[0]
  outside = best_TK.min(-1, keepdims=True)
  # A minimum in place of a slice, for which XLA on CPU would sort all scores.
  place_1K = jnp.arange(top_k + 1)[None, :]
  inside = jnp.where(place_1K < top_k, best_TK, jnp.inf)
  inside = inside.min(-1, keepdims=True)
  # The K-th largest of the other experts.
  rival_TE = jnp.where(noisy_TE >= inside, outside, inside)
  return scores.normal_cdf((logits_TE - rival_TE) / size_TE)
