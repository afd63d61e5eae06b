"""Zero, copy and constant experts, behind the networks."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from moe_jax import models
from moe_jax.core import registry
from moe_jax.core.errors import ConfigError
from moe_jax.models import counts
from moe_jax.moe import experts, layer, pool
from moe_jax.moe.types import Bound, Side
from moe_jax.training import metrics, program, train_step
from tests import mesh_cases, oracle, small

G, T, D, E, K, F = 8, 8, 6, 4, 3, 5
CHEAP = {"zero": 1, "copy": 2, "constant": 2}
Z = sum(CHEAP.values())
TIGHT = Bound(2, E)


def case(seed=0, dispatcher="gather", bound=TIGHT, cheap=CHEAP):
  recipe = layer.Recipe(
    num_experts=E,
    router=registry.load("routers", "top_k", top_k=K),
    dispatcher=registry.load("dispatchers", dispatcher),
    experts=experts.build(F, "relu"),
    bound=bound,
    cheap=pool.build(**cheap),
  )
  rngs = jax.random.split(jax.random.key(seed), 3)
  params = {
    "router": recipe.router.init(rngs[0], D, recipe.pool),
    "experts": recipe.experts.init(rngs[1], E, D),
    "cheap": recipe.cheap.init(rngs[2], D),
  }
  rng = np.random.default_rng(seed)
  params = jax.tree.map(lambda w: rng.normal(size=w.shape) / 2, params)
  mask_GT = np.arange(T) < T - np.arange(G)[:, None] // 4
  return recipe, params, rng.normal(size=(G, T, D)), mask_GT


def by_hand(recipe, params, x_GTD, mask_GT):
  """(y, the load of every expert, assignments without a slot), by loops."""
  y_GTD, count_E, full = np.zeros_like(x_GTD), np.zeros(E + Z), 0
  for g in range(G):
    used_E = np.zeros(E)
    for t in range(T):
      if not mask_GT[g, t]:
        continue
      x_D = x_GTD[g, t]
      logits = x_D @ params["router"]["kernel"]
      prob = np.exp(logits) / np.exp(logits).sum()
      for e in np.argsort(-prob)[:K]:
        count_E[e] += 1
        kind = None if e < E else e - E
        if kind is None:
          if recipe.bound and used_E[e] == recipe.bound.slots:
            full += 1
            continue
          used_E[e] += 1
          out = oracle.experts(params["experts"], e, x_D, "relu")
        elif kind < 1:
          out = np.zeros(D)
        elif kind < 3:
          out = x_D
        else:
          c = kind - 3
          a, b = np.exp(x_D @ params["cheap"]["mix"][:, 2 * c : 2 * c + 2])
          out = (a * x_D + b * params["cheap"]["constant"][c]) / (a + b)
        y_GTD[g, t] += prob[e] * out
  return y_GTD, count_E, full


@pytest.mark.parametrize(
  "dispatcher,bound",
  [("gather", TIGHT), ("einsum", TIGHT), ("sorted", None), ("sorted", TIGHT)],
)
def test_a_layer_is_what_the_papers_write(dispatcher, bound):
  recipe, params, x_GTD, mask_GT = case(0, dispatcher, bound)
  with jax.enable_x64(True):
    y_GTD, stats, _ = mesh_cases.moe_ffn(
      *(recipe, jax.tree.map(jnp.asarray, params), {}, jnp.asarray(x_GTD)),
      Side(jnp.asarray(mask_GT)),
    )
  expected, count_E, full = by_hand(recipe, params, x_GTD, mask_GT)
  np.testing.assert_allclose(y_GTD, expected, rtol=1e-9, atol=1e-12)
  np.testing.assert_array_equal(stats.count_E.sum((0, 1)), count_E)
  dropped = {k: int(v.sum()) for k, v in stats.dropped.items()}
  assert dropped == {"capacity": full, "buffer": 0, "unrouted": 0}
  assert (full > 0) == (bound is not None)
  # Cheap experts have a place for everything.
  kept_E = np.asarray(stats.kept_E).sum((0, 1))
  np.testing.assert_array_equal(kept_E[E:], count_E[E:])
  assert kept_E[:E].sum() == count_E[:E].sum() - full
  assert (count_E > 0).all()


def test_its_gradient():
  recipe, params, x_GTD, mask_GT = case(3, "sorted", None)
  mesh_cases.assert_gradient(
    *(recipe, params, x_GTD, mask_GT),
    by_hand=lambda params: by_hand(recipe, params, x_GTD, mask_GT)[0],
    eps=1e-5,
  )


@pytest.mark.parametrize(
  "sizes,kind",
  [
    ((1, 2, 2, 2), "all_to_all"),
    ((2, 1, 4, 1), "all_gather"),
    ((1, 1, 2, 4), "all_gather"),
  ],
)
def test_it_is_the_same_on_a_mesh(sizes, kind):
  recipe, params, x_GTD, mask_GT = case(1, "sorted", None)
  recipe = dataclasses.replace(
    recipe, exchange=kind, experts=experts.build(4, "relu")
  )
  rng = np.random.default_rng(2)
  shapes = jax.eval_shape(lambda: recipe.experts.init(jax.random.key(0), E, D))
  params["experts"] = jax.tree.map(lambda x: rng.normal(size=x.shape), shapes)
  mesh_cases.assert_same_on_a_mesh(recipe, params, x_GTD, mask_GT, sizes)


def config(targets=True, **changes):
  """Eight networks and four copies; a token has 1.5 networks of K = 2."""
  c = tiny.get_config()
  c.model.moe.update(num_experts=8, top_k=2, num_copy_experts=4)
  c.model.moe.update(real_experts=1.5, capacity_factor=None)
  c.model.moe.dispatcher = {"name": "sorted"}
  bias = {"name": "bias", "rate": 0.02}
  if targets:
    bias["targets"] = ((8, 0.75), (4, 0.25))
  c.model.moe.balancers = {"bias": bias}
  for key, value in changes.items():
    c.model.moe[key] = value
  return c


@pytest.mark.long
def test_a_bias_moves_to_the_number_of_networks():
  c, task = config(), small.task()
  model = program.build_model(c, task)
  parts = train_step.parts(c, model, task)
  numbers = train_step.numbers(c, model)
  state = train_step.init_state(jax.random.key(0), **parts, numbers=numbers)
  state = nn.unbox(state)
  step = jax.jit(functools.partial(train_step.train_step, **parts))
  rng, found = np.random.default_rng(0), []
  for _ in range(60):
    tokens = rng.integers(0, 16, (1, 8, task.lengths["inputs"] + 1)).astype(
      np.int32
    )
    batch = {"inputs": tokens[..., :-1], "targets": tokens[..., 1:]}
    batch["mask"] = np.ones(batch["inputs"].shape, bool)
    state, sums = step(state, batch, numbers)
    sums = jax.device_get(sums)
    means = metrics.divide(metrics.of_sums(sums, task, model))
    found.append(means["real_experts_per_token"])
    assert means["experts_per_token"] == pytest.approx(2)
  assert np.mean(found[-10:]) == pytest.approx(1.5, abs=0.1)
  # A bias of every expert of the pool.
  (path,) = {p.partition("/moe")[0] for p in model.sublayers}
  state_E = models.at(state.balance, f"{path}/moe")["bias"]["bias_E"]
  assert state_E.shape[-1] == 12


def test_capacity_is_of_the_networks():
  """Slots over the balanced load of a network, which cheap experts lower."""
  c = config(targets=True, capacity_factor=1.0)
  model = program.build_model(c, small.task())
  (parts,) = model.sublayers.values()
  _, recipe = parts.grouping.resolve(parts.recipe, 64, True)
  assert recipe.bound.slots * 8 == 64 * 1.5


def test_costs_and_counts_follow():
  c = config()
  model = program.build_model(c, small.task())
  shapes = models.variables(model)
  sizes = counts.count(model, shapes)
  plain = config(targets=False, num_copy_experts=0, real_experts=None)
  other = program.build_model(plain, small.task())
  before = counts.count(other, models.variables(other))
  # Half an expert of a layer fewer; the router has four columns more.
  layers = sum(len(x.numbers) for x in model.sublayers.values())
  half = before["experts"] / 8 / 2
  columns = 4 * c.model.d_model * layers
  assert before["active"] - sizes["active"] == half - columns
  assert sizes["experts"] == before["experts"]
  assert sizes["router"] == before["router"] + columns


@pytest.mark.parametrize(
  "changes,words",
  [
    ({"num_copy_experts": 0}, "real_experts is for experts that cost nothing"),
    ({"real_experts": 2.5}, "2.5 cannot be met: a token chooses 2"),
    (
      {"num_copy_experts": 1, "real_experts": 0.5},
      "0.5 cannot be met: .* of which 1 to 2 can be networks",
    ),
    ({"real_experts": 1.0}, "targets give a token 1.5 networks"),
    ({"balancers": {}}, "needs a balancer that moves loads there: add"),
    ({"router": {"name": "expert_choice"}}, "which no token can choose"),
  ],
)
def test_numbers_that_cannot_be(changes, words):
  c = config(**changes)
  if changes.get("num_copy_experts") == 0:
    c.model.moe.balancers = {}
  with pytest.raises(ConfigError, match=f"model.moe.*{words}"):
    program.build_model(c, small.task())
