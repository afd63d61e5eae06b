"""All metrics, with the same names for every router, on host arrays.

All arguments are sums, and each metric is divided once, here. `max_vio` and
similar metrics are not means over tokens: they are computed from the counts of
a whole step (or a whole split) and then averaged over layers and steps.
"""

import functools
import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import models
from moe_jax.moe.types import Mean, Router, Stats, Sublayer
from moe_jax.training import balancing


class Layer(NamedTuple):
  """Statistics of one MoE layer, summed over groups, as numpy arrays.

  stats: the sums.
  router: its `Router`, which says how many experts a token gets.
  num_experts: E, without cheap experts, see `moe.pool`; None: it has no cheap
    ones.
  """

  stats: Stats
  router: Router
  num_experts: int | None = None

  @property
  def count_E(self) -> np.ndarray:
    """Assignments to each expert, without the cheap ones."""
    return self.all_counts[: self.num_experts]

  @property
  def all_counts(self) -> np.ndarray:
    """Assignments to each expert of the pool."""
    return np.asarray(self.stats.count_E).reshape(-1)

  @property
  def tokens(self) -> int:
    """Number of unpadded tokens."""
    return int(np.sum(self.stats.tokens))

  def floor(self) -> float:
    """Returns the MaxVio of uniform routing of as many tokens."""
    num_experts = self.count_E.size
    if self.router.fixed and self.all_counts.size == num_experts:
      return max_vio_floor(self.tokens, num_experts, self.router.top_k)
    share = self.count_E.sum() / max(self.tokens * num_experts, 1)
    return independent_floor(self.tokens, num_experts, float(share))


def of_sums(sums: Mapping, task, model) -> dict[str, Mean]:
  """Returns all metrics of one step or one split, {name: Mean}.

  Args:
    sums: "loss", "task" and "stats" of `train_step` or `evaluation.eval_step`,
      on the host.
    task, model: see `tasks.Task` and `models.build`.
  """
  out = task.metrics(sums["loss"], sums["task"])
  layers = by_layer(sums["stats"], models.sublayers(model))
  if layers:
    out |= routing(layers)
    out["max_vio_floor"] = Mean(mean_floor(layers), 1.0)
  return out


def of_step(sums: Mapping, program) -> dict[str, Mean]:
  """Returns all metrics of one training step, {name: Mean}.

  Args:
    sums: of `train_step`, on the host.
    program: the `Program` of the step.
  """
  means = of_sums(sums, program.task, program.model)
  means["grad_norm"] = Mean(sums["grad_norm"], 1.0)
  means["aux_loss"] = Mean(sums["aux_loss"], 1.0)
  if sums["stats"]:
    sublayers = models.sublayers(program.model)
    means["bias_range"] = bias_range(sums["balance"], sublayers)
  # Python's floats survive JSON to the last bit.
  return {k: Mean(float(m.total), float(m.weight)) for k, m in means.items()}


def for_hooks(sums: Mapping, program) -> dict:
  """Returns the numbers of `of_step`, and "tokens_per_expert": {layer: loads}.

  Args:
    sums, program: as in `of_step`.
  """
  layers = by_layer(sums["stats"], models.sublayers(program.model))
  loads = {number: layer.count_E for number, layer in layers.items()}
  return divide(of_step(sums, program)) | {"tokens_per_expert": loads}


def loads(sums: Mapping, model) -> dict[str, list]:
  """Returns {layer: assignments to each expert} of a step, for metrics.jsonl.

  Args:
    sums: of `train_step`, on the host.
    model: from `models.build`.
  """
  layers = by_layer(sums["stats"], models.sublayers(model))
  return {number: layer.all_counts.tolist() for number, layer in layers.items()}


def by_layer(
  stats: Mapping[str, Stats], sublayers: Mapping[str, Sublayer]
) -> dict[str, Layer]:
  """Returns {layer number as two digits: its statistics}, in the model's order.

  Args:
    stats: by path, with a leading axis of repeats.
    sublayers: see `models.sublayers`.
  """
  layers = {
    f"{number:02d}": Layer(
      jax.tree.map(lambda x, r=r: x[r], stats[path]),
      *(parts.recipe.router, parts.recipe.num_experts),
    )
    for path, parts in sublayers.items()
    for r, number in enumerate(parts.numbers)
  }
  return dict(sorted(layers.items()))


