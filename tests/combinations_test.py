"""Every router with every dispatcher and balancer: forward, backward, update.

Pairs of a router and a balancer that do not fit are refused with a reason;
docs/routing.md lists them. The quick tier has a covering set: every part, and every
dispatcher's layout.
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
from moe_jax.moe.types import Balancer, TokenChoice
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
  if name == NONE:
    return Balancer()
  router = router_of(router, name)
  agreeing = AGREEING.get(name, lambda taken: {})
  more = agreeing(router.average_k or router.top_k or E)
  return made("balancers", name, **more)


def missing(router, balancer):
  facts = router_of(router, balancer), balancer_of(balancer, router)
  return balancers_lib.missing(*facts)


def legal():
  """(router, layout, balancer); layouts are for tokens that choose."""
  for name in ROUTERS:
    chooses = router_of(name, "").form is TokenChoice
    for number in range(len(LAYOUTS) if chooses else 1):
      for balancer in (NONE, *BALANCERS):
        if not missing(name, balancer):
          yield name, number, balancer


def covering():
  """Of all these, some with every router, layout and balancer."""
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
  name, options, bound = LAYOUTS[layout]
  name_of_it, balancer = balancer, balancer_of(balancer, router)
  recipe = layer.Recipe(
    num_experts=E,
    router=router_of(router, name_of_it),
    dispatcher=registry.load("dispatchers", name, **dict(options)),
    experts=experts.build(5, "swiglu"),
    bound=bound,
    sequences=parts.S,
    balancers=(("b", balancer),),
  )
  if not recipe.router.needs or balancer.gives:
    balancers_lib.check(recipe)
  rngs = jax.random.split(jax.random.key(0))
  params = {
    "router": recipe.router.init(rngs[0], D, E),
    "experts": recipe.experts.init(rngs[1], E, D),
  }
  tokens = parts.tokens(0, skew=0.5)
  balance = {"b": balancer.init(E)}

  def total(params):
    y_GTD, stats, _ = layer.moe_ffn(
      *(recipe, params, balance, jnp.asarray(tokens["x"])),
      jax.tree.map(jnp.asarray, parts.side_of(tokens)),
      layer.group_keys(jax.random.key(1), parts.G),
    )
    loss = (y_GTD * jnp.sin(jnp.arange(D))[None, None]).sum()
    own = stats.replace(observed=stats.observed.get("b", {}))
    if balancer.loss is not None:
      none_E = jnp.zeros(E, jnp.int32)
      loss += balancer.loss(balance["b"], own, none_E, params["router"]).value()
    return loss, (y_GTD, stats, balancer.update(balance["b"], own, 0))

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


def test_the_others_are_refused_with_a_reason():
  refused = 0
  for name in ROUTERS:
    for balancer in BALANCERS:
      if not missing(name, balancer):
        continue
      recipe = layer.Recipe(
        E,
        router_of(name, balancer),
        *(None, None),
        balancers=(("b", balancer_of(balancer, name)),),
      )
      with pytest.raises(
        ConfigError, match=r"moe\.balancers\.b needs .*which the"
      ):
        balancers_lib.check(recipe)
      refused += 1
  assert refused > 40
