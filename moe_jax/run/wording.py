"""Words for what config.json and run.json say of a run.

Both the lines that a run begins with and its page are made of them. Either file
may be of another version or damaged: what cannot be read becomes "".
"""

import math
from typing import Any

_UNITS = {"trillion": 10**12, "billion": 10**9, "million": 10**6}
_SHOWN_LINES = 10
_SHOWN_RECIPES = 3  # Recipes in a line, where layers differ.


def at(tree: Any, key: str) -> Any:
  """Returns a value of nested dicts; None if it is not there.

  Args:
    tree: the dicts.
    key: names with dots between them, from the outside in.
  """
  for name in key.split("."):
    tree = tree.get(name) if isinstance(tree, dict) else None
  return tree


def count(value: Any) -> str:
  """Returns a count such as 477,824 or 12.3 billion; "" for anything else."""
  if type(value) not in (int, float) or not 0 <= value < 1e18:
    return ""
  for word, size in _UNITS.items():
    if value >= size:
      return f"{value / size:.4g} {word}"
  return f"{value:,.0f}"


def damaged(numbers: list[int], whole: list, file) -> str:
  """Returns words such as "2 of 66 lines of FILE cannot be read: 5, 66".

  They are "" if all lines can be read.

  Args:
    numbers: of the lines that cannot be read, from 1.
    whole: the other lines.
    file: its name or path.
  """
  shown = ", ".join(map(str, numbers[:_SHOWN_LINES]))
  shown += ", ..." * (len(numbers) > _SHOWN_LINES)
  of = f"{len(numbers):,} of {len(numbers) + len(whole):,} lines of {file}"
  return f"{of} cannot be read: {shown}" if numbers else ""


def parameters(facts: dict) -> str:
  """Returns the parameters of the model, in all and for a token.

  Args:
    facts: of run.json.
  """
  total, active = (
    count(at(facts, f"parameters.{name}")) for name in ("total", "active")
  )
  both = active and active != total
  return f"{total}, of which {active} active" if both else total


def data(config: dict) -> str:
  """Returns the names of the datasets, or the folder that the data are in.

  Args:
    config: of the run, as dicts.
  """
  mixture = at(config, "data.mixture")
  if isinstance(mixture, dict) and mixture:
    return " + ".join(map(str, mixture))
  return str(at(config, "data.dir") or at(config, "data.name") or "")


def devices(facts: dict) -> str:
  """Returns the devices, and how many are used, or the mesh of several.

  Args:
    facts: of run.json.
  """
  kinds, mesh = at(facts, "devices"), at(facts, "mesh")
  if not isinstance(kinds, list):
    return ""
  kinds = [str(kind) for kind in kinds]
  words = ", ".join(f"{kinds.count(k)} × {k}" for k in dict.fromkeys(kinds))
  sizes = mesh if isinstance(mesh, dict) else {}
  sizes = {k: n for k, n in sizes.items() if type(n) is int and n > 1}
  split = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
  used = math.prod(sizes.values())
  words += f"; mesh {split}" if split else ""
  return f"{words}; {used} used" if used < len(kinds) else words


def experts(facts: dict) -> str:
  """Returns the routers, experts, bounds and balancers of the MoE layers.

  Args:
    facts: of run.json.
  """
  recipes = at(facts, "recipe")
  if not isinstance(recipes, dict):
    return ""
  texts = [_recipe(recipe) for recipe in recipes.values()]
  more = len(texts) - _SHOWN_RECIPES
  texts = texts[:_SHOWN_RECIPES] + [f"{more} more recipes"] * (more > 0)
  return "; ".join(texts) or "no experts"


def _recipe(recipe):
  chosen = at(recipe, "router.top_k")
  chosen = "" if chosen is None else f"{chosen} of "
  bound = "no token is dropped"
  if slots := at(recipe, "capacity"):
    bound = f"{slots} slots in an expert"
  elif factor := at(recipe, "capacity_factor"):
    bound = f"capacity factor {factor}"
  balancers = at(recipe, "balancers")
  balancers = balancers if isinstance(balancers, dict) else {}
  names = " and ".join(str(at(x, "name")) for x in balancers.values())
  balanced = f"balanced by {names}" if names else "no balancer"
  number = at(recipe, "num_experts")
  router = at(recipe, "router.name")
  return f"{router} {chosen}{number} experts, {bound}, {balanced}"
