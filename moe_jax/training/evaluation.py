"""The validation split: the task's and routing metrics, whole and by domain."""

import collections
from collections.abc import Mapping

import jax
import numpy as np

from moe_jax import models
from moe_jax.training import balancing, metrics

_AHEAD = 2  # Batches that the devices may have in hand.


def eval_step(params, balance, batch, index, *, model, task):
  """Sums of one batch.

  Args:
    params, balance: the model's collections.
    batch: arrays [B, ...].
    index: number of the batch, for a router that draws at evaluation too.
    model: from `models.build`.
    task: `task.Task`.

  Returns:
    {"loss": Mean, "task": the task's sums, "stats": summed over groups}.
  """
  batch_size = len(jax.tree.leaves(batch)[0])
  loss, sums, aux = task.loss(
    model,
    {"params": params, "balance": balance},
    batch,
    jax.random.key(0),
    index * batch_size,
    train=False,
  )
  stats = balancing.statistics(aux, models.sublayers(model))
  return {"loss": loss, "task": sums, "stats": balancing.sum_groups(stats)}


def by_domain(step, batches, stop=lambda: False) -> dict[str, Mapping] | None:
  """{domain: what `eval_step` returns, summed}; None if it was stopped.

  Args:
    step: (batch, its number) -> the sums of `eval_step`; may run ahead of the
      host.
    batches: (domain, batch) pairs.
    stop: asked between batches whether to stop.
  """
  sums, waiting = {}, collections.deque()

  def take():
    domain, found = waiting.popleft()
    found = jax.device_get(found)
    sums[domain] = _add([sums[domain], found] if domain in sums else [found])

  for index, (domain, batch) in enumerate(batches):
    if stop():
      return None
    waiting.append((domain, step(batch, index)))
    if len(waiting) > _AHEAD:
      take()
  while waiting:
    take()
  return sums


def table(sums: Mapping[str, Mapping], task, model) -> dict[str, float]:
  """Turns per-domain sums from `by_domain` into metrics.

  Args:
    sums: from `by_domain`.
    task: `task.Task`.
    model: from `models.build`.

  Returns:
    The task's metrics, the routing metrics from the counts of the whole split,
    `max_vio_global` with its floor, and by domain `max_vio_global/<domain>`
    with its floor and the task's metrics of domains.
  """
  sparse = bool(models.sublayers(model))
  out = summarize(_add(list(sums.values())), task, model)
  if sparse:
    out["max_vio_global"] = out["max_vio"]
  for domain, part in sums.items():
    of_domain = summarize(part, task, model)
    for name in task.by_domain:
      out[f"{name}/{domain}"] = of_domain[name]
    if sparse:
      out[f"max_vio_global/{domain}"] = of_domain["max_vio"]
      out[f"max_vio_floor/{domain}"] = of_domain["max_vio_floor"]
  return out


def specialisation(sums: Mapping[str, Mapping], sublayers) -> list[dict]:
  """How much of each domain each expert gets (OLMoE, 2409.02060, 5.3).

  Args:
    sums: from `by_domain`.
    sublayers: see `models.sublayers`.

  Returns:
    Rows of layer, domain, expert, and share: of the domain's assignments, which
    add up to 1 over experts.
  """
  rows = []
  for domain, part in sums.items():
    for number, layer in metrics.by_layer(part["stats"], sublayers).items():
      for expert, count in enumerate(layer.count_E):
        row = {"layer": number, "domain": domain, "expert": expert}
        rows.append(row | {"share": float(count / layer.count_E.sum())})
  return rows


def describe(rows: list[dict], top: int = 3) -> str:
  """For every layer and domain, its most used experts, as a table.

  Args:
    rows: from `specialisation`.
    top: how many.
  """
  found = collections.defaultdict(list)
  for row in rows:
    found[row["layer"], row["domain"]].append((row["share"], row["expert"]))
  domains = sorted({domain for _, domain in found})
  lines = [
    f"| layer | {' | '.join(domains)} |",
    "|---" * (len(domains) + 1) + "|",
  ]
  for layer in sorted({layer for layer, _ in found}):
    cells = []
    for domain in domains:
      best = sorted(found[layer, domain], reverse=True)[:top]
      cells.append(", ".join(f"{e}: {100 * share:.0f} %" for share, e in best))
    lines.append(f"| {layer} | {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def summarize(sums, task, model) -> dict[str, float]:
  """Metrics of summed batches, divided."""
  layers = metrics.by_layer(sums["stats"], models.sublayers(model))
  out = metrics.divide(
    task.metrics(sums["loss"], sums["task"]) | metrics.routing(layers)
  )
  if layers:
    out["max_vio_floor"] = metrics.mean_floor(layers)
  return out


def _add(trees):
  # Counts beyond 2^24 are not exact in float32.
  trees = [jax.tree.map(lambda x: np.asarray(x, np.float64), t) for t in trees]
  return jax.tree.map(lambda *x: sum(x), *trees)
