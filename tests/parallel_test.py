"""The mesh never changes the mathematics: a covering set of `mesh_product`.

Everything is compared with the same step without a mesh, leaf by leaf.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax.core import parallel, registry
from moe_jax.core.errors import ConfigError
from moe_jax.moe import exchange, experts, groups, layer, reduction
from moe_jax.moe.types import Bound, Side, Sublayer
from moe_jax.training import train_step
from tests import mesh_cases, oracle, tiers
from tests.mesh_cases import Case, L

FIRST, PAIRS, HALVES, INPUT = mesh_cases.VARIATIONS
# Every mesh, scope, variation and way to bound rows; (8, 1, 1, 1) and
# (1, 1, 1, 1) exchange nothing.
COVERING = {
  "einsum": (
    Case("einsum", ("sequence", "group"), **PAIRS),
    [(1, 2, 2, 2), (8, 1, 1, 1)],
  ),
  "gather": (
    Case("gather", ("micro_batch",), **HALVES),
    [(2, 1, 4, 1), (1, 2, 2, 2), (1, 1, 1, 1)],
  ),
  "sorted": (
    Case("sorted", ("global_batch",), remat="none", **FIRST),
    [(1, 2, 2, 2), (1, 1, 8, 1)],
  ),
  "buckets": (
    Case("buckets", ("sequence", "global_batch"), remat="none", **PAIRS),
    [(1, 1, 8, 1), (1, 2, 2, 2)],
  ),
  "dropless": (
    Case("dropless", ("micro_batch",), **INPUT),
    [(2, 1, 4, 1)],
  ),
  "choice": (
    Case("choice", router=(("priority", "score"),), skew=4.0),
    [(1, 1, 8, 1)],
  ),
  "float32": (
    Case("sorted", ("group",), dtype="float32", **PAIRS),
    [(1, 2, 2, 2)],
  ),
  "one": (
    Case(
      "gather",
      num_experts=8,
      top_k=1,
      skew=4.0,
      router=(("renormalize", False), ("score_before_top_k", True)),
    ),
    [(1, 1, 8, 1)],
  ),
  # 16 experts, 2 a token, a sigmoid and a bias; in other layers 4 experts, 1 a
  # token, a softmax and a loss.
  "kinds": (
    Case(
      "gather",
      (),
      z_loss=False,
      router=(("score", "sigmoid"), ("renormalize", True)),
      prefix=("moe@other",),
      other="few",
      remat="none",
    ),
    [(2, 1, 4, 1)],
  ),
  "many": (
    Case("buckets", num_experts=64, top_k=8, skew=3.0, shared=1),
    [(1, 2, 2, 2)],
  ),
  "all_gather": (
    Case("buckets", remat="dispatch", exchange="all_gather", **HALVES),
    [(1, 1, 8, 1), (2, 1, 4, 1), (1, 2, 2, 2)],
  ),
  "once": (
    Case("gather", ("global_batch",), once=True, **FIRST),
    [(1, 2, 2, 2), (2, 1, 4, 1)],
  ),
  "once_dropless": (
    Case("dropless", remat="none", once=True, exchange="all_gather", **HALVES),
    [(1, 2, 2, 2), (1, 1, 8, 1)],
  ),
}


ONE_STEP = [(name, sizes) for name, x in COVERING.items() for sizes in x[1]]
QUICK = [("kinds", (2, 1, 4, 1))]


@pytest.mark.parametrize(
  "name,sizes", tiers.only(QUICK, ONE_STEP, several=True)
)
def test_one_step_on_a_mesh(name, sizes):
  """Outputs, gradients, statistics, bias and parameters after the step."""
  case, _ = COVERING[name]
  expected = mesh_cases.measure(case, None)
  found = mesh_cases.measure(case, sizes)
  distance, leaf = mesh_cases.check(case, found, expected)
  assert distance <= mesh_cases.TOLERANCE[case.dtype], leaf


def test_three_steps_and_each_of_them_again():
  """Each step repeats bit for bit, with a bias, a bound and accumulation."""
  case, (sizes, _) = COVERING["buckets"]
  states = dict.fromkeys((None, sizes), mesh_cases.initial_state(case))
  for step in range(3):
    batch = mesh_cases.draw_batch(dataclasses.replace(case, seed=step))
    found = {}
    for mesh, state in states.items():
      found[mesh] = mesh_cases.measure(case, mesh, state=state, batch=batch)
    again = mesh_cases.measure(case, sizes, state=states[sizes], batch=batch)
    assert mesh_cases.worst(again[0], found[sizes][0])[0] == 0.0
    distance, leaf = mesh_cases.check(case, found[sizes], found[None])
    assert distance <= 1e-9, (step, leaf)
    for mesh, (after, _) in found.items():
      states[mesh] = states[mesh].replace(
        step=states[mesh].step + 1,
        params=after["params"],
        balance=after["balance"],
      )


def test_covering_set_covers():
  cases = [case for case, _ in COVERING.values()]
  assert {c.layout for c in cases} == set(mesh_cases.LAYOUTS)
  assert {s for c in cases for s in c.scopes} == set(mesh_cases.SCOPES)
  meshes = {m for _, meshes in COVERING.values() for m in meshes}
  assert meshes == set(mesh_cases.MESHES)
  assert {c.num_experts for c in cases} >= {8, 64}
  assert {c.top_k for c in cases} == {1, 2, 8}


def test_without_a_mesh_nothing_is_pinned_to_one_around_it():
  x_BD = jnp.ones((8, 4))
  pin = jax.jit(lambda x: parallel.constrain(x, ("batch", None), None))
  with jax.set_mesh(jax.make_mesh((2,), ("theirs",))):
    np.testing.assert_array_equal(pin(x_BD), x_BD)


def test_parameters_start_the_same_on_a_mesh():
  case = Case("gather", dtype="float32", **FIRST)
  states = []
  for sizes in (None, (1, 2, 2, 2)):
    mesh = None if sizes is None else mesh_cases.make_mesh(sizes)
    parts = mesh_cases.build(case, mesh)
    numbers = mesh_cases.numbers_of(parts["model"])
    init = functools.partial(train_step.init_state, **parts, numbers=numbers)
    boxed = jax.eval_shape(init, jax.random.key(0))
    out = {}
    if mesh is not None:
      out = {"out_shardings": train_step.shardings(boxed, mesh)}
    run = jax.jit(lambda rng, init=init: nn.unbox(init(rng)), **out)
    rng = jax.random.key(0)
    run = run.lower(rng).compile()
    states.append(run(rng))
  sharded = states[1].params["decoder"]["0"]["moe"]["experts"]["up"].sharding
  assert sharded.spec == jax.P(None, "expert", "fsdp", "tensor")
  plain, other = (jax.device_get(s.params) for s in states)
  assert mesh_cases.worst(other, plain)[0] < 1e-6


# Accumulation and scan, without a mesh.


def test_accumulation_is_one_large_batch():
  """Nothing is bounded or balanced by a loss, so nothing may tell the two.

  The noise comes from keys by global group, the division from all tokens,
  and the bias from all counts.
  """
  case = Case(
    "dropless",
    (),
    z_loss=False,
    router=(("noise", 0.3),),
    tokens_per_group=4,
    repeats=1,
    remat="none",
  )
  batch = mesh_cases.draw_batch(case)
  assert batch["mask"][0].sum() != batch["mask"][1].sum()
  two, _ = mesh_cases.measure(case, None, batch=batch)
  batch = {k: v.reshape(1, 16, L) for k, v in batch.items()}
  one, _ = mesh_cases.measure(case, None, batch=batch)
  for found in (one, two):
    del found["logits"], found["stats"]  # First micro-batch only.
  distance, leaf = mesh_cases.worst(two, one)
  assert distance <= 1e-9, leaf


def test_balance_of_a_step():
  """All losses, averaged over three micro-batches, and the bias, by numpy."""
  case = Case(
    "gather",
    mesh_cases.SCOPES,
    tokens_per_group=2 * L,
    accumulation=3,
    rule="proportional",
  )
  batch = mesh_cases.draw_batch(case)
  step, _ = mesh_cases.measure(case, None)
  loss, so_far_RE = 0.0, np.zeros((case.repeats, mesh_cases.E), int)
  for i in range(case.accumulation):
    # Numbers by group are reported for the first micro-batch only.
    turned = {k: np.roll(v, -i, axis=0) for k, v in batch.items()}
    found, _ = mesh_cases.measure(case, None, batch=turned)
    micro = found["stats"]["decoder/0/moe"]
    for r in range(case.repeats):
      s = jax.tree.map(lambda x, r=r: x[r], micro)
      loss += mesh_cases.Z_COEFFICIENT * s.z.sum() / s.tokens.sum()
      for scope in mesh_cases.SCOPES:
        one = scoped_loss(scope, s, so_far_RE[r])
        loss += mesh_cases.coefficient(scope) * one
    so_far_RE += micro.count_E.sum((1, 2))
  loss /= case.accumulation
  np.testing.assert_allclose(step["sums"]["aux_loss"], loss, rtol=1e-12)
  count_RE = step["sums"]["stats"]["decoder/0/moe"].count_E.sum((1, 2))
  np.testing.assert_array_equal(count_RE, so_far_RE)

  bias = lambda tree: tree["decoder"]["0"]["moe"]["bias"]["bias_E"]  # noqa: E731
  before_RE = bias(mesh_cases.initial_state(case).balance)
  for before_E, after_E, count_E in zip(
    before_RE, bias(step["balance"]), count_RE
  ):
    want_E = oracle.bias_update(
      before_E, count_E, mesh_cases.BIAS_RATE, "proportional"
    )
    np.testing.assert_allclose(after_E, want_E, rtol=1e-12)


def scoped_loss(scope, s, so_far_E):
  """The loss of one layer and micro-batch, each part by its tokens."""
  groups, sequences, _ = s.count_E.shape
  parts = {
    "sequence": [(g, i) for g in range(groups) for i in range(sequences)],
    "group": [(g,) for g in range(groups)],
  }.get(scope, [()])
  total = 0.0
  for part in parts:
    count_E = s.count_E[part].reshape(-1, mesh_cases.E).sum(0)
    prob_E = s.prob_E[part].reshape(-1, mesh_cases.E).sum(0)
    tokens = s.tokens[part].sum()
    if scope == "global_batch":
      count_E = count_E + so_far_E
    total += tokens * oracle.switch_loss(count_E, prob_E, tokens)
  return total / s.tokens.sum()


def test_scanned_repeats_are_an_unrolled_pattern():
  options = {"router": (("noise", 0.3),), "remat": "none"}
  scanned = Case("gather", prefix=("dense",), **options)
  unrolled = dataclasses.replace(scanned, pattern=("moe", "moe"), repeats=1)

  def unstack(tree):
    """{"0": [2, ...]} to {"0": [1, ...], "1": [1, ...]} in each segment."""
    return {
      k: {
        str(r): jax.tree.map(lambda x, r=r: x[r : r + 1], v["0"])
        for r in (0, 1)
      }
      if k == "decoder"
      else v
      for k, v in tree.items()
    }

  def unstacked(stats):
    """The same of {"decoder/0/moe": [2, ...]}."""
    return {
      f"decoder/{r}/moe": jax.tree.map(
        lambda x, r=r: x[r : r + 1], stats["decoder/0/moe"]
      )
      for r in (0, 1)
    }

  state = mesh_cases.initial_state(scanned)
  other = mesh_cases.initial_state(unrolled).replace(
    params=unstack(state.params), balance=unstack(state.balance)
  )
  want, _ = mesh_cases.measure(scanned, None, state=state)
  found, _ = mesh_cases.measure(unrolled, None, state=other)
  sums, stats = want.pop("sums"), want.pop("stats")
  found_sums, found_stats = found.pop("sums"), found.pop("stats")
  want = {k: v if k == "logits" else unstack(v) for k, v in want.items()}
  assert mesh_cases.worst(found, want)[0] <= 1e-9
  assert mesh_cases.worst(found_stats, unstacked(stats))[0] <= 1e-9
  assert (
    mesh_cases.worst(found_sums["stats"], unstacked(sums["stats"]))[0] <= 1e-9
  )
  assert mesh_cases.worst(found_sums["loss"], sums["loss"])[0] <= 1e-9


# The layer by itself.

G, T, S, D, E, F = 8, 6, 2, 12, 8, 4
BOUNDS = {
  "einsum": ("einsum", Bound(2, E)),
  "gather": ("gather", Bound(2, E)),
  "sorted": ("sorted", Bound(2, E)),
  "buckets": ("sorted", Bound(3, 4)),
  "dropless": ("sorted", None),
}


def layer_case(layout, checked):
  """A recipe with everything that the exchange treats specially.

  In one layout the bias of a network's output has a name of its own.
  """
  dispatcher, bound = BOUNDS[layout]
  offset = renamed if layout == "einsum" else lambda network: network
  recipe = layer.Recipe(
    num_experts=E,
    router=registry.load("routers", "top_k", top_k=2, renormalize=True),
    dispatcher=registry.load("dispatchers", dispatcher),
    experts=dataclasses.replace(
      offset(experts.build(F, "swiglu", True)), checked=checked
    ),
    bound=bound,
    sequences=S,
    balancers=(("bias", registry.load("balancers", "bias", rate=1e-2)),),
    shared=offset(experts.dense(2 * F, "gelu", True)),
  )
  rng = np.random.default_rng(3)

  def network(lead, hidden, gate):
    shapes = {"up": (D, hidden), "down": (hidden, D)}
    if gate:
      shapes["gate"] = (D, hidden)
    biases = {f"{k}_bias": v[1:] for k, v in shapes.items()}
    if layout == "einsum":
      biases["offset"] = biases.pop("down_bias")
    return {
      k: rng.normal(size=lead + v) / 2 for k, v in (shapes | biases).items()
    }

  params = {
    "router": {"kernel": rng.normal(size=(D, E)) + np.linspace(-1, 1, E)},
    "experts": network((E,), F, True),
    "shared": network((), 2 * F, False),
  }
  balance = {"bias": {"bias_E": rng.normal(size=E) / 10}}
  mask_GT = np.arange(T) < rng.integers(0, T + 1, (G, 1))
  x_GTD, r_GTD = rng.normal(size=(2, G, T, D))
  return recipe, (params, balance, x_GTD, Side(mask_GT)), r_GTD


def renamed(network):
  """Experts, or a dense network, whose output's bias is called "offset"."""

  def apply(params, *args):
    ours = {"offset": "down_bias"}
    return network.apply({ours.get(k, k): w for k, w in params.items()}, *args)

  axes = dict(network.axes)
  axes["offset"] = axes.pop("down_bias")
  return dataclasses.replace(
    network, axes=axes, apply=apply, added_once=("offset",)
  )


