"""The check before the first step: quiet on a right mesh, loud on a wrong one."""

import jax
import numpy as np
import pytest

from configs import tiny
from moe_jax import models
from moe_jax.core.errors import RunError
from moe_jax.moe import exchange
from moe_jax.training import mesh_check
from tests import mesh_cases, tiers

MESH = (1, 2, 2, 2)
ENTER = exchange.enter_tensor
SEND = exchange.ragged_all_to_all


LENGTH = 32


def config(dispatcher="gather", capacity=1.0, **moe):
  c = tiny.get_config().model
  c.num_kv_heads = 2
  c.moe.update(num_experts=8, capacity_factor=capacity, **moe)
  c.moe.dispatcher = {"name": dispatcher}
  return c


def check(c, sizes=MESH):
  mesh = mesh_cases.make_mesh(sizes)
  model = models.build(c, vocab_size=9, mesh=mesh)
  return mesh_check.check(model, {"inputs": LENGTH}, c.dtype, mesh)


RUNS = {
  "slots": config(num_shared_experts=1, use_bias=True),
  "einsum": config("einsum", tokens_per_group=16),
  "gathered": config("sorted", exchange="all_gather"),
  "dropless": config("sorted", None, router={"name": "top_k", "noise": 0.3}),
  "buckets": config(
    "sorted",
    0.75,
    expert_buckets=2,
    balancers={
      "b": {"name": "bias", "rate": 1e-2},
      "s": {"name": "switch", "coefficient": 1.0, "scope": "global_batch"},
    },
  ),
}


RIGHT = [("slots", MESH), ("dropless", (2, 1, 4, 1))]
RIGHT += [(name, MESH) for name in RUNS if name != "slots"]


@pytest.mark.parametrize(
  "name,sizes", tiers.only(RIGHT[:1], RIGHT, several=True)
)
def test_a_right_mesh_differs_by_rounding(name, sizes):
  found = check(RUNS[name], sizes)
  assert 0 < found.distance < 1e-5


def test_bfloat16_and_runs_without_experts():
  half = config("sorted", None)
  half.dtype = "bfloat16"
  assert check(half).distance < 3e-2
  dense = config()
  dense.pattern = ("dense",)
  assert check(dense) is None


def by_every_shard(bias):
  """Added by each shard of F, and not once."""
  return bias


def scaled(x, mesh):
  """The input of the shards of F is a little off."""
  return x if mesh is None else 1.001 * ENTER(x, mesh)


def as_sent(count_ie, num_rows):
  """Rows stay in the order in which they were sent."""
  del count_ie
  return np.arange(num_rows)


def too_few(x_ND, out_ND, *sizes):
  """The buffer has room for the rows of one group instead of all."""
  return SEND(x_ND, out_ND, *sizes).at[16:].set(0)


@pytest.mark.parametrize(
  "name,function,faulty",
  [
    ("slots", "enter_tensor", scaled),
    ("slots", "once", by_every_shard),
    ("dropless", "_transposed", as_sent),
    ("buckets", "ragged_all_to_all", too_few),
  ],
)
def test_a_wrong_exchange_stops_the_run(monkeypatch, name, function, faulty):
  monkeypatch.setattr(exchange, function, faulty)
  with pytest.raises(RunError, match="'fsdp': 2.* differs by .* do not trust"):
    check(RUNS[name])


@pytest.mark.parametrize("factor", [0.5, np.nan])
def test_a_wrong_gradient_alone_stops_the_run(monkeypatch, factor):
  """The forward pass is right: gradients are half of what they are, or none."""
  read = exchange.read

  def wrong(params, specs, *args):
    whole = read(params, specs, *args)
    if specs is None:
      return whole
    return {
      k: jax.lax.stop_gradient(w) + factor * (w - jax.lax.stop_gradient(w))
      for k, w in whole.items()
    }

  monkeypatch.setattr(exchange, "read", wrong)
  with pytest.raises(RunError, match=": gradients/0/"):
    check(RUNS["slots"])


def test_every_kind_of_layer_is_checked(monkeypatch):
  """The wrong exchange is that of one kind alone."""
  c = config()
  c.pattern = ("moe", "moe@rows")
  rows = {"dispatcher": {"name": "sorted"}, "capacity_factor": None}
  c.variants = {"rows": {"moe": rows | {"num_experts": 4, "top_k": 1}}}
  c.variants["rows"]["moe"]["router"] = {"name": "top_k"}
  monkeypatch.setattr(exchange, "_transposed", as_sent)
  with pytest.raises(RunError, match="do not trust"):
    check(c)
