"""A recipe for every kind of layer: what a variant changes, and what it is of."""

import jax
import pytest

from configs import tiny
from moe_jax import models
from moe_jax.core import options
from moe_jax.core.errors import ConfigError
from moe_jax.models import counts
from moe_jax.moe.groups import Grouping
from tests import mesh_cases

FEW = {
  "num_experts": 2,
  "top_k": 1,
  "d_expert": 8,
  "tokens_per_group": 4,
  "capacity_factor": None,
  "router": {"name": "top_k", "score": "sigmoid"},
  "dispatcher": {"name": "sorted"},
  "balancers": {"b": {"name": "bias", "rate": 1e-2}},
}


def section(pattern=("moe", "dense@wide", "moe@few"), **own):
  """Experts of three sizes after one dense layer, twice."""
  c = tiny.get_config().model
  c.update(prefix=("moe@few",), pattern=pattern, num_layers=7, d_ff=32)
  c.moe.update(num_experts=8, num_shared_experts=1)
  c.variants = {"few": {"moe": FEW}, "wide": {"d_ff": 48}, **own}
  return c


def test_a_variant_overrides_the_keys_that_it_has():
  arch = models.build(section(), vocab_size=9).arch
  base, few = arch.layer("moe"), arch.layer("moe@few")
  assert [x.recipe.num_experts for x in (base, few)] == [8, 2]
  assert [x.recipe.router.top_k for x in (base, few)] == [2, 1]
  assert [x.recipe.experts.width for x in (base, few)] == [32, 8]
  assert [x.recipe.dispatcher.ragged for x in (base, few)] == [False, True]
  assert [len(x.recipe.balancers) for x in (base, few)] == [0, 1]
  assert few.grouping == Grouping(4, None)
  assert base.grouping == Grouping("sequence", 2.0)
  # The shared experts are as many, and as wide as the routed ones.
  assert [x.recipe.shared.width for x in (base, few)] == [32, 8]
  wide = arch.layer("dense@wide")
  assert wide.mlp.width == 48 and wide.recipe is None
  assert base.attention == few.attention == wide.attention


def test_the_same_recipe_is_the_same_object():
  """Models are then equal, and equal models share programs."""
  one, other = (models.build(section(), vocab_size=9) for _ in range(2))
  assert one == other and hash(one) == hash(other)
  same = section(alike={})
  same.pattern = ("moe", "dense", "moe@alike")
  arch = models.build(same, vocab_size=9).arch
  assert arch.layer("moe") == arch.layer("moe@alike")


def test_where_the_layers_are():
  model = models.build(section(), vocab_size=9)
  found = {k: v.numbers for k, v in model.sublayers.items()}
  assert found == {
    "prefix/0/moe": (0,),
    "decoder/0/moe": (1, 4),
    "decoder/2/moe": (3, 6),
  }
  experts = {k: v.recipe.num_experts for k, v in model.sublayers.items()}
  assert list(experts.values()) == [2, 8, 2]
  params = models.variables(model)["params"]
  for path, parts in model.sublayers.items():
    kernel = models.at(params, f"{path}/router")["kernel"].value
    repeats = len(parts.numbers)
    assert kernel.shape == (repeats, 32, parts.recipe.num_experts)
  assert models.at(params, "decoder/1/moe") == {}
  assert models.sublayers(object()) == {}


def test_each_layer_counts_its_own_experts():
  model = models.build(section(), vocab_size=9)
  found = counts.count(model, models.variables(model))
  one = {"moe": 3 * 32 * 32, "few": 3 * 32 * 8}
  assert found["experts"] == 2 * 8 * one["moe"] + 3 * 2 * one["few"]
  idle = 2 * 6 * one["moe"] + 3 * 1 * one["few"]
  assert found["total"] - found["active"] == idle
  assert found["router"] == 32 * (2 * 8 + 3 * 2)
  assert found["shared"] == 2 * one["moe"] + 3 * one["few"]
  assert found["dense"] == 2 * 3 * 32 * 48
  assert found["selection_bias"] == 3 * 2


