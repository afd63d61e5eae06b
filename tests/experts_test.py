"""Dropout of the experts' hidden units."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.core import registry
from moe_jax.moe import exchange, experts, groups, layer, linen
from moe_jax.moe.types import Bound, Side
from tests import mesh_cases

G, T, D, E, K = 8, 6, 8, 4, 2
RATE = 0.25
LAYOUTS = {
  "einsum": Bound(T * K, E),
  "gather": Bound(T * K, E),
  "sorted": None,
}


def recipe_of(layout, rate=RATE, activation="relu", **more):
  more = {"router": registry.load("routers", "top_k", top_k=K)} | more
  return layer.Recipe(
    num_experts=E,
    dispatcher=registry.load("dispatchers", layout),
    experts=experts.build(D, activation, expert_dropout=rate),
    bound=LAYOUTS[layout],
    **more,
  )


def drawn(activation="relu"):
  """Parameters, and tokens [G, T, D]."""
  rng = np.random.default_rng(0)
  names = ("gate", "up") if activation == "swiglu" else ("up",)
  own = {name: rng.normal(size=(E, D, D)) for name in (*names, "down")}
  params = {"router": {"kernel": rng.normal(size=(D, E))}, "experts": own}
  return params, rng.normal(size=(G, T, D))


def output(recipe, params, x_GTD, seed, mesh=None):
  side = Side(jnp.ones(x_GTD.shape[:2], bool))
  keys = layer.group_keys(jax.random.key(seed), len(x_GTD))
  run = jax.jit(functools.partial(layer.moe_ffn, recipe, mesh=mesh))
  return np.asarray(run(params, {}, x_GTD, side, keys)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_units_are_dropped_and_the_others_are_larger(layout):
  """Experts that return their hidden layer: 0, or the value over 1 - rate."""
  params, _ = drawn()
  eye_ED = jnp.broadcast_to(jnp.eye(D), (E, D, D))
  params["experts"] = {"up": eye_ED, "down": eye_ED}
  x_GTD = jnp.ones((G, T, D))
  # All tokens are alike, and so are their two experts and weights.
  still = output(recipe_of(layout, rate=0.0), params, x_GTD, 1)
  dropped = output(recipe_of(layout), params, x_GTD, 1)
  times = (
    dropped / still * (1 - RATE)
  )  # The weights of the experts that kept it.
  weight_K = np.unique(times.round(4))
  assert len(weight_K) == 4 and weight_K[0] == 0 and weight_K[-1] == 1
  np.testing.assert_allclose(weight_K[1] + weight_K[2], 1, atol=2e-4)
  share = (times == 0).mean()  # Dropped by both.
  units = times.size
  assert abs(share - RATE**2) < 4 * np.sqrt(RATE**2 / units)
  # Every row has units of its own, in every group and expert.
  assert len({row.tobytes() for row in times.reshape(-1, D).round(4)}) > 40
  assert (output(recipe_of(layout), params, x_GTD, 2) != dropped).any()


def test_the_mean_is_the_layer_without_dropout():
  params, x_GTD = drawn("swiglu")
  x_GTD = x_GTD[:1]
  still = output(recipe_of("sorted", 0.0, "swiglu"), params, x_GTD, 0)
  recipe, side = (
    recipe_of("sorted", 0.5, "swiglu"),
    Side(jnp.ones((1, T), bool)),
  )

  @jax.jit
  @jax.vmap
  def many(key):
    return layer.moe_ffn(recipe, params, {}, x_GTD, side, key[None])[0]

  y_NGTD = np.asarray(many(jax.random.split(jax.random.key(0), 4000)))
  error = y_NGTD.std(0) / np.sqrt(len(y_NGTD))
  assert (abs(y_NGTD.mean(0) - still) < 5 * error).all()


@pytest.mark.parametrize("kind", exchange.KINDS)
@pytest.mark.parametrize("layout", ["gather", "sorted"])
def test_a_mesh_drops_the_same_units(layout, kind):
  """Also where the hidden layer lies on several devices, and its gradient."""
  recipe = recipe_of(layout, activation="swiglu", exchange=kind)
  side = Side(np.ones((G, T), bool))

  def program(mesh):
    def total(params, x_GTD, keys):
      y_GTD = layer.moe_ffn(recipe, params, {}, x_GTD, side, keys, mesh=mesh)[0]
      return (y_GTD * np.sin(np.arange(D))[None, None]).sum()

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))

  with jax.enable_x64(True):
    keys = layer.group_keys(jax.random.key(1), G)
    args = *drawn("swiglu"), keys
    alone = jax.device_get(program(None)(*args))
    mesh = mesh_cases.make_mesh((1, 2, 2, 2))
    spread = jax.device_get(program(mesh)(*args))
  for here, there in zip(jax.tree.leaves(alone), jax.tree.leaves(spread)):
    scale = np.linalg.norm(here)
    assert np.linalg.norm(here - there) <= 1e-9 * scale


def test_kernels_agree():
  """The loop over experts, in which rows are cut, beside one masked product."""
  params, x_GTD = drawn("swiglu")
  side, keys = (
    Side(np.ones((G, T), bool)),
    layer.group_keys(jax.random.key(1), G),
  )

  def gradients(name):
    own = experts.build(D, expert_dropout=RATE, grouped_matmul=name)
    recipe = dataclasses.replace(recipe_of("sorted"), experts=own)

    def total(params):
      y_GTD = layer.moe_ffn(recipe, params, {}, x_GTD, side, keys)[0]
      return (y_GTD * np.sin(np.arange(D))[None, None]).sum()

    return jax.device_get(jax.jit(jax.grad(total))(params))

  with jax.enable_x64(True):
    one, other = gradients("cpu"), gradients("reference")
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("router", ["top_k", "random"])
def test_nothing_is_dropped_outside_of_training(router):
  """Nor where a router draws at evaluation, and experts could."""
  router = registry.load("routers", router, top_k=K)
  x_BLD = jnp.asarray(drawn()[1], jnp.float32)

  def outputs(rate, train):
    recipe = recipe_of("sorted", rate, "swiglu", router=router)
    moe = linen.MoE(recipe, groups.Grouping())
    variables = moe.init(jax.random.key(0), x_BLD)
    apply = jax.jit(functools.partial(moe.apply, train=train))
    return np.asarray(apply(variables, x_BLD, rng=jax.random.key(1))[0])

  np.testing.assert_array_equal(outputs(RATE, False), outputs(0.0, False))
  assert (outputs(RATE, True) != outputs(0.0, True)).any()
