"""`jax.set_mesh`, and meshes of explicit axes, as `jax.make_mesh` gives them.

Layer, module and train step, with arguments that lie as ours do or on no mesh.
"""

import contextlib
import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType

from moe_jax.core import parallel
from moe_jax.core.errors import ConfigError
from moe_jax.moe import exchange, groups, layer, linen
from moe_jax.training import train_step
from tests import mesh_cases, parallel_test, tiers
from tests.mesh_cases import Case

SIZES = (1, 2, 2, 2)
FIRST, *_ = mesh_cases.VARIATIONS
TOKENS = jax.P(parallel.TOKENS)
# Types of the axes, and whether the mesh is set.
WAYS = [(AxisType.Auto, True), (AxisType.Explicit, True)]
WAYS += [(AxisType.Explicit, False)]


@contextlib.contextmanager
def mesh_of(kind, is_set, sizes=SIZES):
  mesh = jax.make_mesh(sizes, parallel.AXES, axis_types=(kind,) * 4)
  with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
    yield mesh


def put(tree, mesh, *specs):
  """Arrays that lie like this."""
  place = lambda x: jax.device_put(x, jax.NamedSharding(mesh, *specs))  # noqa: E731
  return jax.tree.map(place, tree)


LAYERS = [
  (*way, placed, exchanged)
  for way in WAYS
  for placed in (False, True)
  for exchanged in exchange.KINDS
]


# Each way, place and exchange once.
@pytest.mark.parametrize(
  "kind,is_set,placed,exchanged",
  tiers.only([LAYERS[3], LAYERS[4], LAYERS[11]], LAYERS, several=True),
)
def test_layer(kind, is_set, placed, exchanged):
  """Outputs, statistics and gradients are those of one device."""
  layout = "gather" if exchanged == "all_to_all" else "dropless"
  recipe, (params, *args), r_GTD = parallel_test.layer_case(layout, True)
  recipe = dataclasses.replace(recipe, exchange=exchanged)
  expected = parallel_test.run_layer(recipe, (params, *args), r_GTD, None)
  with mesh_of(kind, is_set) as mesh, jax.enable_x64(True):
    if placed:
      balance, *tokens = args
      args = balance, *put(tokens, mesh, TOKENS)
      r_GTD = put(r_GTD, mesh, TOKENS)
    found = parallel_test.run_layer(recipe, (params, *args), r_GTD, mesh)
  distance, leaf = mesh_cases.worst(found, expected)
  assert distance <= 1e-9, leaf


@pytest.mark.parametrize("given", [AxisType.Auto, AxisType.Explicit])
def test_its_tokens_lie_as_they_did(given):
  """On explicit axes, also if the layer was given a mesh of automatic ones."""
  recipe, (params, balance, x_GTD, side), _ = parallel_test.layer_case(
    "gather", True
  )
  with mesh_of(AxisType.Explicit, True) as mesh, jax.enable_x64(True):
    own = mesh.update(axis_types=(given,) * 4)
    run = functools.partial(layer.moe_ffn, recipe, mesh=own)
    y_GTD, stats, _ = jax.eval_shape(run, params, balance, x_GTD, side)
  for x in (y_GTD, stats.count_E):
    assert x.sharding.spec[0] == parallel.TOKENS


@pytest.mark.parametrize(
  "kind,is_set", tiers.only(WAYS[1:2], WAYS, several=True)
)
def test_module(kind, is_set):
  """A group is two sequences, then half a one."""
  rng = np.random.default_rng(0)
  x_BLD = rng.normal(size=(16, 8, 12)).astype(np.float32)
  recipe, _, _ = parallel_test.layer_case("gather", True)
  for tokens in (16, 4):
    grouping = groups.Grouping(tokens, capacity_factor=2.0)
    alone = linen.MoE(recipe, grouping)
    variables = nn.unbox(jax.jit(alone.init)(jax.random.key(0), x_BLD))
    expected, stats, _ = jax.jit(alone.apply)(variables, x_BLD)
    with mesh_of(kind, is_set) as mesh:
      module = linen.MoE(recipe, grouping, mesh)
      args = variables, put(x_BLD, mesh, TOKENS)
      found, stats_on_mesh, _ = jax.device_get(jax.jit(module.apply)(*args))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(stats_on_mesh.count_E, stats.count_E)


STEPS = [(*way, SIZES) for way in WAYS]
STEPS += [(AxisType.Explicit, is_set, (2, 1, 4, 1)) for is_set in (True, False)]


