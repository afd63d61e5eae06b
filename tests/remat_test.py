"""A recompute reads what the forward pass chose; it never chooses again."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from moe_jax import models
from moe_jax.models.parts import stack
from moe_jax.moe import dispatchers, exchange
from moe_jax.tasks import next_token
from moe_jax.training import balancing
from tests import mesh_cases, tiers
from tests.mesh_cases import Case

CASES = {
  "einsum": Case("einsum"),
  "gather": Case("gather", prefix=("dense",), pattern=("moe", "dense", "moe")),
  "sorted": Case("sorted", router=(("score", "sigmoid"), ("noise", 0.1))),
  "buckets": Case("buckets", use_bias=True, shared=1),
  "dropless": Case("dropless", router=(("score_before_top_k", False),)),
  "choice": Case("choice", router=(("priority", "score"),)),
  "jitter": Case("gather", router=(("apply_to", "input"), ("jitter", 0.1))),
}
# Names that jax gives the part of a gradient that computes something again.
RECOMPUTE = ("checkpoint", "remat", "remat2")
MUTANT = '''
"""A router whose weights are top_k's values."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.moe.types import Router, Routing, TokenChoice


def build(top_k, from_values):
  def init(rng, d_model, num_experts):
    return {"kernel": jax.random.normal(rng, (d_model, num_experts))}

  def route(params, x_TD, *, num_experts, select, side, rng):
    prob_TE = jax.nn.softmax(x_TD @ params["kernel"])
    value_TK, expert_TK = jax.lax.top_k(prob_TE, top_k)
    expert_TK = checkpoint_name(expert_TK, "expert")
    if not from_values:
      value_TK = jnp.take_along_axis(prob_TE, expert_TK, axis=-1)
    valid_TK = jnp.broadcast_to(side.mask_T[:, None], expert_TK.shape)
    return Routing(TokenChoice(expert_TK, value_TK, valid_TK), prob_TE)

  return Router(init, {"kernel": ("embed", None)}, route, True, top_k)
