"""Hierarchical gating: a router chooses groups, and another their experts.

  p = softmax(x U) over the groups;  q_g = softmax of (x W) inside of group g
  chosen = in each of the best `top_groups` groups its best top_k / top_groups experts
  w_e = p_g q_ge over the sum of the chosen ones, if `renormalize`

(After Shazeer et al., 1701.06538, appendix B, eq. 12, without noise; there each gate
is a softmax over the chosen ones, and here over all.) A token's experts lie
in few groups, so that it is sent to few devices, and the softmaxes stay small when
experts are thousands. A good expert in a group that is not chosen is never seen.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import integer
from moe_jax.moe import scores
from moe_jax.moe.types import GIVEN, Router, Routing

CONTRACT_OPTIONS = {"top_k": 2, "num_groups": 3, "top_groups": 2}
CONTRACT_EXCEPTIONS = {"expert_symmetry": "experts have groups"}


def build(
  top_k: integer(1),
  num_groups: integer(2),
  top_groups: integer(1) = 1,
  renormalize: bool = False,
) -> Router:
  """A router that chooses groups of experts, and experts inside of them.

  Args:
    top_k: K, experts of a token in all its groups together.
    num_groups: groups of equally many neighbouring experts.
    top_groups: groups of a token; it divides K.
    renormalize: divide the weights by their sum; not with top_k = 1.

  Raises:
    ConfigError: `top_groups` does not divide K, or the one weight is always 1.
  """
  if top_k % top_groups:
    raise ConfigError(
      f"the router hierarchical needs top_groups = {top_groups} to divide top_k ="
      f" {top_k}"
    )
  scores.refuse_constant(top_k, renormalize)
  inside = top_k // top_groups

  def init(rng, d_model, num_experts):
    size, rest = divmod(num_experts, num_groups)
    if rest or inside > size or top_groups > num_groups:
      raise ConfigError(
        f"the router hierarchical cannot take {top_groups} of num_groups ="
        f" {num_groups} groups and {inside} experts in each: num_experts ="
        f" {num_experts}"
      )
    rngs = jax.random.split(rng)
    groups = scores.linear(rngs[1], d_model, num_groups)["kernel"]
    return scores.linear(rngs[0], d_model, num_experts) | {"groups": groups}

  def route(params, x_TD, *, num_experts, select, side, rng):
    del num_experts, select, rng
    logits_TE = scores.logits(params, x_TD)
    logits_TM = scores.logits({"kernel": params["groups"]}, x_TD)
    by_group = logits_TE.reshape(len(x_TD), num_groups, -1)  # [T, M, E/M]
    log_TE = jax.nn.log_softmax(logits_TM)[..., None]
    log_TE = (log_TE + jax.nn.log_softmax(by_group)).reshape(logits_TE.shape)
    expert_TK = choose(logits_TM, by_group, log_TE, top_groups, inside)
    expert_TK = checkpoint_name(expert_TK, "expert")
    log_TK = jnp.take_along_axis(log_TE, expert_TK, axis=-1)
    weight_TK = jax.nn.softmax(log_TK) if renormalize else jnp.exp(log_TK)
    choice = scores.choice(expert_TK, weight_TK, side.mask_T)
    return Routing(choice, jnp.exp(log_TE))

  axes = scores.LINEAR_AXES | {"groups": ("embed", None)}
  return Router(
    *(init, axes, route),
    causal=True,
    top_k=top_k,
    gives=GIVEN - {"selection", "logits_TE"},
  )


def choose(logits_TM, by_group, log_TE, top_groups: int, inside: int):
  """The best experts of the best groups, best first: expert_TK.

  Args:
    logits_TM: of the groups.
    by_group: logits of the experts in each group, [T, groups, experts].
    log_TE: logarithms of all experts' probabilities.
    top_groups: groups of a token.
    inside: experts of a token in each of them.
  """
  group_TA = jax.lax.top_k(jax.lax.stop_gradient(logits_TM), top_groups)[1]
  of_groups = jnp.take_along_axis(by_group, group_TA[..., None], axis=1)
  best = jax.lax.top_k(jax.lax.stop_gradient(of_groups), inside)[1]
  expert_TK = group_TA[..., None] * by_group.shape[-1] + best
  expert_TK = expert_TK.reshape(len(by_group), -1)
  log_TK = jnp.take_along_axis(log_TE, expert_TK, axis=-1)
  order_TK = jnp.argsort(-jax.lax.stop_gradient(log_TK), axis=-1)
  return jnp.take_along_axis(expert_TK, order_TK, axis=-1)
