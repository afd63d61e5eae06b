"""Every router with every dispatcher and balancer: forward, backward, update.

Pairs of a router and a balancer that do not fit are refused with a reason;
docs/routing.md lists them, and REFUSED here. The quick tier has a covering set: every
part, and every dispatcher's layout.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.core import registry
from moe_jax.core.errors import ConfigError
from moe_jax.moe import balancers as balancers_lib
from moe_jax.moe import experts, layer
from moe_jax.moe.types import TokenChoice
from moe_jax.training import balancing
from tests import contracts_test as parts
from tests import tiers

E, D = parts.E, parts.D
ROUTERS = registry.names("routers")
BALANCERS = registry.names("balancers")
NONE = "none"
# (dispatcher, options, bound), and dropless.
LAYOUTS = [*parts.layouts("layout"), ("sorted", (("order", "token"),), None)]


def made(kind, name, **more):
  return registry.load(kind, name, **(parts.options_of(kind, name) | more))


@functools.cache
def router_of(name, balancer):
  """With the noise, or the score, that a balancer needs; then nothing is missing."""
  more = {"noise": 0.1} if name == "top_k" and balancer == "cv_squared" else {}
  return made("routers", name, **more)


# Options of balancers that are for as many experts as a token of the router has.
AGREEING = {
  "bip": lambda taken: {"top_k": round(taken)},
  "l1": lambda taken: {"experts": float(taken)},
  "threshold": lambda taken: {"share": taken / E},
}


@functools.cache
def balancer_of(name, router):
  router = router_of(router, name)
  agreeing = AGREEING.get(name, lambda taken: {})
  more = agreeing(router.average_k or router.top_k or E)
  return made("balancers", name, **more)


# Balancers that shift scores, and what else a router is not for.
SHIFTS = {"bias", "bip", "quantile", "threshold"}
LOADS = {"adaptive", "device", "switch"}
REFUSED = {
  "by_feature": SHIFTS | {"l1", "z_loss"},
  "expert_choice": SHIFTS | LOADS | {"l1"},
  # Its thresholds are the only shift that it takes.
  "expert_threshold": SHIFTS - {"threshold"} | {"l1"},
  "forced": SHIFTS | {"l1"},
  "hash": SHIFTS | {"l1"},
  "hierarchical": SHIFTS | {"l1", "z_loss"},
  "noisy_top_k": SHIFTS - {"bias"} | {"l1"},
  "random": SHIFTS
  | LOADS
  | {"cv_squared", "entropy", "l1", "orthogonality", "z_loss"},
  "relu": SHIFTS,
  "sinkhorn": SHIFTS | {"l1"},
  "soft": SHIFTS | LOADS | {"l1", "orthogonality", "z_loss"},
  "tile_rounded": {"l1", "quantile"},
  "top_k": {"l1"},
  "top_p": SHIFTS | {"l1"},
}


def recipe_of(router, layout, balancer):
  """A layer, with the thresholds that the router expert_threshold needs."""
  name, options, bound = LAYOUTS[layout]
  balancers = {} if balancer == NONE else {"b": balancer_of(balancer, router)}
  router_ = router_of(router, balancer)
  if router_.needs and balancer != "threshold":
    balancers["t"] = balancer_of("threshold", router)
  return layer.Recipe(
    num_experts=E,
    router=router_,
    dispatcher=registry.load("dispatchers", name, **dict(options)),
    experts=experts.build(5, "swiglu"),
    bound=bound,
    sequences=parts.S,
    balancers=(*balancers.items(),),
  )


def legal():
  """(router, layout, balancer); layouts are for tokens that choose."""
  for name in ROUTERS:
    chooses = router_of(name, "").form is TokenChoice
    for number in range(len(LAYOUTS) if chooses else 1):
      for balancer in (NONE, *BALANCERS):
        if balancer not in REFUSED[name]:
          yield name, number, balancer


def covering():
  """Some combinations, among them every router, layout and balancer."""
  left = {*ROUTERS, *BALANCERS, *range(len(LAYOUTS))}
  for case in legal():
    name, number, balancer = case
    new = {name, number, balancer} & left
    # At least two parts that are not there yet, or one at the end.
    if len(new) >= 2:
      left -= new
      yield case
  for case in legal():
    if new := {*case} & left:
      left -= new
      yield case


ALL = list(legal())
LOSSES = [
  name for name in BALANCERS if made("balancers", name).loss is not None
]


def test_there_are_many():
  assert len(ALL) >= 400
  some = list(covering())
  assert {c[0] for c in some} == {*ROUTERS}
  assert {c[2] for c in some} >= {*BALANCERS}
  assert {c[1] for c in some} == {*range(len(LAYOUTS))} and len(some) < 30


@pytest.mark.parametrize(
  "router,layout,balancer", tiers.only(list(covering()), ALL, several=True)
)
def test_forward_backward_and_update(router, layout, balancer):
  recipe = recipe_of(router, layout, balancer)
  balancers_lib.check(recipe)
  rngs = jax.random.split(jax.random.key(0))
  params = {
    "router": recipe.router.init(rngs[0], D, E),
    "experts": recipe.experts.init(rngs[1], E, D),
  }
  tokens = parts.tokens(0, skew=0.5)
  balance = {label: part.init(E) for label, part in recipe.balancers}

  def total(params):
    y_GTD, stats, _ = layer.moe_ffn(
      *(recipe, params, balance, jnp.asarray(tokens["x"])),
      jax.tree.map(jnp.asarray, parts.side_of(tokens)),
      layer.group_keys(jax.random.key(1), parts.G),
    )
    loss = (y_GTD * jnp.sin(jnp.arange(D))[None, None]).sum()
    none_E, after = jnp.zeros(E, jnp.int32), {}
    for label, part in recipe.balancers:
      own = balancing.of_balancer(stats, label)
      if part.loss is not None:
        value = part.loss(balance[label], own, none_E, params["router"])
        loss += value.value()
      after[label] = part.update(balance[label], own, 0)
    return loss, (y_GTD, stats, after)

  run = jax.jit(jax.value_and_grad(total, has_aux=True))
  (loss, (y_GTD, stats, state)), gradients = jax.device_get(run(params))
  for leaf in jax.tree.leaves((loss, y_GTD, stats, state, gradients)):
    assert np.isfinite(leaf).all()
  assert abs(y_GTD[tokens["mask"]]).max() > 0
  assert (y_GTD[~tokens["mask"]] == 0).all()
  if params["router"] and router != "random":
    assert any(abs(g).max() > 0 for g in gradients["router"].values())
  dropped = sum(v.sum() for k, v in stats.dropped.items() if k != "unrouted")
  left = stats.count_E.sum() - stats.kept_E.sum()
  np.testing.assert_allclose(left, dropped, atol=1e-4)
  assert stats.tokens.sum() == tokens["mask"].sum()


@pytest.mark.parametrize("balancer", LOSSES)
def test_a_loss_moves_the_router(balancer):
  """By itself, without that of the outputs: its gradient is that of a small step."""
  router = "relu" if balancer == "l1" else "top_k"
  recipe = recipe_of(router, 0, balancer)
  part, tokens = dict(recipe.balancers)["b"], parts.tokens(0, skew=0.5)
  with jax.enable_x64(True):
    params = {
      "router": recipe.router.init(jax.random.key(0), D, E),
      "experts": recipe.experts.init(jax.random.key(1), E, D),
    }
    params = jax.tree.map(lambda x: np.asarray(x, float), params)
    side = jax.tree.map(jnp.asarray, parts.side_of(tokens))
    state, keys = part.init(E), layer.group_keys(jax.random.key(1), parts.G)

    def loss(router):
      _, stats, _ = layer.moe_ffn(
        *(recipe, params | {"router": router}, {"b": state}),
        *(jnp.asarray(tokens["x"], float), side, keys),
      )
      own = balancing.of_balancer(stats, "b")
      return part.loss(state, own, jnp.zeros(E, jnp.int32), router).value()

    run = jax.jit(jax.value_and_grad(loss))
    _, gradient = jax.device_get(run(params["router"]))
    size = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient)))
    assert size > 1e-9  # That of l1 begins at 1e-8.
    up, down = (
      jax.tree.map(lambda p, g, s=s: p + s * 1e-6 * g / size, *both)
      for s in (1, -1)
      for both in [(params["router"], gradient)]
    )
    slope = (float(run(up)[0]) - float(run(down)[0])) / 2e-6
  np.testing.assert_allclose(slope, size, rtol=1e-5)


def test_the_others_are_refused_with_a_reason():
  for name in ROUTERS:
    for balancer in sorted(REFUSED[name]):
      with pytest.raises(
        ConfigError,
        match=r"moe\.balancers(\.b needs .*which the| b and t both)",
      ):
        balancers_lib.check(recipe_of(name, 0, balancer))
