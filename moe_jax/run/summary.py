"""Five lines at the beginning of a run, and a table at its end, for people.

Both are made of the contents of the run's files, which programs read.
"""

from collections.abc import Mapping

from moe_jax.run import wording
from moe_jax.run.pages import words

# The metrics of the last table, in its order, and their meanings.
_MEANINGS = {
  "loss": "{unit}, without the losses of balancers; lower is better",
  "bits_per_byte": "of the text, lower is better",
  "accuracy": "share of right classes, higher is better",
  "accuracy_5": "share with the right class among five, higher is better",
  "max_vio": "largest load over the mean load, minus 1; 0: equal loads",
  "max_vio_floor": "the same of random choices",
  "dropped": "share of assignments that were not computed; 0 is best",
  "dead_experts": "experts that no token chose, mean over layers; 0 is best",
  "experts_per_token": "experts that the router chose, mean",
  "router_entropy": "of the routing probabilities, nats",
}
LINES = ("model", "data", "devices", "recipe", "writes")


def begin(config, facts: Mapping, path) -> str:
  """Returns five lines: the model, the data, devices, the recipe, and the place.

  Args:
    config: of the run.
    facts: of the program, as they go into run.json.
    path: the work directory; None: nothing is written.
  """
  texts = (
    f"{config.model.name}, parameters: {wording.parameters(facts)}",
    _data(config, facts),
    wording.devices(facts),
    _recipe(config, facts),
    f"{path}" if path else "nothing (--dry_run)",
  )
  return "\n".join(f"{name:8} {text}" for name, text in zip(LINES, texts))


def _data(config, facts):
  batch = f"{config.data.batch_size} rows in a step"
  if tokens := facts.get("tokens_per_step"):
    batch += f" ({wording.count(tokens)} tokens)"
  name = facts.get("data_about") or wording.data(config.to_dict())
  return f"{name}, {batch}, fingerprint {facts['data'][:12]}"


def _recipe(config, facts):
  optim, steps = config.optim, config.train.num_steps
  return (
    f"{wording.experts(facts)}; {optim.optimizer.name} at"
    f" {optim.learning_rate:g}, {optim.schedule}, {steps:,} steps"
  )


def end(values: Mapping[str, float], path, config) -> str:
  """Returns the table of a finished run: the metrics that matter most.

  Args:
    values: the last metrics of the validation split.
    path: the work directory.
    config: of the run.
  """
  unit = words.loss_unit([config.task.name])
  rows = [
    (k, values[k], about.format(unit=unit))
    for k, about in _MEANINGS.items()
    if k in values
  ]
  width = max((len(name) for name, _, _ in rows), default=0)
  batches = config.eval.batches_per_domain
  part = f", {batches} batches of {config.eval.batch_size} rows for each domain"
  part = "" if batches is None else part
  steps = config.train.num_steps
  lines = [f"On the validation split{part}, after {steps:,} steps:"]
  lines += [f"  {k:{width}} {x:10.4f}  {about}" for k, x, about in rows]
  return "\n".join(
    [
      *lines,
      f"All {len(values)} metrics are in {path}/metrics.jsonl;"
      f" moe-jax report {path} draws them.",
    ]
  )