def step_on(mesh, case):
  """A training step, and its state, shapes alone, as it lies on a mesh."""
  parts = mesh_cases.build(case, mesh)
  numbers = mesh_cases.numbers_of(parts["model"])
  init = functools.partial(train_step.init_state, **parts, numbers=numbers)
  boxed = jax.eval_shape(init, jax.random.key(0))
  placed = train_step.shardings(boxed, mesh)
  once = parallel.of_automatic_axes(mesh)
  step = functools.partial(train_step.train_step, **parts, once=once)
  start = jax.jit(lambda rng: nn.unbox(init(rng)), out_shardings=placed)
  return jax.jit(step), start, numbers, boxed, placed


ONCE = Case("gather", ("global_batch",), once=True, **FIRST)
ROWS = jax.P(None, parallel.TOKENS)


def test_a_step_leaves_the_state_where_it_lies():
  """By the types of the results alone, which say how they lie."""
  with mesh_of(AxisType.Explicit, True) as mesh, jax.enable_x64(True):
    step, _, numbers, boxed, placed = step_on(mesh, ONCE)

    def typed(x, sharding):
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    state = jax.tree.map(typed, nn.unbox(boxed), placed)
    batch = jax.tree.map(
      lambda x: typed(x, jax.NamedSharding(mesh, ROWS)),
      mesh_cases.draw_batch(ONCE),
    )
    new, _ = jax.eval_shape(step, state, batch, numbers)
    assert len({x.sharding.spec for x in jax.tree.leaves(new.params)}) > 2
    jax.tree.map(lie_alike, new.params, state.params)


@pytest.mark.long
@pytest.mark.parametrize("kind,is_set,sizes", STEPS)
def test_train_step(kind, is_set, sizes):
  """From the first state to the next, which lies as the state before did."""
  expected, ties = mesh_cases.measure(ONCE, None)
  with mesh_of(kind, is_set, sizes) as mesh, jax.enable_x64(True):
    step, start, numbers, boxed, placed = step_on(mesh, ONCE)
    jax.block_until_ready(start(jax.random.key(0)))
    state = jax.device_put(mesh_cases.draw_state(ONCE, boxed), placed)
    batch = put(mesh_cases.draw_batch(ONCE), mesh, ROWS)
    new, sums = step(state, batch, numbers)
    if kind == AxisType.Explicit:
      jax.tree.map(lie_alike, *map(types_of, (new.params, state.params)))
    new, sums = jax.device_get((new, sums))
  for stats in sums["stats"].values():
    ties += stats.extra.pop("ties").sum()
  found = {"gradient": new.opt_state[0], "params": new.params, "sums": sums}
  found |= {"balance": new.balance}
  distance, leaf = mesh_cases.worst(found, {k: expected[k] for k in found})
  assert distance <= 1e-9 and not ties, leaf


def types_of(tree):
  return jax.tree.map(jax.typeof, tree)


def lie_alike(x, like):
  specs = [[*each.sharding.spec] for each in (x, like)]
  specs = [spec + [None] * (x.ndim - len(spec)) for spec in specs]
  assert specs[0] == specs[1]


def test_model_on_automatic_axes():
  """A model does not say how arrays lie on explicit axes; `automatic` does."""
  case = Case("gather", dtype="float32", **FIRST)
  batch = mesh_cases.draw_batch(case)
  inputs, mask = batch["inputs"][0], batch["mask"][0]

  def run(mesh):
    model = mesh_cases.plain_model(case, mesh)
    return lambda *args: model.apply(*args)[0]

  init = jax.jit(mesh_cases.plain_model(case, None).init)
  variables = nn.unbox(init(jax.random.key(0), inputs))
  expected = jax.jit(run(None))(variables, inputs, mask)
  with mesh_of(AxisType.Explicit, True) as mesh:
    apply = jax.jit(parallel.automatic(run(mesh), TOKENS))
    found = apply(variables, put(inputs, mesh, TOKENS), put(mask, mesh, TOKENS))
    assert jax.typeof(found).sharding.spec[0] == parallel.TOKENS
  np.testing.assert_allclose(jax.device_get(found), expected, atol=1e-5)


def test_a_mesh_of_other_axes_is_refused():
  mesh = jax.make_mesh((2, 4), ("data", "expert"))
  recipe, args, _ = parallel_test.layer_case("gather", True)
  words = r"axes \('data', 'expert'\), and must have .*'tensor'.*length 1"
  with pytest.raises(ConfigError, match=words):
    layer.moe_ffn(recipe, *args, mesh=mesh)
  case = Case("gather", dtype="float32", **FIRST)
  with pytest.raises(ConfigError, match=words):
    mesh_cases.plain_model(case, mesh)