def routing(layers: Mapping[str, Layer]) -> dict[str, Mean]:
  """Returns the routing metrics of one step or one split.

  Args:
    layers: from `by_layer`.

  Returns:
    {name: Mean}; add the Means of several steps and divide once.
  """
  out: dict[str, Mean] = {}

  def add(name, total, weight=1.0):
    mean = Mean(float(total), float(weight))
    out[name] = out.get(name, Mean(0.0, 0.0)) + mean

  for number, layer in layers.items():
    vio = max_vio(layer.count_E)
    add("max_vio", vio)
    out[f"max_vio/{number}"] = Mean(vio, 1.0)  # Those of all layers in a row.
  for layer in layers.values():
    s, count_E, tokens = layer.stats, layer.count_E, float(layer.tokens)
    add("min_vio", min_vio(count_E))
    add("load_cv", load_cv(count_E))
    add("dead_experts", (count_E == 0).sum())
    everything = layer.all_counts
    add("balance_loss", balance_loss(everything, s.prob_E.reshape(-1)))
    add("z_loss", s.z.sum(), tokens)
    add("router_entropy", s.entropy.sum(), tokens)
    add("router_confidence", s.confidence.sum(), tokens)
    add("experts_per_token", everything.sum(), tokens)
    if everything.size > count_E.size:
      add("real_experts_per_token", count_E.sum(), tokens)
    wanted = everything.sum()
    if layer.router.fixed:
      wanted = tokens * layer.router.top_k
    dropped = {cause: float(n.sum()) for cause, n in s.dropped.items()}
    add("dropped", sum(dropped.values()), wanted)
    for cause, n in dropped.items():
      add(f"dropped/{cause}", n, wanted)
    for factor, n in s.beyond.items():
      add(f"beyond_capacity/{factor}", n.sum(), count_E.sum())
    for name, value in s.extra.items():
      add(f"extra/{name}", value.sum(), tokens)
  return out


def mean_floor(layers: Mapping[str, Layer]) -> float:
  """Returns the MaxVio of uniform routing, mean over layers."""
  # The mean of equal floors is exactly that floor; `fmean` may round it.
  return statistics.mean(layer.floor() for layer in layers.values())


def max_vio(count_E) -> float:
  """Returns (max load - mean load) / mean load (2408.15664, 4.1)."""
  mean = np.mean(count_E)
  return float((np.max(count_E) - mean) / mean) if mean else 0.0


def min_vio(count_E) -> float:
  """Returns (mean load - min load) / mean load; 1 with a dead expert."""
  mean = np.mean(count_E)
  return float((mean - np.min(count_E)) / mean) if mean else 0.0


def load_cv(count_E) -> float:
  """Returns the standard deviation of the loads over their mean."""
  mean = np.mean(count_E)
  return float(np.std(count_E) / mean) if mean else 0.0


def balance_loss(count_E, prob_E) -> float:
  """Returns E sum f P for any balancer: 1 at balance (2101.03961, eq. 4).

  Args:
    count_E, prob_E: sums over tokens; 0.0 is returned where either is zero.
  """
  count_E, prob_E = np.asarray(count_E, float), np.asarray(prob_E, float)
  if not count_E.sum() or not prob_E.sum():
    return 0.0
  shares = count_E / count_E.sum() * prob_E / prob_E.sum()
  return float(len(count_E) * shares.sum())


def bias_range(balance: Mapping, sublayers: Mapping[str, Sublayer]) -> Mean:
  """Returns max - min of the selection bias, mean over layers, 0 without one.

  The bias is the balancer's `select` of equal scores: of zeros, or of ones
  where it multiplies them. A balancer that looks at all tokens has none.

  Args:
    balance: state of the balancers, on the host.
    sublayers: see `models.sublayers`.
  """
  ranges = []
  for path, parts in sublayers.items():
    shape, one_T = (1, parts.recipe.pool), jnp.ones(1, bool)
    for label, balancer in parts.recipe.balancers:
      if balancer.select is not None and balancer.causal:
        state = models.at(balance, path).get(label, {})
        state = balancing.stacked(state, parts)
        for r in range(len(parts.numbers)):
          own = jax.tree.map(lambda x, r=r: x[r], state)
          made = (
            np.ptp(np.asarray(balancer.select(own, make(shape), one_T)))
            for make in (jnp.zeros, jnp.ones)
          )
          ranges.append(next(filter(None, made), 0.0))
  if not ranges:
    return Mean(0.0, 1.0)
  return Mean(float(np.array(ranges).sum()), float(len(ranges)))


