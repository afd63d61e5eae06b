"""Statistics of a layer: sums by sequence, which are reduced outside of it."""

import jax
import jax.numpy as jnp

from moe_jax.moe import plans
from moe_jax.moe.types import Plan, Routing, Side, Stats


def report(recipe, routing: Routing, plan: Plan, side: Side, balance) -> Stats:
  """The statistics of all groups.

  Args:
    recipe: `layer.Recipe`.
    routing: with a leading G.
    plan: of this routing.
    side: mask and features, [G, T].
    balance: {balancer label: its state}, for balancers that observe.
  """
  mask_GT = side.mask_T
  dtype = jnp.result_type(*jax.tree.leaves(routing.choice))
  prob_GTE = routing.prob_TE
  if prob_GTE is None:
    prob_GTE = jnp.zeros((*mask_GT.shape, recipe.num_experts), dtype)
  z_GT = jnp.zeros(mask_GT.shape, dtype)
  if routing.logits_TE is not None:
    z_GT = jax.nn.logsumexp(routing.logits_TE, axis=-1) ** 2
  tokens = plans.Tokens(mask_GT, recipe.sequences, prob_GTE)
  by_sequence = tokens.by_sequence
  loads = plan.loads(tokens)
  if not recipe.router.fixed:  # Fewer experts than K are no drop.
    none = jnp.zeros_like(loads.dropped["unrouted"])
    loads = loads.replace(dropped={**loads.dropped, "unrouted": none})
  return Stats(
    **vars(loads),
    tokens=by_sequence(mask_GT.astype(jnp.int32)),
    prob_E=by_sequence(prob_GTE),
    z=by_sequence(z_GT),
    entropy=by_sequence(jax.scipy.special.entr(prob_GTE).sum(-1)),
    extra={k: by_sequence(v) for k, v in routing.extra.items()},
    observed=_observe(recipe, routing, mask_GT, balance),
    groups_per_sequence=recipe.groups_per_sequence,
  )


def _observe(recipe, routing, mask_GT, balance):
  """{label: sums of each group, with an axis of one sequence}."""
  sums = {
    label: jax.vmap(balancer.observe, (None, 0, 0))(
      balance[label], routing, mask_GT
    )
    for label, balancer in recipe.balancers
    if balancer.observe is not None
  }
  return jax.tree.map(lambda x: x[:, None], sums)