def run_layer(recipe, args, r_GTD, mesh):
  """Outputs, statistics, what was collected, and all gradients."""
  run = functools.partial(layer.moe_ffn, recipe, mesh=mesh)

  def scalar(params, x_GTD, balance, side):
    y_GTD, stats, kept = run(
      params, balance, x_GTD, side, None, collect="routing"
    )
    total = (y_GTD * r_GTD).sum() + stats.prob_E[..., 0].sum() + stats.z.sum()
    return total, (y_GTD, stats, kept)

  params, balance, x_GTD, side = args
  with jax.enable_x64(True):
    program = jax.jit(jax.value_and_grad(scalar, (0, 1), has_aux=True))
    program = program.lower(params, x_GTD, balance, side)
    program = program.compile()
    return jax.device_get(program(params, x_GTD, balance, side))


@pytest.mark.parametrize(
  "layout,checked",
  [(k, True) for k in BOUNDS] + [("buckets", False), ("dropless", False)],
)
def test_layer_on_a_mesh(layout, checked):
  """check_vma is on, or off as a kernel may need."""
  recipe, args, r_GTD = layer_case(layout, checked)
  expected = run_layer(recipe, args, r_GTD, None)
  dropped = sum(v.sum() for v in expected[0][1][1].dropped.values())
  assert (dropped > 0) == (layout != "dropless")
  # Two groups on a device: a buffer is for both.
  found = run_layer(recipe, args, r_GTD, mesh_cases.make_mesh((1, 2, 2, 2)))
  distance, leaf = mesh_cases.worst(found, expected)
  assert distance <= 1e-9, leaf