def max_vio_floor(tokens: int, num_experts: int, top_k: int) -> float:
  """Returns the mean MaxVio when each token draws K distinct experts uniformly.

  Simulated from a fixed seed for a number of tokens within 5 % of this one, and
  taken from there by 1 / sqrt(tokens): steps differ by their padding, and a
  simulation for each would cost more than the step.

  Args:
    tokens: number of unpadded tokens.
    num_experts, top_k: E, K.
  """
  if tokens == 0 or top_k == num_experts:
    return 0.0
  near = round(_near(tokens))
  floor = _simulated_floor(near, num_experts, top_k)
  return floor * math.sqrt(near / tokens)


def independent_floor(tokens: int, num_experts: int, share: float) -> float:
  """Returns the mean MaxVio when tokens take each expert independently.

  Simulated for a number and a share near these, as in `max_vio_floor`.

  Args:
    tokens: number of unpadded tokens.
    num_experts: E.
    share: probability that a token takes an expert.
  """
  if tokens == 0 or not 0 < share < 1:
    return 0.0
  odds = share / (1 - share)  # The floor goes as 1 / sqrt(tokens * odds).
  near, near_odds = round(_near(tokens)), _near(odds)
  floor = _independent_floor(near, num_experts, near_odds / (1 + near_odds))
  return floor * math.sqrt(near * near_odds / (tokens * odds))


def _near(x):
  """A power of 2^(1/8) within 5 % of x, so that few values are simulated."""
  return 2 ** (round(8 * math.log2(x)) / 8)


@functools.cache
def _independent_floor(tokens, num_experts, share):
  rng = np.random.default_rng(0)
  counts = rng.binomial(tokens, share, (200, num_experts))
  return float(np.mean([max_vio(count_E) for count_E in counts]))


@functools.cache
def _simulated_floor(tokens, num_experts, top_k):
  """Mean MaxVio of uniform draws; large counts take the normal limit."""
  rng = np.random.default_rng(0)
  fast = _chance_of_distinct(num_experts, top_k) > 0.1
  if tokens * top_k <= (2_000_000 if fast else 200_000):
    draws = max(16, min(200, 10_000_000 // (tokens * top_k)))
    counts = [
      _uniform_loads(rng, tokens, num_experts, top_k) for _ in range(draws)
    ]
  else:
    share = top_k / num_experts
    noise = rng.standard_normal((4096, num_experts))
    noise -= noise.mean(1, keepdims=True)
    variance = tokens * share * (1 - share) * num_experts / (num_experts - 1)
    counts = tokens * share + math.sqrt(variance) * noise
  return float(np.mean([max_vio(c) for c in counts]))


def _chance_of_distinct(num_experts, top_k):
  """Probability that uniform draws of chosen (or left-out) experts differ."""
  fewer = min(top_k, num_experts - top_k)
  return math.prod(1 - i / num_experts for i in range(fewer))


def _uniform_loads(rng, tokens, num_experts, top_k):
  """Loads of one draw. Tokens that drew an expert twice draw again."""
  if top_k > num_experts / 2:  # Fewer experts are left out than chosen.
    left_out = num_experts - top_k
    return tokens - _uniform_loads(rng, tokens, num_experts, left_out)
  if _chance_of_distinct(num_experts, top_k) < 0.1:
    chosen = np.argpartition(rng.random((tokens, num_experts)), top_k, axis=1)
    return np.bincount(chosen[:, :top_k].reshape(-1), minlength=num_experts)
  load_E, todo = np.zeros(num_experts, int), tokens
  while todo:
    drawn = np.sort(rng.integers(num_experts, size=(todo, top_k)), axis=1)
    distinct = (np.diff(drawn, axis=1) > 0).all(1)
    load_E += np.bincount(drawn[distinct].reshape(-1), minlength=num_experts)
    todo -= int(distinct.sum())
  return load_E


def divide(means: Mapping[str, Mean]) -> dict[str, float]:
  """Returns every total over its weight, once; 0 where nothing was counted."""
  return {
    k: float(m.total) / float(m.weight) if m.weight else 0.0
    for k, m in means.items()
  }


def add_up(several: list[Mapping[str, Mean]]) -> dict[str, Mean]:
  """Returns sums of Means by name."""
  total: dict[str, Mean] = {}
  for means in several:
    for name, mean in means.items():
      total[name] = total[name] + mean if name in total else mean
  return total
