"""Ways to keep experts equally loaded, one file each."""

from moe_jax.core.errors import ConfigError
from moe_jax.moe import types
from moe_jax.moe.types import Balancer, Router

PART = Balancer  # `build` of each file returns one.


def check(recipe, place: str = "moe") -> None:
  """Raises ConfigError for a router and balancers that do not fit together.

  Args:
    recipe: `layer.Recipe`.
    place: key of the config's section, for messages.
  """
  router = recipe.router
  name = router.spec.name if router.spec else "router"
  for label, balancer in recipe.balancers:
    key = f"{place}.balancers.{label}"
    for fact in missing(router, balancer):
      raise ConfigError(
        f'{key} needs {types.FACTS[fact]}, which the router "{name}" with these'
        f" options does not have; leave it out, or change {place}.router"
      )
    if balancer.targets is not None:
      _check_targets(recipe, balancer.targets, f"{key}.targets")
  given = frozenset().union(*(b.gives for _, b in recipe.balancers))
  for fact in sorted(router.needs - given):
    raise ConfigError(
      f'{place}.router "{name}" needs {types.FACTS[fact]} from a balancer; add one'
      f" that gives it to {place}.balancers, see docs/routing.md"
    )


def missing(router: Router, balancer: Balancer) -> list[str]:
  """The keys of `types.FACTS` that a balancer needs and a router lacks."""
  needs = set(balancer.needs) | ({"selection"} if balancer.select else set())
  return sorted(needs - router.gives)


def _check_targets(recipe, targets, key):
  """Raises ConfigError for shares that experts cannot have."""
  if len(targets) != recipe.pool:
    raise ConfigError(
      f"{key} has {len(targets)} shares for num_experts = {recipe.pool}; give one"
      " for each expert"
    )
  top_k = recipe.router.top_k
  if top_k is not None and max(targets) * top_k > 1 + 1e-6:
    raise ConfigError(
      f"{key} has the share {max(targets):g}, which no expert can have: a token"
      f" that chooses {top_k} different experts gives each at most {1 / top_k:g}"
    )
