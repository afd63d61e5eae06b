"""A feature of the token chooses: its modality, its timestep, its domain.

Experts lie in equal blocks of neighbours, one for each value of the feature. A token
chooses its K experts inside of its block:

  w = softmax of (x W) in the block, of the chosen ones over their sum if `renormalize`
  blocks of one expert: w = 1, and nothing to learn

A feature is a whole number from 0 on. With `boundaries` it may be any number, and its
value is the number of boundaries that it has reached. Wan2.2 has two experts with the
boundary 0.875 of the timestep; BEiT-3 (2208.10442) and MoMa (2407.21770) have experts
for each modality.

A decoder gives `token_id` and `position`: in one whose vocabulary has the codes of
images behind those of text, a boundary between them is the modality. A model of your
own gives what it puts into `side.features`. The data decides the loads of the blocks.
Inside of a block a load loss balances; balancers that shift scores are refused, because
they compare all experts.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import integer, items, number, optional, text
from moe_jax.moe import scores
from moe_jax.moe.types import GIVEN, Router, Routing

CONTRACT_OPTIONS = {
  "top_k": 2,
  "feature": "position",
  "boundaries": (2.0, 7.0),
  "num_values": 3,
}
CONTRACT_EXCEPTIONS = {
  "expert_symmetry": "experts have blocks",
  "token_symmetry": "its feature here is the place of a token",
}


def build(
  top_k: integer(1),
  feature: text(),
  num_values: integer(1),
  boundaries: optional(items(number(), shortest=1)) = None,
  renormalize: bool = False,
) -> Router:
  """A router that chooses in the block of experts of a token's feature.

  Args:
    top_k: K, experts of a token, in its block.
    feature: name in `side.features`.
    num_values: the number of values, and of blocks.
    boundaries: rising limits between the values; None: it is a whole number.
    renormalize: divide the weights by their sum.

  Raises:
    ConfigError: boundaries that are not num_values - 1 rising numbers.
  """
  _check(num_values, boundaries)

  def init(rng, d_model, num_experts):
    size, rest = divmod(num_experts, num_values)
    if rest or top_k > size:
      raise ConfigError(
        f"the router by_feature needs num_experts = {num_experts} in {num_values}"
        f" equal blocks of top_k = {top_k} experts or more"
      )
    scores.refuse_constant(top_k, renormalize and size > 1)
    return scores.linear(rng, d_model, num_experts)

  def route(params, x_TD, *, num_experts, select, side, rng):
    del select, rng  # A shift would compare experts of different blocks.
    block_T = _values(side.features, feature, num_values, boundaries)
    size = num_experts // num_values
    logits_TE = scores.logits(params, x_TD)
    own_TE = jnp.arange(num_experts)[None] // size == block_T[:, None]
    inside_TE = jnp.where(own_TE, logits_TE, -jnp.inf)
    prob_TE = jax.nn.softmax(inside_TE)
    selection_TE = jnp.where(own_TE, jax.lax.stop_gradient(prob_TE), -jnp.inf)
    saturated_TE = (prob_TE <= 0) & own_TE
    expert_TK = scores.choose(selection_TE, inside_TE, saturated_TE, top_k)
    expert_TK = checkpoint_name(expert_TK, "expert")
    weights_TK = scores.weigh(expert_TK, logits_TE, prob_TE, "softmax")
    choice = scores.choice(expert_TK, weights_TK[renormalize], side.mask_T)
    return Routing(choice, prob_TE)

  return Router(
    *(init, scores.LINEAR_AXES, route),
    causal=True,
    top_k=top_k,
    features={feature: num_values if boundaries is None else boundaries},
    gives=GIVEN - {"logits_TE", "selection"},
  )


def _check(num_values, boundaries):
  """Raises ConfigError for boundaries that are not those of the values."""
  if boundaries is None:
    return
  rising = [*boundaries] == sorted(set(boundaries))
  if len(boundaries) != num_values - 1 or not rising:
    raise ConfigError(
      f"boundaries = {boundaries} of the router by_feature are not {num_values - 1}"
      f" rising numbers between num_values = {num_values} values"
    )


def _values(features, name, num_values, boundaries):
  """The value of each token, from 0 to num_values - 1.

  Raises:
    ConfigError: the model does not give the feature.
  """
  if name not in features:
    raise ConfigError(
      f'the router by_feature needs side.features["{name}"], which this model does'
      f" not give; it gives: {', '.join(sorted(features)) or 'none'}"
    )
  x_T = features[name]
  if boundaries is None:
    return jnp.clip(x_T.astype(jnp.int32), 0, num_values - 1)
  ends = jnp.asarray(boundaries, jnp.promote_types(x_T.dtype, jnp.float32))
  return jnp.searchsorted(ends, x_T.astype(ends.dtype), side="right")