@pytest.mark.parametrize("layout", ["einsum", "dropless"])
@pytest.mark.parametrize("sizes", [(2, 2, 2, 1), (2, 1, 2, 2), (1, 8, 1, 1)])
def test_gradients_that_are_added_up_later(sizes, layout):
  """A slot has those of each device; they add up to those of one device.

  D = 12 is not split over fsdp = 8. check_vma is on for einsum alone.
  """
  case = layer_case(layout, layout == "einsum")
  recipe, (params, balance, *tokens), r_GTD = case
  mesh = mesh_cases.make_mesh(sizes)
  sublayers = {"a/moe": Sublayer(recipe, None, (0,), False)}

  def gradients(mesh):
    tree = {"a": {"moe": params}, "b": {}}
    learnt, weights = reduction.split(tree, sublayers, mesh)

    def scalar(learnt):
      own = reduction.join(learnt, weights)["a"]["moe"]
      run = functools.partial(layer.moe_ffn, recipe, mesh=mesh)
      return (run(own, balance, *tokens)[0] * r_GTD).sum()

    found = jax.grad(scalar)(learnt)
    for slot in found["a"]["moe"].get("unreduced", {}).values():
      assert len(slot) == sizes[0] * sizes[1]
    return reduction.reduced(found, weights, sublayers, mesh)

  with jax.enable_x64(True):
    expected = jax.jit(functools.partial(gradients, None))()
    found = jax.device_get(jax.jit(functools.partial(gradients, mesh))())
  distance, leaf = mesh_cases.worst(found, jax.device_get(expected))
  assert distance <= 1e-9, leaf


