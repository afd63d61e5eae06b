"""Latent experts: projections around experts that work in a narrower width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from moe_jax.core import registry
from moe_jax.models import counts
from moe_jax.moe import experts, layer
from moe_jax.moe.types import Bound, Side
from moe_jax.training import program
from tests import mesh_cases, oracle, small, tiers

G, T, D, E, K, F, LATENT = 8, 8, 12, 8, 2, 4, 6


def case(seed=0, dispatcher="gather", shared=True):
  """(a recipe, its parameters and tokens in float64)."""
  recipe = layer.Recipe(
    num_experts=E,
    router=registry.load("routers", "top_k", top_k=K),
    dispatcher=registry.load("dispatchers", dispatcher),
    experts=experts.build(F, "swiglu", use_bias=True),
    bound=None if dispatcher == "sorted" else Bound(T, E),
    shared=experts.dense(4, "swiglu", use_bias=True) if shared else None,
    latent=experts.latent(LATENT),
  )
  rngs = iter(jax.random.split(jax.random.key(seed), 8))
  params = {
    "router": recipe.router.init(next(rngs), D, E),
    "experts": recipe.experts.init(next(rngs), E, LATENT),
    "latent": recipe.latent.init(next(rngs), D),
  }
  if shared:
    params["shared"] = recipe.shared.init(next(rngs), D)
  rng = np.random.default_rng(seed)
  params = jax.tree.map(lambda w: rng.normal(size=w.shape) / 2, params)
  mask_GT = np.arange(T) < T - np.arange(G)[:, None] // 4
  return recipe, params, rng.normal(size=(G, T, D)), mask_GT


def by_hand(params, x_GTD, mask_GT):
  """y = (sum of w expert(x into)) out_of + shared(x), token by token."""
  y_GTD = np.zeros_like(x_GTD)
  for g, t in np.ndindex(*mask_GT.shape):
    x_D = x_GTD[g, t] * mask_GT[g, t]
    if mask_GT[g, t]:
      logits = x_D @ params["router"]["kernel"]
      prob = np.exp(logits) / np.exp(logits).sum()
      inside = x_D @ params["latent"]["into"]
      total = sum(
        prob[e] * oracle.experts(params["experts"], e, inside, "swiglu")
        for e in np.argsort(-prob)[:K]
      )
      y_GTD[g, t] = total @ params["latent"]["out_of"]
    if "shared" in params:
      y_GTD[g, t] += oracle.mlp(params["shared"], x_D, "swiglu")
  return y_GTD


@pytest.mark.parametrize("dispatcher", ["gather", "sorted"])
def test_a_layer_is_what_the_paper_writes(dispatcher):
  for shared in (True, False):
    recipe, params, x_GTD, mask_GT = case(0, dispatcher, shared)
    with jax.enable_x64(True):
      y_GTD = mesh_cases.moe_ffn(
        *(recipe, jax.tree.map(jnp.asarray, params), {}, jnp.asarray(x_GTD)),
        Side(jnp.asarray(mask_GT)),
      )[0]
    expected = by_hand(params, x_GTD, mask_GT)
    np.testing.assert_allclose(y_GTD, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
  "sizes",
  tiers.only([(1, 2, 2, 2)], [(1, 2, 2, 2), (2, 1, 4, 1), (1, 1, 2, 4)]),
)
def test_it_is_the_same_on_a_mesh(sizes):
  """Values and gradients; with tensor shards of experts and shared experts."""
  mesh_cases.assert_same_on_a_mesh(*case(1, "sorted"), sizes)


def test_its_gradient():
  recipe, params, x_GTD, mask_GT = case(3)
  mesh_cases.assert_gradient(
    *(recipe, params, x_GTD, mask_GT),
    by_hand=lambda params: by_hand(params, x_GTD, mask_GT),
    eps=1e-4,
  )


def test_a_decoder_trains_and_counts_it():
  """Experts of half the width with twice as many of them: equal parameters."""
  c = tiny.get_config()
  plain = c.model.moe
  width, num_experts = c.model.d_model, plain.num_experts
  sizes = {}
  for d_latent, more in ((None, 1), (width // 2, 2)):
    c = tiny.get_config()
    c.model.moe.update(d_latent=d_latent, num_experts=more * num_experts)
    c.model.moe.top_k = more * plain.top_k
    model = program.build_model(c, small.task())
    shapes = jax.eval_shape(
      lambda model=model: model.init(
        jax.random.key(0), jnp.zeros((1, 4), jnp.int32)
      )
    )
    sizes[d_latent] = counts.count(model, shapes)
  before, after = sizes[None], sizes[width // 2]
  assert before["experts"] == after["experts"]
  layers = sum(len(x.numbers) for x in model.sublayers.values())
  assert after["latent"] == layers * width * width
  grown = after["total"] - before["total"]
  assert grown == after["latent"] + after["router"] - before["router"]
  assert after["active"] - before["active"] == grown
