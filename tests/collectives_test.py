"""Collectives of a step: their kinds, counts, and bytes by formula.

Pinned, so that nothing is sent unseen. A number may change where a version of
XLA joins or splits collectives; their bytes may not.
"""

import collections
import re

import jax
import pytest
from jax.sharding import Mesh

from benchmarks import topologies
from configs import base
from moe_jax import models
from moe_jax.core import parallel
from moe_jax.training.planning import hlo
from tests import aot, mesh_cases, tiers

SHAPE = topologies.Shape(
  d_model=16, d_expert=8, num_experts=16, top_k=2, slots=3, tokens=24
)
LENGTH = 1024  # Tokens of a sequence: activations outweigh weights.
MESHES = [(1, 1, 8, 1), (2, 1, 4, 1), (1, 2, 2, 2), (2, 2, 2, 1), (8, 1, 1, 1)]


# There and back, and both gradients; or tokens, experts, weights, whether they
# are valid and gradients of results, and results and gradients of two of these.
SENT = {
  "all_to_all": {"all-to-all": 4},
  "all_gather": {"all-gather": 5, "reduce-scatter": 3},
}


def compiled(lowered):
  return lowered.compile().as_text()


SLOTS = [
  (dispatcher, exchange, sizes)
  for dispatcher, exchange in (
    *(("gather", "all_to_all"), ("einsum", "all_to_all")),
    *(("gather", "all_gather"), ("sorted", "all_gather")),
  )
  for sizes in MESHES
]
# Every way on one mesh, and every mesh once.
_FEW = [SLOTS[i] for i in (2, 6, 12, 15, 3, 14)]


@pytest.mark.parametrize(
  "dispatcher,exchange,sizes", tiers.only(_FEW, SLOTS, several=True)
)
def test_tokens_are_sent_by_formula(dispatcher, exchange, sizes):
  mesh = mesh_cases.make_mesh(sizes)
  shape = SHAPE._replace(exchange=exchange)
  _, gradient = topologies.lowered(mesh, shape, dispatcher)
  found = hlo.by_axes(hlo.collectives(compiled(gradient)), mesh)
  sizes_of = {key: sent.results for key, sent in found.items()}
  if dispatcher == "einsum":  # Its weights are [T, E, C], not [T, K].
    shape = shape._replace(top_k=SHAPE.num_experts * SHAPE.slots)
  assert sizes_of == topologies.expected(sizes, shape)
  count = {key: sent.count for key, sent in found.items()}
  over_experts = {k: n for (k, axes), n in count.items() if axes == ("expert",)}
  over_experts.pop("all-reduce", None)  # Of the router's gradient.
  if sizes[2] > 1:
    assert over_experts == SENT[exchange]
  if sizes[1] > 1:  # gate, up and down.
    assert count["all-gather", ("fsdp",)] == 3
    assert count["reduce-scatter", ("fsdp",)] == 3


@pytest.mark.parametrize("slots", [None, SHAPE.slots])
@pytest.mark.parametrize(
  "sizes", tiers.only([(1, 1, 8, 1)], [(1, 1, 8, 1), (1, 2, 2, 2)])
)
def test_rows_are_gathered_by_the_emulation_on_cpu(sizes, slots):
  """The only all-gather over experts; of rows, and never of weights.

  What accelerators send is in aot_test.
  """
  mesh = mesh_cases.make_mesh(sizes)
  shape = SHAPE._replace(slots=slots)
  _, gradient = topologies.lowered(mesh, shape, "sorted")
  found = hlo.collectives(compiled(gradient))
  over = collections.defaultdict(list)
  for one in found:
    over[one.kind, hlo.axes(one.groups, mesh)].append(one.size)
  rows = SHAPE.tokens * SHAPE.top_k * SHAPE.d_model * 4
  gathered = [s for s in over["all-gather", ("expert",)] if s > rows]
  # Tokens there, results back; the two gradients go by reduce-scatter.
  buffer = sizes[2] * rows
  if slots:  # The most that a device's experts take of all groups.
    buffer = SHAPE.num_experts * slots * SHAPE.d_model * 4
    assert buffer < sizes[2] * rows
  assert gathered == [sizes[2] * rows, sizes[2] * buffer]
  wanted = topologies.expected(sizes, shape._replace(slots=0))
  for key in (("all-gather", ("fsdp",)), ("reduce-scatter", ("fsdp",))):
    assert sum(over[key]) == wanted.get(key, 0)