def test_gradients_that_are_added_up_later_are_float32():
  """Though the experts compute in bfloat16."""
  recipe, (params, balance, x_GTD, side), _ = layer_case("gather", True)
  recipe = dataclasses.replace(recipe, balancers=(), shared=None)
  params = jax.tree.map(jnp.float32, params)
  del params["shared"]
  mesh = mesh_cases.make_mesh((2, 1, 2, 2))
  sublayers = {"moe": Sublayer(recipe, None, (0,), False)}
  learnt, weights = reduction.split({"moe": params}, sublayers, mesh)

  def scalar(learnt):
    own = reduction.join(learnt, weights)["moe"]
    x = jnp.bfloat16(x_GTD)
    return layer.moe_ffn(recipe, own, {}, x, side, mesh=mesh)[0].sum()

  found = jax.eval_shape(jax.grad(scalar), learnt)["moe"]
  assert {x.dtype for x in found["unreduced"].values()} == {
    jnp.dtype("float32")
  }


@pytest.mark.parametrize(
  "layout,checked", [("gather", True), ("buckets", True), ("dropless", False)]
)
def test_layer_on_a_mesh_without_an_expert_axis(layout, checked):
  """Nothing is sent, and rows stay as the plan has them."""
  recipe, args, r_GTD = layer_case(layout, checked)
  expected = run_layer(recipe, args, r_GTD, None)
  found = run_layer(recipe, args, r_GTD, mesh_cases.make_mesh((2, 2, 1, 2)))
  distance, leaf = mesh_cases.worst(found, expected)
  assert distance <= 1e-9, leaf