def test_a_run_is_described_by_layers():
  found = counts.describe(models.build(section(), vocab_size=9))
  assert {k: v["num_experts"] for k, v in found.items()} == {
    "0, 3, 6": 2,
    "1, 4": 8,
  }
  few = found["0, 3, 6"]
  assert few["router"]["score"] == "sigmoid" and few["router"]["top_k"] == 1
  assert few["router"]["renormalize"] is False, "no hidden default"
  assert few["balancers"]["b"]["rate"] == 1e-2
  assert few["exchange"] == "all_to_all"
  assert few["tokens_per_group"] == 4 and found["1, 4"]["capacity_factor"] == 2


@pytest.mark.parametrize(
  "own,words",
  [
    (
      {"moe": FEW | {"num_expert": 2}},
      ['few.moe has no "num_expert"; did you'],
    ),
    ({"moe": FEW | {"top_k": 3}}, ["few.moe.top_k = 3", "num_experts = 2"]),
    ({"moe": FEW | {"d_expert": 0}}, ["model.variants.few.moe.d_expert = 0"]),
    ({"moe": {"num_experts": 1}}, ["top_k = 2", "num_experts = 1"]),
    ({"windw": 3}, ["windw", "window"]),
  ],
)
def test_an_impossible_variant_is_named(own, words):
  c = section()
  c.variants["few"] = own
  with pytest.raises(ConfigError) as e:
    options.section(models.OPTIONS).check(c, "model")
    models.build(c, vocab_size=9)
  assert all(word in str(e.value) for word in words), str(e.value)


@pytest.mark.parametrize("key", ["data.batch_size over x", "eval.batch_size"])
def test_the_batch_of_every_kind_is_checked(key):
  """A group of two sequences in one kind alone; the message has the key."""
  c = section()
  c.variants["few"]["moe"]["tokens_per_group"] = 32
  model = models.build(c, vocab_size=9)
  batches = {"other": 4, key: 3}
  with pytest.raises(ConfigError, match=f"batch of 3 .* make {key} a multiple"):
    models.check(model, lengths={"inputs": 16}, batches=batches, mesh=None)
  models.check(
    model, lengths={"inputs": 16}, batches={"other": 4, key: 2}, mesh=None
  )
  with pytest.raises(ConfigError, match="neither a multiple nor a divisor"):
    models.check(model, lengths={"inputs": 20}, batches={key: 8}, mesh=None)


def test_experts_of_every_kind_divide_over_the_mesh():
  mesh = mesh_cases.make_mesh((2, 1, 4, 1))
  model = models.build(section(), vocab_size=9, mesh=mesh)
  with pytest.raises(ConfigError, match="num_experts = 2 .* expert = 4"):
    models.check(model, lengths={"inputs": 16}, batches={"rows": 8}, mesh=mesh)


def test_widths_of_every_kind_divide_over_the_mesh():
  mesh = mesh_cases.make_mesh((1, 1, 2, 4))
  c = section(narrow={"moe": {"d_expert": 6}}, odd={"d_ff": 30})
  c.update(num_heads=4, num_kv_heads=4)
  for kind, key in (
    ("moe@narrow", "narrow.moe.d_expert = 6"),
    ("dense@odd", "odd.d_ff = 30"),
  ):
    c.pattern = ("moe", "dense", kind)
    with pytest.raises(ConfigError, match=f"model.variants.{key} .* tensor"):
      models.build(c, vocab_size=9, mesh=mesh)


def test_balancers_of_a_kind_have_their_state():
  model = models.build(section(), vocab_size=9)
  balance = models.variables(model)["balance"]
  shapes = {
    jax.tree_util.keystr(path, simple=True, separator="/"): x.shape
    for path, x in jax.tree_util.tree_leaves_with_path(balance)
  }
  assert shapes == {
    "prefix/0/moe/b/bias_E": (1, 2),
    "decoder/2/moe/b/bias_E": (2, 2),
  }