def test_no_device_holds_the_choices_of_all_tokens():
  """Neither scores nor a one-hot [T, E] of more than its own groups."""
  mesh = mesh_cases.make_mesh((2, 1, 4, 1))
  # The size of no other array is a multiple of this [T, E].
  shape = SHAPE._replace(tokens=25, num_experts=28)
  one_group = shape.tokens * shape.num_experts
  for dispatcher in ("gather", "sorted"):
    _, gradient = topologies.lowered(mesh, shape, dispatcher)
    shapes = re.findall(r"\w+\[([\d,]+)\]", compiled(gradient))
    sizes = set(map(elements, shapes))
    assert {size for size in sizes if size % one_group == 0} == {one_group}


def elements(shape):
  total = 1
  for length in shape.split(","):
    total *= int(length)
  return total


def step_text(sizes, exchange="all_to_all", once=False):
  """(mesh, HLO) of a training step: two layers, two micro-batches."""
  mesh = mesh_cases.make_mesh(sizes)
  c = base.get_config().model
  c.update(d_model=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8)
  c.moe.update(num_experts=16, d_expert=8, capacity_factor=1.25)
  c.moe.exchange = exchange
  c.moe.balancers = {"bias": {"name": "bias", "rate": 1e-3}}
  model = models.build(c, vocab_size=32, mesh=mesh)
  [(_, lowered)] = aot.step(model, seq_len=LENGTH, once=once)
  return mesh, compiled(lowered)