EXCHANGED = [(1, 1, 8, 1), (2, 1, 4, 1), (1, 2, 2, 2)]
GATHERED = [(layout, sizes) for layout in BOUNDS for sizes in EXCHANGED]


@pytest.mark.parametrize(
  "layout,sizes",
  tiers.only(
    [(layout, EXCHANGED[i % 3]) for i, layout in enumerate(BOUNDS)],
    GATHERED,
    several=True,
  ),
)
def test_layer_whose_tokens_are_gathered(layout, sizes):
  """The same numbers; and the same assignments drop, by cause."""
  recipe, args, r_GTD = layer_case(layout, layout != "buckets")
  if sizes[2] == 8:  # Each device has its own bucket.
    bound = recipe.bound and Bound(2, E)
    recipe = dataclasses.replace(recipe, bound=bound)
  expected = run_layer(recipe, args, r_GTD, None)
  recipe = dataclasses.replace(recipe, exchange="all_gather")
  found = run_layer(recipe, args, r_GTD, mesh_cases.make_mesh(sizes))
  distance, leaf = mesh_cases.worst(found, expected)
  assert distance <= 1e-9, leaf


@pytest.mark.parametrize("kind", exchange.KINDS)
@pytest.mark.parametrize("sizes", [(1, 1, 4, 2), (2, 1, 4, 1), (1, 2, 2, 2)])
def test_a_bounded_buffer_drops_the_same_on_every_mesh(sizes, kind):
  """Shared by two experts of a bucket, whose drops are of the cause "buffer"."""
  recipe, (params, balance, *tokens), _ = layer_case("buckets", True)
  recipe = dataclasses.replace(recipe, exchange=kind)

  def dropped(mesh):
    run = functools.partial(layer.moe_ffn, recipe, mesh=mesh)
    stats = jax.jit(lambda *args: run(*args)[1])(params, balance, *tokens)
    return jax.device_get((stats.dropped, stats.kept_E))

  expected = dropped(None)
  assert expected[0]["buffer"].sum() > 0 == expected[0]["capacity"].sum()
  found = dropped(mesh_cases.make_mesh(sizes))
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("kind", exchange.KINDS)
@pytest.mark.parametrize("layout", BOUNDS)
@pytest.mark.parametrize("sizes", [(1, 1, 4, 1), (1, 2, 2, 2)])
def test_rows_of_a_buffer(sizes, layout, kind):
  """The experts of a device are given the rows that `buffer_rows` says."""
  recipe, args, _ = layer_case(layout, True)
  seen = set()

  def apply(params, rows, rng_GE):
    seen.add(rows.x.size // D)
    return recipe.experts.apply(params, rows, rng_GE)

  watched = dataclasses.replace(recipe.experts, apply=apply)
  changed = dataclasses.replace(recipe, experts=watched, exchange=kind)
  mesh = mesh_cases.make_mesh(sizes)
  jax.eval_shape(functools.partial(layer.moe_ffn, changed, mesh=mesh), *args)
  devices, groups = sizes[2], G // (sizes[0] * sizes[1] * sizes[2])
  # Of all groups of the expert axis, for E / n experts or 4 / n buckets.
  rows = {
    "buckets": min(2 * T, 3 * 4 // devices),
    "dropless": min(2, E // devices) * T,
  }.get(layout, 2 * E // devices)
  assert exchange.buffer_rows(recipe, T, groups, devices) == sum(seen)
  assert sum(seen) == devices * groups * rows


@pytest.mark.parametrize("kind", exchange.KINDS)
def test_all_tokens_on_one_device(kind):
  """They fill its buffer, which holds a row a token though K is 2."""
  recipe, (params, *args), r_GTD = layer_case("dropless", True)
  towards = np.where(np.arange(E) == 3, 50.0, 0.0)
  args[0] = {"bias": {"bias_E": towards}}
  args[2] = Side(np.ones((G, T), bool))
  expected = run_layer(recipe, (params, *args), r_GTD, None)
  stats = expected[0][1][1]
  assert (stats.count_E[..., 3] == T // S).all()
  assert exchange.buffer_rows(recipe, T, 1, 8) == G * T
  recipe = dataclasses.replace(recipe, exchange=kind)
  mesh = mesh_cases.make_mesh((1, 1, 8, 1))
  found = run_layer(recipe, (params, *args), r_GTD, mesh)
  distance, leaf = mesh_cases.worst(found, expected)
  assert distance <= 1e-9, leaf


def test_buckets_that_a_mesh_does_not_divide_are_refused():
  recipe, args, _ = layer_case("buckets", True)
  mesh = mesh_cases.make_mesh((1, 1, 8, 1))
  with pytest.raises(ConfigError, match="expert_buckets = 4 .* expert = 8"):
    layer.moe_ffn(recipe, *args, mesh=mesh)


@pytest.mark.parametrize("part", ["experts", "shared"])
def test_widths_that_a_mesh_does_not_divide_are_refused(part):
  """Every shard would compute the whole sum, and all of them be added up."""
  recipe, (params, balance, x_GTD, side), _ = layer_case("gather", True)
  build = {"experts": experts.build, "shared": experts.dense}[part]
  network = build(6, "gelu")
  sizes = (E, D) if part == "experts" else (D,)
  params[part] = network.init(jax.random.key(0), *sizes)
  recipe = dataclasses.replace(recipe, **{part: network})
  mesh = mesh_cases.make_mesh((1, 1, 2, 4))
  with pytest.raises(ConfigError, match=f'"mlp" of {part} = 6 .* tensor = 4'):
    layer.moe_ffn(recipe, params, balance, x_GTD, side, mesh=mesh)


@functools.cache
def noisy_experts(silent):
  """Experts that add noise to their rows; `silent`: that declare none."""
  base = experts.build(F, "gelu")

  def apply(params, rows, rng_GE):
    assert (rng_GE is None) == silent
    out = base.apply(params, rows, None)
    if silent:
      return out
    noise = functools.partial(jax.random.uniform, dtype=out.x.dtype)
    if rows.tokens_per_expert_GE is None:
      shape_CD = out.x.shape[2:]
      draw = jax.vmap(jax.vmap(lambda rng: noise(rng, shape_CD)))
      return out.replace(x=out.x + draw(rng_GE))
    # All rows of a group and expert get the same.
    count_GE = rows.tokens_per_expert_GE
    size = out.x.shape[0]
    keys_N = jnp.repeat(
      rng_GE.T.reshape(-1), count_GE.T.reshape(-1), total_repeat_length=size
    )
    return out.replace(x=out.x + jax.vmap(lambda r: noise(r, (D,)))(keys_N))

  return dataclasses.replace(base, apply=apply, draws=not silent)


@pytest.mark.parametrize("kind", exchange.KINDS)
@pytest.mark.parametrize("layout", ["gather", "dropless"])
def test_experts_draw_the_same_on_a_mesh(layout, kind):
  """Every group, expert and seed has its own key."""
  dispatcher, bound = BOUNDS[layout]
  recipe = layer.Recipe(
    num_experts=E,
    router=registry.load("routers", "top_k", top_k=2),
    dispatcher=registry.load("dispatchers", dispatcher),
    experts=noisy_experts(False),
    bound=bound,
    exchange=kind,
  )
  rng = np.random.default_rng(3)
  zeros = {"up": np.zeros((E, D, F)), "down": np.zeros((E, F, D))}
  params = {"router": {"kernel": rng.normal(size=(D, E))}, "experts": zeros}
  # Every group has the same tokens, and the experts give their noise alone.
  x_GTD = np.broadcast_to(rng.normal(size=(T, D)), (G, T, D))
  side = Side(np.ones((G, T), bool))

  def program(mesh, experts_of=recipe.experts):
    of_these = dataclasses.replace(recipe, experts=experts_of)
    run = functools.partial(layer.moe_ffn, of_these, mesh=mesh)
    return lambda keys: run(params, {}, x_GTD, side, keys)[0]

  with jax.enable_x64(True):
    keys, others = (layer.group_keys(jax.random.key(i), G) for i in (0, 1))
    by_one = jax.jit(program(None))
    alone, other = np.asarray(by_one(keys)), by_one(others)
    mesh = mesh_cases.make_mesh((2, 1, 4, 1))
    on_mesh = jax.jit(program(mesh))(keys)
    jax.eval_shape(program(None, noisy_experts(True)), keys)
  np.testing.assert_allclose(on_mesh, alone, rtol=0, atol=1e-12)
  groups = {group.tobytes() for group in alone}
  assert len(groups) == G and abs(alone).max() > 0.1
  assert not np.allclose(other, alone)
  # Keys of experts differ, and are none of those that the router draws from.
  of_experts = exchange.expert_keys(recipe.experts, keys, E, None)
  seen = np.asarray(jax.random.key_data(of_experts)).reshape(G * E, -1)
  routers = jax.vmap(lambda rng: jax.random.split(rng, 3))(keys)
  routers = np.asarray(jax.random.key_data(routers)).reshape(G * 3, -1)
  assert len({tuple(k) for k in [*seen, *routers]}) == G * E + G * 3


def test_keys_of_groups_do_not_depend_on_the_batch_they_come_in():
  grouping = groups.Grouping(4, None, None, None)
  rng = jax.random.key(3)
  whole = grouping.keys(rng, 6, L)
  part = grouping.keys(rng, 2, L, first=4)
  np.testing.assert_array_equal(
    jax.random.key_data(whole)[8:], jax.random.key_data(part)
  )


# The emulated exchange.


@pytest.mark.parametrize("seed", range(4))
def test_ragged_all_to_all_against_loops(seed):
  """Values and gradient on 8 devices; some send nothing, some to nobody."""
  devices, rows, width = 8, 24, 3
  rng = np.random.default_rng(seed)
  size_ij = rng.integers(0, 4, (devices, devices))
  size_ij[rng.random((devices, devices)) < 0.4] = 0
  size_ij[seed] = 0
  size_ij[:, (seed + 3) % devices] = 0
  # Slices need not be packed: gaps between them, in any order.
  from_ij, to_ij = (
    np.array([gaps(rng, sizes, rows) for sizes in axis])
    for axis in (size_ij, size_ij.T)
  )
  x_iND = rng.normal(size=(devices, rows, width)).astype(np.float32)
  out_iND = rng.normal(size=(devices, rows, width)).astype(np.float32)
  r_iND = rng.normal(size=(devices, rows, width)).astype(np.float32)

  want, want_dx, want_dout = out_iND.copy(), np.zeros_like(x_iND), r_iND.copy()
  for i in range(devices):
    for j in range(devices):
      for n in range(size_ij[i, j]):
        source, target = from_ij[i, j] + n, to_ij[j, i] + n
        want[j, target] = x_iND[i, source]
        want_dx[i, source] += r_iND[j, target]
        want_dout[j, target] = 0

  mesh = mesh_cases.make_mesh((1, 1, 8, 1))

  def body(x, out, *integers):
    # output_offsets: where my slice lands at its receiver.
    integers = [i[0] for i in integers]
    return exchange.ragged_all_to_all(x[0], out[0], *integers, mesh)[None]

  run = jax.shard_map(
    body, mesh=mesh, in_specs=jax.P("expert"), out_specs=jax.P("expert")
  )
  integers = [
    jnp.asarray(a, jnp.int32) for a in (from_ij, size_ij, to_ij.T, size_ij.T)
  ]

  @jax.jit
  def both(x, out):
    y, pull = jax.vjp(lambda x, out: run(x, out, *integers), x, out)
    return y, pull(jnp.asarray(r_iND))

  found, (dx, dout) = jax.device_get(both(x_iND, out_iND))
  np.testing.assert_array_equal(found, want)
  np.testing.assert_allclose(dx, want_dx, rtol=1e-6)
  np.testing.assert_allclose(dout, want_dout, rtol=1e-6)


def gaps(rng, sizes, rows):
  """Starts of slices of these sizes in random order, with random gaps."""
  order = rng.permutation(len(sizes))
  free = rows - sizes.sum()
  skips = rng.multinomial(
    max(free, 0), np.ones(len(sizes) + 1) / (len(sizes) + 1)
  )
  starts = np.zeros(len(sizes), int)
  position = 0
  for place, i in enumerate(order):
    position += skips[place]
    starts[i] = position
    position += sizes[i]
  return starts
