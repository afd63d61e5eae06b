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
    if recipe.cheap and "networks" in balancer.needs:
      raise ConfigError(
        f"{key} needs {types.FACTS['networks']}, and {place} has"
        f" {recipe.cheap.width} of them; leave one or the other out"
      )
    if balancer.per_token is not None:
      _check_number(recipe, balancer.per_token(recipe.pool), key, place)
    if balancer.max_vio is not None:
      _check_max_vio(recipe, balancer.max_vio, f"{key}.target")
    if balancer.targets is not None:
      _check_targets(recipe, balancer.targets, f"{key}.targets")
  shifting = [k for k, b in recipe.balancers if b.select is not None]
  if len(shifting) > 1:
    raise ConfigError(
      f"{place}.balancers {' and '.join(shifting)} both shift the scores that choose,"
      " and each moves as if it were alone; keep one of them"
    )
  smooth = [k for k, b in recipe.balancers if "chance_TE" in b.needs]
  if smooth and shifting:
    raise ConfigError(
      f"{place}.balancers.{smooth[0]} computes smooth loads without the shifts of"
      f" {place}.balancers.{shifting[0]}, so that they are not the loads of the choice;"
      " keep one of them"
    )
  given = frozenset().union(*(b.gives for _, b in recipe.balancers))
  for fact in sorted(router.needs - given):
    raise ConfigError(
      f'{place}.router "{name}" needs {types.FACTS[fact]} from a balancer; add one'
      f" that gives it to {place}.balancers, see docs/routing.md"
    )


def missing(router: Router, balancer: Balancer) -> list[str]:
  """The keys of `types.FACTS` that a balancer needs and a router lacks.

  Args:
    router: any router.
    balancer: any balancer.

  Returns:
    The keys in alphabetical order, with "selection" first.
  """
  needs = set(balancer.needs) | ({"selection"} if balancer.select else set())
  given = router.gives | {"networks"} | ({"fixed"} if router.fixed else set())
  return sorted(needs - given, key=lambda fact: (fact != "selection", fact))


def _check_number(recipe, wanted, key, place):
  """Raises ConfigError for a balancer of another number of experts per token."""
  router = recipe.router
  taken = router.average_k or router.top_k
  if taken is not None and abs(wanted - taken) > 1e-3 * taken:
    option = "average or top_k" if not router.fixed else "top_k"
    raise ConfigError(
      f"{key} is for {wanted:g} experts of a token, and {place}.router has"
      f" {taken:g}; make the options of {key} and its {option} agree"
    )


def _check_max_vio(recipe, target, key):
  """Raises ConfigError for a MaxVio that loads do not reach, however uneven."""
  # Where the number of experts varies, all tokens may choose a single expert.
  all_of_them = recipe.router.top_k or recipe.pool
  taken = all_of_them if recipe.router.fixed else 1
  most = recipe.pool / taken - 1
  if target >= most:
    raise ConfigError(
      f"{key} = {target:g} is not below {most:g}, the largest MaxVio of {recipe.pool}"
      f" experts with {taken:g} of them for a token; lower it"
    )


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