@pytest.mark.parametrize(
  "sizes,exchange",
  tiers.only(
    [((2, 1, 4, 1), "all_to_all")],
    [
      ((1, 2, 2, 2), "all_to_all"),
      ((2, 1, 4, 1), "all_to_all"),
      ((1, 2, 2, 2), "all_gather"),
    ],
    several=True,
  ),
)
def test_a_whole_step(sizes, exchange):
  """The layers' part by formula; of the rest only weights and gradients."""
  mesh, text = step_text(sizes, exchange)
  found = hlo.collectives(text)
  layers = [one for one in found if "/moe/shard_map/" in one.name]
  groups = 8 // parallel.token_shards(mesh)
  # C = 1.25 * T K / E.
  shape = SHAPE._replace(groups=groups, tokens=LENGTH, slots=LENGTH * 10 // 64)
  shape = shape._replace(exchange=exchange)
  wanted = topologies.expected(sizes, shape)
  router = (
    "all-reduce",
    tuple(a for a, n in zip(topologies.AXES[:3], sizes[:3]) if n > 1),
  )
  wanted.pop(router)  # Joined with that of other weights, as is the next.
  of_experts = wanted.pop(("all-reduce", ("data",)), 0)
  runs = 2 * 2  # Layers, micro-batches.
  of_layers = hlo.by_axes(layers, mesh)
  sizes_of = {key: sent.results for key, sent in of_layers.items()}
  wanted = {key: runs * size for key, size in wanted.items()}
  if exchange == "all_gather":  # Which choices are valid: once for both layers.
    wanted["all-gather", ("expert",)] -= 2 * sizes[2] * groups * LENGTH * 2
  assert sizes_of == wanted
  counts = {(kind, ("expert",)): n for kind, n in SENT[exchange].items()}
  counts |= {(kind, ("fsdp",)): 3 for kind in ("all-gather", "reduce-scatter")}
  counts = {key: runs * count for key, count in counts.items()}
  if exchange == "all_gather":
    counts["all-gather", ("expert",)] -= 2
  for key, sent in of_layers.items():
    assert sent.count == counts.get(key, sent.count), key
  rest = hlo.by_axes([one for one in found if one not in layers], mesh)
  for kind, axes in rest:
    assert kind in ("all-gather", "all-reduce", "reduce-scatter"), kind
    wide = tuple(a for a in parallel.STORED if mesh.shape[a] > 1)
    assert kind != "all-gather" or axes in (wide, ("tensor",)), axes
  if sizes == (2, 1, 4, 1):
    # Four matrices of attention, which forward and backward pass share, and the
    # router's, in every layer and micro-batch; the embedding, which is the head,
    # once.
    matrix, embedding = 4 * 16 * 16, 4 * 32 * 16
    gathered = runs * 5 * matrix + embedding
    assert rest["all-gather", ("expert",)].results == gathered
    # Their gradients: first over the devices that store a part, then over data.
    attention = 4 * matrix
    assert rest["all-reduce", ("expert",)].results - runs * attention < 100
    over_data = runs * (attention // 4 + of_experts)
    assert rest["all-reduce", ("data",)].results == over_data
  # No activations but those that attention sums over its heads.
  largest = max(
    one.size
    for one in found
    if one not in layers and "tensor" not in hlo.axes(one.groups, mesh)
  )
  assert largest < groups * LENGTH * SHAPE.d_model * 4 / 2


def test_gradients_of_experts_are_summed_in_every_micro_batch():
  """By default, as docs/parallel.md says: not once a step."""
  mesh, text = step_text((2, 1, 4, 1))
  over_data = [
    one
    for one in hlo.collectives(text)
    if hlo.axes(one.groups, mesh) == ("data",) and "moe/" in one.name
  ]
  assert {one.times for one in over_data} == {2 * 2}
  size = sum(one.times * one.size for one in over_data)
  attention = (
    4 * 16 * 16 // 4
  )  # XLA sums its four gradients together with them.
  assert size == 2 * 2 * 4 * (3 * (16 // 4) * 16 * 8 + attention)


def test_gradients_of_experts_are_summed_once_a_step():
  """In float32, scattered over fsdp and then added over data."""
  mesh, text = step_text((2, 2, 2, 1), once=True)
  summed = [
    one
    for one in hlo.collectives(text)
    if one.name.startswith("jit(train_step)/shard_map/")
  ]
  weights = 2 * (16 // 2) * 16 * 8  # Layers, experts of a device, D, F.
  assert hlo.by_axes(summed, mesh) == {
    ("reduce-scatter", ("fsdp",)): (3, 3 * 4 * weights // 2, 3 * 4 * weights),
    ("all-reduce", ("data",)): (1, *2 * (3 * 4 * weights // 2,)),
  }
  # In the micro-batches, none but those of a router, of attention and of norms.
  of_layers = [one for one in hlo.collectives(text) if "moe/" in one.name]
  assert not [one for one in of_layers if one.kind == "reduce-scatter"]
  reduced = [one for one in of_layers if one.kind == "all-reduce"]
  assert max(one.size for one in reduced) < 2 * 4 * 16 * 16


def test_sizes_of_results():
  for text, size in (
    ("bf16[8,128]{1,0}", 2048),
    ("(s4[3], u4[8], pred[3])", 2 + 4 + 3),
    ("c64[2]", 16),
    ("f8e4m3fn[5]", 5),
    ("(f32[], token[])", 4),
  ):
    assert hlo.size_of(text) == size, text


def test_hlo_is_read():
  """The ways in which groups of devices are written; loops; async pairs."""
  text = """HloModule jit_f

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
}

%body (p: (s32[])) -> (s32[]) {
  %a = bf16[8,128]{1,0:T(8,128)} ragged-all-to-all(%x, %y), replica_groups={{0,1},{2,3}}, metadata={op_name="jit(f)/moe/a"}
  %s = (f32[4]{0}, f32[16]{0}) all-gather-start(%z), replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}
  %d = f32[16]{0} all-gather-done(%s)
  %alone = f32[4]{0} all-reduce(%z), replica_groups={{0},{1},{2},{3}}, to_apply=%add
}

%cond (p: (s32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%other (p: (s32[])) -> (s32[]) {
  %b = f32[2,3]{1,0} reduce-scatter(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
}

ENTRY %main (p: s32[]) -> s32[] {
  %w = (s32[]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %v = (s32[]) while(%t), condition=%cond, body=%other, metadata={op_name="jit(f)/while"}
  %r = (f32[2]{0}, s32[]) all-reduce(%u, %v), replica_groups=mesh['axis_0'=2,'axis_1'=2], device_ids=([2,2]T(1,0)) {'axis_1'}, to_apply=%add
  %q = pred[4]{0} collective-permute(%u), source_target_pairs={{0,0},{1,3},{3,1}}
}
"""
  found = hlo.collectives(text)
  assert [(one.kind, one.size, one.groups, one.times) for one in found] == [
    ("ragged-all-to-all", 2048, ((0, 1), (2, 3)), 3),
    ("all-gather", 64, ((0, 2), (1, 3)), 3),
    ("reduce-scatter", 24, ((0, 1), (2, 3)), 5),
    ("all-reduce", 12, ((0, 2), (1, 3)), 1),
    ("collective-permute", 4, ((0, 0), (1, 3), (3, 1)), 1),
  ]
  assert found[0].name == "jit(f)/moe/a"
  mesh = Mesh(jax.numpy.arange(4).reshape(2, 2), ("data", "expert"))
  assert hlo.by_axes(found, mesh) == {
    ("all-gather", ("data",)): (3, 192, 192),
    ("all-reduce", ("data",)): (1, 12, 12),
    ("collective-permute", ("data",)): (1, 4, 4),
    ("ragged-all-to-all", ("expert",)): (3, 3 * 2048, 3 * 2048),
    ("reduce-scatter", ("expert",)): (5, 5 * 24, 2 * 5 * 24),
  }
