"""The validation split: the task's and routing metrics, whole and by domain."""

import collections
import functools
import itertools
import statistics
from collections.abc import Mapping

import jax
import numpy as np

from moe_jax import models
from moe_jax.training import balancing, metrics, traces

_AHEAD = 2  # Batches that may be on the devices at once.


def eval_step(params, balance, batch, index, *, model, task, collect=False):
  """Returns the sums of a batch.

  Args:
    params, balance: the model's collections.
    batch: arrays [B, ...].
    index: number of the batch, for a router that draws at evaluation too.
    model: from `models.build`.
    task: `tasks.Task`.
    collect: also return the tokens' choices, as "routing", see `traces.routed`.

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
    **({"collect": "routing"} if collect else {}),
  )
  stats = balancing.statistics(aux, models.sublayers(model))
  made = {"loss": loss, "task": sums, "stats": balancing.sum_groups(stats)}
  if collect:
    lengths = models.lengths(model, task.lengths)
    made["routing"] = traces.routed(aux, model, batch_size, lengths)
  return made


def of_task(model, variables: Mapping, task) -> dict[str, Mapping]:
  """Returns the summed results of `eval_step` for each validation domain.

  Args:
    model, variables: from `trained.load`.
    task: with batches.
  """
  return scorer(model, task)(variables)


def scorer(model, task):
  """Returns variables -> the result of `of_task`, which is compiled once.

  Args:
    model, task: as in `of_task`.
  """
  compiled = jax.jit(functools.partial(eval_step, model=model, task=task))

  def score(variables):
    variables = {"balance": {}, **variables}

    def step(whole, index):
      batch = {k: whole[k] for k in task.spec}
      return compiled(**variables, batch=batch, index=np.int32(index))

    return by_domain(step, task.validation(None))

  return score


def by_domain(step, batches, stop=lambda: False) -> dict[str, Mapping] | None:
  """Returns {domain: the summed results of `eval_step`}; None when stopped.

  Args:
    step: (batch, its number) -> the sums of `eval_step`; may run ahead of the
      host.
    batches: (domain, batch) pairs.
    stop: asked between batches whether to stop.
  """
  sums, waiting = {}, collections.deque()

  def take():
    domain, terms = waiting.popleft()
    terms = jax.device_get(terms)
    sums[domain] = _add([sums[domain], terms] if domain in sums else [terms])

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
    task: `tasks.Task`.
    model: from `models.build`.

  Returns:
    The task's metrics, the routing metrics from the counts of the whole split,
    `max_vio_global` with its floor, by domain `max_vio_global/<domain>` with its
    floor and the task's metrics of domains, and `max_vio_domains`, their mean.
  """
  names = {name: name for name in task.by_domain}
  out = metrics.divide(metrics.of_sums(_add([*sums.values()]), task, model))
  if models.sublayers(model):
    out["max_vio_global"] = out["max_vio"]
    names |= {"max_vio_global": "max_vio", "max_vio_floor": "max_vio_floor"}
  for domain, part in sums.items():
    values = metrics.divide(metrics.of_sums(part, task, model))
    out |= {f"{name}/{domain}": values[of] for name, of in names.items()}
  if models.sublayers(model):
    vios = [out[f"max_vio_global/{domain}"] for domain in sums]
    out["max_vio_domains"] = statistics.fmean(vios)
  return out


def specialisation(sums: Mapping[str, Mapping], sublayers) -> dict:
  """Returns the share of each domain that each expert gets (2409.02060, 5.3).

  Args:
    sums: from `by_domain`.
    sublayers: see `models.sublayers`.

  Returns:
    {(layer, domain): share_E}, shares of the domain's assignments, which add up
    to 1 over experts; zeros where no expert was chosen.
  """
  return {
    (number, domain): layer.count_E / max(layer.count_E.sum(), 1)
    for domain, part in sums.items()
    for number, layer in metrics.by_layer(part["stats"], sublayers).items()
  }


def describe(shares: Mapping, top: int = 3) -> str:
  """Returns a table of the most used experts for every layer and domain.

  Args:
    shares: from `specialisation`.
    top: number of experts in a cell.
  """
  layers, domains = (sorted(set(names)) for names in zip(*shares))

  def most_used(share_E):
    best = sorted(zip(share_E, itertools.count()), reverse=True)[:top]
    return ", ".join(f"{e}: {100 * share:.0f} %" for share, e in best)

  rows = [["layer", *domains], ["---"] * (len(domains) + 1)]
  for layer in layers:
    rows.append([layer, *(most_used(shares[layer, d]) for d in domains)])
  return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _add(trees):
  # Counts beyond 2^24 are not exact in float32.
  trees = [jax.tree.map(lambda x: np.asarray(x, np.float64), t) for t in trees]
  return jax.tree.map(lambda *x: sum(x), *trees)