'''


def gradient_jaxpr(model, case):
  """The gradient of cross-entropy plus balance losses, as a jaxpr."""
  micro = {k: v[0] for k, v in mesh_cases.draw_batch(case).items()}
  shapes = jax.eval_shape(model.init, jax.random.key(0), micro["inputs"])
  shapes = nn.unbox(shapes)

  def objective(params, balance):
    logits, aux = model.apply(
      {"params": params, "balance": balance},
      micro["inputs"],
      micro["mask"],
      jax.random.key(1),
      train=True,
    )
    loss = next_token.cross_entropy(logits, micro["targets"], micro["mask"])
    sublayers = model.sublayers
    stats = balancing.statistics(aux, sublayers)
    so_far = {k: s.count_E.sum((1, 2)) * 0 for k, s in stats.items()}
    return loss.value() + balancing.loss(
      sublayers, balance, stats, so_far, params
    )

  balance = shapes.get("balance", {})
  return jax.make_jaxpr(jax.grad(objective))(shapes["params"], balance).jaxpr


def count(jaxpr, *, recompute=None):
  """Counts each primitive in a jaxpr and all inside of it.

  Args:
    jaxpr: of a gradient.
    recompute: True: only what stands in a recompute; False: only the rest.
  """
  found = collections.Counter()

  def walk(jaxpr, inside):
    for eqn in jaxpr.eqns:
      name = eqn.primitive.name
      if recompute is None or recompute == inside:
        found[name] += 1
        if name == "name":
          found[f"name {eqn.params['name']}"] += 1
        if sends_rows(eqn):
          found["rows sent"] += 1
      for sub in sub_jaxprs(eqn):
        walk(sub, inside or name in RECOMPUTE)

  walk(jaxpr, False)
  return found


def sends_rows(eqn):
  """Whether an equation sends numbers, no mere sizes, to experts or back.

  Weights are gathered over several axes.
  """
  axes = eqn.params.get("axis_name", ())
  axes = axes if isinstance(axes, tuple) else (axes,)
  collective = eqn.primitive.name.startswith(("all_to_all", "all_gather"))
  dtype = getattr(eqn.invars[0].aval, "dtype", None) if eqn.invars else None
  return collective and axes == ("expert",) and dtype == jnp.float32


def sub_jaxprs(eqn):
  for value in eqn.params.values():
    for part in value if isinstance(value, list | tuple) else [value]:
      part = getattr(part, "jaxpr", part)
      if hasattr(part, "eqns"):
        yield part


def choices(case):
  """The top-k itself, and that of the loop that decides between scores that
  are equal as they have saturated; logits do not."""
  return 1 if ("score_before_top_k", False) in case.router else 2


def moe_bodies(case):
  return (*case.prefix, *case.pattern).count("moe")


def build(case, sizes):
  mesh = None if sizes is None else mesh_cases.make_mesh(sizes)
  return mesh_cases.plain_model(case, mesh)


@pytest.mark.parametrize("sizes", [None, (1, 2, 2, 2)])
@pytest.mark.parametrize("name", CASES)
def test_a_recompute_does_not_choose(name, sizes):
  case = dataclasses.replace(CASES[name], dtype="float32")
  jaxpr = gradient_jaxpr(build(case, sizes), case)
  assert count(jaxpr)["top_k"] == choices(case) * moe_bodies(case)
  recomputed = count(jaxpr, recompute=True)
  assert recomputed["dot_general"] > 0, "it recomputes something"
  assert recomputed["top_k"] == recomputed["sort"] == 0
  kept = count(jaxpr, recompute=False)
  assert kept["sort"] > 0
  for saved in dispatchers.SAVED:
    assert kept[f"name {saved}"] > 0


def test_groups_of_experts_are_not_chosen_again():
  case = Case(
    "gather",
    router=(("num_expert_groups", 4), ("top_expert_groups", 2)),
    dtype="float32",
  )
  jaxpr = gradient_jaxpr(build(case, None), case)
  assert count(jaxpr)["top_k"] == 2 * choices(case) * moe_bodies(case)
  assert count(jaxpr, recompute=True)["top_k"] == 0


@pytest.mark.parametrize("sizes", [None, (1, 2, 2, 2)])
@pytest.mark.parametrize("from_values", [False, True])
def test_the_mutant_that_reads_the_values_chooses_twice(
  from_values, sizes, tmp_path
):
  folder = tmp_path / "routers"
  folder.mkdir()
  (folder / "values.py").write_text(MUTANT)
  case = Case("gather", dtype="float32")
  c = mesh_cases.config(case).model
  c.moe.router = {"name": "values", "from_values": from_values}
  model = models.build(
    c,
    vocab_size=mesh_cases.V,
    mesh=None if sizes is None else mesh_cases.make_mesh(sizes),
    plugins=(str(tmp_path),),
  )
  jaxpr = gradient_jaxpr(model, case)
  assert count(jaxpr)["top_k"] == (2 if from_values else 1)
  assert count(jaxpr, recompute=True)["top_k"] == int(from_values)


@pytest.mark.parametrize("forgotten", dispatchers.SAVED)
def test_every_saved_name_is_needed(forgotten, monkeypatch):
  names = [n for n in dispatchers.SAVED if n != forgotten]
  policy = jax.checkpoint_policies.save_only_these_names(*names)
  monkeypatch.setitem(stack.REMAT, "block", policy)
  case = Case("sorted", dtype="float32")
  recomputed = count(gradient_jaxpr(build(case, None), case), recompute=True)
  chosen_again = recomputed["top_k"] + recomputed["sort"]
  assert chosen_again > 0
  assert (recomputed["top_k"] > 0) == (forgotten == "expert")


@pytest.mark.parametrize("kind", exchange.KINDS)
@pytest.mark.parametrize(
  "name", tiers.only(["dropless"], ["gather", "buckets", "dropless"])
)
def test_no_rows_are_sent_twice(name, kind):
  """ "dispatch" multiplies again, but sends no more than "none"."""
  found = {}
  for remat in ("none", "dispatch", "block"):
    case = dataclasses.replace(
      CASES[name],
      pattern=("moe",),
      prefix=(),
      dtype="float32",
      remat=remat,
      exchange=kind,
    )
    found[remat] = count(gradient_jaxpr(build(case, (1, 2, 2, 2)), case))
  sent = {remat: counts["rows sent"] for remat, counts in found.items()}
  assert 0 < sent["none"] == sent["dispatch"] < sent["block"]
  assert found["none"]["dot_general"] < found["dispatch"]["dot_general"]


def test_without_remat_nothing_is_recomputed():
  case = Case("gather", dtype="float32", remat="none")
  found = count(gradient_jaxpr(build(case, None), case))
  assert not any(found[name] for name in RECOMPUTE)
  assert found["top_k"] == choices(case) * moe_bodies(case)


@pytest.mark.parametrize(
  "layout", tiers.only(["buckets"], ["gather", "buckets"])
)
def test_remat_changes_no_gradient(layout):
  case = Case(layout, accumulation=1, router=(("noise", 0.3),))
  none = dataclasses.replace(case, remat="none")
  none, _ = mesh_cases.measure(none, None)
  for remat in ("block", "dispatch"):
    found = dataclasses.replace(case, remat=remat)
    found, _ = mesh_cases.measure(found, None)
    distance, leaf = mesh_cases.worst(found, none)
    assert distance <= 1e-12, (remat, leaf)
