"""A decoder's logits do not depend on later tokens, at tight capacity."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from configs import base
from moe_jax import models
from moe_jax.core.errors import ConfigError
from tests import tiers

V, L, B, CUT = 16, 12, 4, 5
# Router, dispatcher, order of slots, capacity factor, buckets of experts.
CAUSAL = {
  "einsum": ("top_k", "einsum", "token", 0.5, None),
  "gather": ("top_k", "gather", "token", 0.5, None),
  "sorted": ("top_k", "sorted", "token", 0.5, None),
  "buckets": ("top_k", "sorted", "token", 0.5, 2),
  "dropless": ("top_k", "sorted", "token", None, None),
  "dropless-choice": ("top_k", "sorted", "choice", None, None),
  "random-einsum": ("random", "einsum", "token", 0.5, None),
  "random-gather": ("random", "gather", "token", 0.5, None),
  "random-buckets": ("random", "sorted", "token", 0.5, 2),
  "random-dropless": ("random", "sorted", "token", None, None),
}
QUICK = ("einsum", "gather", "sorted", "buckets", "dropless", "random-gather")
LEAKING = {
  "choice-einsum": ({}, "einsum", "choice", 0.5, None),
  "choice-gather": ({}, "gather", "choice", 0.5, None),
  "choice-sorted": ({}, "sorted", "choice", 0.5, None),
  "choice-buckets": ({}, "sorted", "choice", 0.5, 2),
  "score-einsum": ({"priority": "score"}, "einsum", "token", 0.5, None),
  "score-gather": ({"priority": "score"}, "gather", "token", 0.5, None),
  "score-sorted": ({"priority": "score"}, "sorted", "token", 0.5, None),
  "score-buckets": ({"priority": "score"}, "sorted", "token", 0.5, 2),
}
QUICK_LEAKING = ("choice-gather", "choice-sorted", "score-einsum")
QUICK_LEAKING += ("score-buckets",)


def config(router, dispatcher, order, factor, buckets):
  c = base.get_config()
  c.model.update(
    d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4
  )
  c.model.moe.update(
    num_experts=4,
    d_expert=8,
    capacity_factor=factor,
    expert_buckets=buckets,
  )
  c.model.moe.router = router
  c.model.moe.dispatcher = {"name": dispatcher, "order": order}
  return c.model


def build(section):
  model = models.build(section, vocab_size=V)
  models.check(model, lengths={"inputs": L}, batches={"rows": B}, mesh=None)
  return model


def changes(model, seeds):
  """Change of the logits [B, L] by tokens from CUT on, and drops, by seed."""
  shapes = nn.unbox(
    jax.eval_shape(model.init, jax.random.key(0), np.zeros((B, L), int))
  )

  def run(variables, tokens_BL, rng):
    logits, aux = model.apply(variables, tokens_BL, None, rng, train=True)
    return logits, aux["decoder"]["0"]["moe"]["stats"].dropped

  tokens_BL = np.zeros((B, L), np.int32)
  program = jax.jit(run).lower(shapes, tokens_BL, jax.random.key(0))
  program = program.compile()
  for seed in range(seeds):
    rng = np.random.default_rng(seed)
    variables = jax.tree.map(
      lambda s, rng=rng: rng.normal(size=s.shape).astype(s.dtype) / 2, shapes
    )
    tokens_BL = rng.integers(0, V, (B, L)).astype(np.int32)
    other_BL = tokens_BL.copy()
    other_BL[:, CUT:] = rng.integers(0, V, (B, L - CUT))
    logits, dropped = program(variables, tokens_BL, jax.random.key(seed))
    changed, _ = program(variables, other_BL, jax.random.key(seed))
    drops = sum(int(n.sum()) for n in dropped.values())
    yield np.asarray(abs(logits - changed).max(-1)), drops


@pytest.mark.parametrize("name", tiers.only(QUICK, CAUSAL))
def test_the_past_does_not_see_the_future(name):
  router, *rest = CAUSAL[name]
  model = build(config({"name": router}, *rest))
  for change_BL, dropped in changes(model, 3):
    assert (dropped > 0) == ("dropless" not in name)
    assert (change_BL[:, :CUT] == 0).all()
    assert (change_BL[:, CUT:] > 0).any()


@pytest.mark.parametrize("name", tiers.only(QUICK_LEAKING, LEAKING))
def test_what_leaks_is_refused(name):
  options, *rest = LEAKING[name]
  model = config({"name": "top_k", **options}, *rest)
  remedy = 'order = "token"' if "choice" in name else 'priority = "none"'
  with pytest.raises(ConfigError, match=f"{remedy}, or set .*allow_noncausal"):
    build(model)
  model.allow_noncausal = True
  past = [change_BL[:, :CUT].max() for change_BL, _ in changes(build(model), 6)]
  assert max(past) > 1e-3, "the leak is real"


def test_one_choice_has_no_second_round():
  model = config({"name": "top_k"}, "gather", "choice", 0.5, None)
  model.moe.top_k = 1
  for change_BL, dropped in changes(build(model), 3):
    assert dropped > 0 and (change_BL[:, :CUT] == 0).all()


def test_capacity_of_evaluation_is_checked_too():
  model = config({"name": "top_k"}, "sorted", "choice", None, None)
  build(model)
  model.moe.eval_capacity_factor = 1.0
  with pytest.raises(ConfigError, match="later tokens"):
    build(model)


def test_a_model_that_nobody_checked_refuses_when_it_is_called():
  """Capacity of a group of whole sequences depends on their length."""
  section = config({"name": "top_k"}, "gather", "choice", 0.5, None)
  model = models.build(section, vocab_size=V)
  tokens_BL = np.zeros((1, 7), int)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens_BL)
  with pytest.raises(ConfigError, match="later tokens"):
    jax.eval_shape(model.apply, shapes, tokens_BL)


def test_the_kind_that_leaks_is_named():
  model = config({"name": "top_k"}, "gather", "token", 0.5, None)
  model.pattern = ("moe", "moe@early")
  model.num_layers = 2
  dispatcher = {"name": "gather", "order": "choice"}
  model.variants = {"early": {"moe": {"dispatcher": dispatcher}}}
  with pytest.raises(
    ConfigError, match='dispatcher of the MoE layers "moe@early".*later tokens'
  ):
    build(model)
  model.variants = {"early": {"moe": {"capacity_factor": 1.0}}}
  build(model)
