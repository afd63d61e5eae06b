"""The validation split: loss and routing metrics, whole and by domain."""

import collections
import math
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np

from moe_jax.moe import groups
from moe_jax.moe.types import Mean
from moe_jax.training import losses, metrics

_AHEAD = 2  # Batches that the devices may have in hand.


def eval_step(params, balance, batch, index, *, model, num_bytes_V):
  """Sums of one batch.

  Args:
    params, balance: the model's collections.
    batch: inputs, targets, mask [B, L].
    index: number of the batch, for a router that draws at evaluation too.

    num_bytes_V: bytes of text that each token stands for.

  Returns:
    {"loss": Mean of nats per token, "bytes": of text that the targets stand
    for, "stats": summed over groups}.
  """
  batch_size, length = batch["inputs"].shape
  rng_G = None
  if model.arch.grouping is not None:
    rng_G = groups.keys(
      jax.random.key(0),
      batch_size,
      length,
      model.arch.grouping,
      index * batch_size,
    )
  logits_BLV, aux = model.apply(
    {"params": params, "balance": balance},
    batch["inputs"],
    batch["mask"],
    rng_G,
  )
  return {
    "loss": losses.cross_entropy(logits_BLV, batch["targets"], batch["mask"]),
    "bytes": metrics.num_bytes(num_bytes_V, batch["targets"], batch["mask"]),
    "stats": statistics(aux),
  }


def statistics(aux):
  """{segment: {position: Stats}} out of a model's aux, summed over groups."""
  return {
    segment: {
      position: metrics.sum_groups(entry["stats"])
      for position, entry in positions.items()
    }
    for segment, positions in aux.items()
  }


def evaluate(
  step: Callable,
  batches: Iterable,
  stop: Callable[[], bool],
  *,
  segments,
  recipe,
) -> dict[str, float] | None:
  """All metrics of the split.

  Args:
    step: (batch, its number) -> what `eval_step` returns; may run ahead of the
      host.
    batches: (domain, batch) pairs.
    stop: asked between batches whether to stop.
    segments: `Architecture.segments`.
    recipe: of the MoE layers, or None.

  Returns:
    loss, bits_per_byte, the routing metrics from the counts of the whole
    split, `max_vio_global` with its floor, and by domain
    `max_vio_global/<domain>` with its floor and `bits_per_byte/<domain>`.
    None if it was stopped.
  """
  sums = by_domain(step, batches, stop)
  return None if sums is None else table(sums, segments, recipe)


def by_domain(step, batches, stop=lambda: False) -> dict[str, Mapping] | None:
  """{domain: what `eval_step` returns, summed}; None if it was stopped.

  Args:
    step, batches, stop: as in `evaluate`.
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


def table(sums: Mapping[str, Mapping], segments, recipe) -> dict[str, float]:
  """What `evaluate` returns, of what `by_domain` does."""
  total = _add(list(sums.values()))
  out = summarize(total, segments, recipe)
  if recipe is not None:
    out["max_vio_global"] = out["max_vio"]
  for domain, part in sums.items():
    found = summarize(part, segments, recipe)
    out[f"bits_per_byte/{domain}"] = found["bits_per_byte"]
    if recipe is not None:
      out[f"max_vio_global/{domain}"] = found["max_vio"]
      out[f"max_vio_floor/{domain}"] = found["max_vio_floor"]
  return out


def specialisation(sums: Mapping[str, Mapping], segments) -> list[dict]:
  """How much of each domain each expert gets (OLMoE, 2409.02060, 5.3).

  Args:
    sums: from `by_domain`.
    segments: `Architecture.segments`.

  Returns:
    Rows of layer, domain, expert, and share: of the domain's assignments, which
    add up to 1 over experts.
  """
  rows = []
  for domain, part in sums.items():
    for layer, stats in metrics.by_layer(part["stats"], segments).items():
      count_E = stats.count_E.sum(tuple(range(stats.count_E.ndim - 1)))
      for expert, count in enumerate(count_E):
        row = {"layer": layer, "domain": domain, "expert": expert}
        rows.append(row | {"share": float(count / count_E.sum())})
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


def summarize(sums, segments, recipe) -> dict[str, float]:
  """Metrics of summed batches, divided."""
  means = loss_means(sums)
  if recipe is not None:
    layers = metrics.by_layer(sums["stats"], segments)
    means |= metrics.routing(layers, recipe.router.top_k)
  out = metrics.divide(means)
  if recipe is not None:
    out["max_vio_floor"] = metrics.max_vio_floor(
      int(sums["loss"].weight), recipe.num_experts, recipe.router.top_k
    )
  return out


def loss_means(sums) -> dict[str, Mean]:
  """Cross-entropy in nats per token and in bits per byte of text."""
  nats = sums["loss"].total
  return {
    "loss": sums["loss"],
    "bits_per_byte": Mean(nats / math.log(2), sums["bytes"]),
  }


def _add(trees):
  # Counts beyond 2^24 are not exact in float32.
  trees = [jax.tree.map(lambda x: np.asarray(x, np.float64), t) for t in trees]
  return jax.tree.map(lambda *x: sum(x), *trees)
