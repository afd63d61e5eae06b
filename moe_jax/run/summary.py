"""Five lines at the beginning of a run, and a table at its end, for people.

Both are made of the contents of the run's files, which programs read.
"""

import math
from collections.abc import Mapping

# The metrics of the last table, in its order, and their meanings.
_MEANINGS = {
  "loss": "of the task, without the losses of balancers; lower is better",
  "bits_per_byte": "of the text, lower is better",
  "accuracy": "share of right classes, higher is better",
  "accuracy_5": "share with the right class among five, higher is better",
  "max_vio": "largest load over the mean load, minus 1; 0: equal loads",
  "max_vio_floor": "the same of random choices",
  "dropped": "share of assignments that were not computed",
  "dead_experts": "experts that no token chose, mean over layers",
  "experts_per_token": "experts that the router chose, mean",
  "router_entropy": "of the routing probabilities, nats",
}
LINES = ("model", "data", "devices", "recipe", "writes")
_SHOWN_EXPERTS = 3  # Recipes in the line, where layers differ.


def begin(config, facts: Mapping, path) -> str:
  """Returns five lines: the model, the data, devices, the recipe, and the place.

  Args:
    config: of the run.
    facts: of the program, as they go into run.json.
    path: the work directory; None: nothing is written.
  """
  texts = (
    _model(config, facts),
    _data(config, facts),
    _devices(facts),
    _recipe(config, facts),
    f"{path}" if path else "nothing (--dry_run)",
  )
  return "\n".join(f"{name:8} {text}" for name, text in zip(LINES, texts))


def _model(config, facts):
  sizes = facts["parameters"]
  return (
    f"{config.model.name}, {_count(sizes['total'])} parameters,"
    f" {_count(sizes['active'])} of them active for a token"
  )


def _data(config, facts):
  given = facts.get("tokens_per_step")
  batch = f"{config.data.batch_size} rows in a step"
  if given:
    batch += f" ({_count(given)} tokens)"
  name = config.data.dir or config.data.name
  if config.data.mixture:
    name = " + ".join(config.data.mixture)
  return f"{name}, {batch}, fingerprint {facts['data'][:12]}"


def _devices(facts):
  kinds = facts["devices"]
  mesh = {k: n for k, n in facts["mesh"].items() if n > 1}
  split = ", ".join(f"{k}:{n}" for k, n in mesh.items())
  text = f"{len(kinds)} x {kinds[0]}" if kinds else "none"
  used = math.prod(facts["mesh"].values())
  return f"{text}, mesh {split}" if split else f"{text}, {used} used"


def _recipe(config, facts):
  optim, steps = config.optim, config.train.num_steps
  texts = [_experts(x) for x in facts["recipe"].values()]
  more = len(texts) - _SHOWN_EXPERTS
  texts = texts[:_SHOWN_EXPERTS] + [f"{more} more recipes"] * (more > 0)
  experts = "; ".join(texts) or "no experts"
  return (
    f"{experts}; {optim.optimizer.name} at {optim.learning_rate:g},"
    f" {optim.schedule}, {steps:,} steps"
  )


def _experts(recipe):
  router = recipe["router"]
  chosen = f"{router['top_k']} of " if "top_k" in router else ""
  balancers = [x["name"] for x in recipe["balancers"].values()]
  bound = "no token is dropped"
  if slots := recipe.get("capacity"):
    bound = f"{slots} slots in an expert"
  elif factor := recipe.get("capacity_factor"):
    bound = f"capacity factor {factor:g}"
  balanced = (
    f"balanced by {' and '.join(balancers)}" if balancers else "no balancer"
  )
  return f"{router['name']} {chosen}{recipe['num_experts']} experts, {bound}, {balanced}"


def end(values: Mapping[str, float], path, steps: int) -> str:
  """Returns the table of a finished run: the metrics that matter most.

  Args:
    values: the last metrics of the validation split.
    path: the work directory.
    steps: of training.
  """
  rows = [
    (k, values[k], about) for k, about in _MEANINGS.items() if k in values
  ]
  width = max((len(name) for name, _, _ in rows), default=0)
  lines = [f"On the validation split after {steps:,} steps:"]
  lines += [f"  {k:{width}} {x:10.4f}  {about}" for k, x, about in rows]
  return "\n".join(
    [
      *lines,
      f"All {len(values)} metrics are in {path}/metrics.jsonl;"
      f" python -m moe_jax.report {path} draws them.",
    ]
  )


def _count(number) -> str:
  """A number with three digits and a unit: 39.4 K."""
  for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
    if number >= size:
      return f"{number / size:.3g} {unit}"
  return f"{number:.3g}"
