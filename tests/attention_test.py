"""Attention: what a token sees, and that a cache changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from moe_jax import models
from moe_jax.core.errors import ConfigError
from moe_jax.models import attention, rotary
from tests import mesh_cases

L, V = 14, 23
YARN = {"name": "yarn", "factor": 4.0, "original_length": 8}
LATENT = {"kv_lora_rank": 6, "rope_head_dim": 4, "v_head_dim": 3}
VARIANTS = {
  "grouped": {},
  "interleaved": {"rope": "interleaved"},
  "yarn": {"rope_scaling": YARN},
  "yarn, not truncated": {"rope_scaling": YARN | {"truncate": False}},
  "wavelength": {
    "rope_scaling": {"name": "wavelength", "factor": 4.0, "original_length": 8}
  },
  "no positions": {"rope": "none", "temperature": (0.4, 3, 1)},
  "norm of heads": {"qk_norm": "head"},
  "norm of projections": {"qk_norm": "projection", "clip": 0.7},
  "norm without scale": {"qk_norm": "l2"},
  "window": {"window": 3},
  "chunk": {"chunk": 4},
  "sinks": {"sinks": True, "bias": "all"},
  "biases": {"bias": "qkv"},
  "latent": LATENT | {"q_lora_rank": 5, "temperature": (0.4, 3, 0)},
  "latent, plain query": LATENT | {"rope": "interleaved", "window": 5},
  "latent, yarn": LATENT
  | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}},
}


def build(options, norm="rms", dtype="float64"):
  c = base.get_config().model
  heads = 4 if "kv_lora_rank" in options else 2
  c.update(d_model=12, num_layers=2, num_heads=4, num_kv_heads=heads)
  c.update(head_dim=6, dtype=dtype, norm=norm)
  c.attention = options
  c.update(pattern=("dense",), d_ff=5)
  return models.build(c, vocab_size=V, seq_len=L, batch_sizes=(2,))


def drawn(model, seed=0):
  """Variables in which nothing is zero or one."""
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros((1, L), jnp.int32))
  )
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: rng.normal(size=x.shape), shapes)


def stepwise(model, variables, tokens_BL, mask_BL, sizes):
  """Logits of calls that take so many tokens each."""

  @functools.partial(jax.jit, compiler_options=mesh_cases.QUICK)
  def step(variables, tokens_BL, mask_BL):
    return model.apply(
      variables,
      tokens_BL,
      mask_BL,
      cache_length=sum(sizes) + 2,
      mutable=["cache"],
    )

  cache, found, first = {}, [], 0
  for size in sizes:
    part = slice(first, first + size)
    (logits, _), cache = step(
      {**variables, **cache}, tokens_BL[:, part], mask_BL[:, part]
    )
    found.append(logits)
    first += size
  return np.concatenate(found, axis=1)


@pytest.mark.parametrize("name", VARIANTS)
def test_incremental_decoding_is_the_whole_forward_pass(name):
  """At every position; prompts of two lengths, padded before, as each alone."""
  with jax.enable_x64(True):
    model = build(VARIANTS[name], norm="layer" if "norm" in name else "rms")
    variables = drawn(model)
    tokens_BL = np.random.default_rng(1).integers(0, V, (2, L))
    mask_BL = np.arange(L) >= np.array([[0], [3]])
    run = jax.jit(model.apply, compiler_options=mesh_cases.QUICK)
    whole = run(variables, tokens_BL)[0]
    alone = run(variables, tokens_BL[1:, 3:])[0]
    sizes = (5, 1, 1, 5, 1, 1)
    found = stepwise(model, variables, tokens_BL, mask_BL, sizes)
    np.testing.assert_allclose(found[0], whole[0], atol=1e-9)
    np.testing.assert_allclose(found[1, 3:], alone[0], atol=1e-9)
    assert np.abs(whole[1, 3:] - alone[0]).max() > 1e-3  # It saw the padding.


def test_what_a_token_sees():
  """Window, chunk, documents and padding, place by place."""
  position_1L = jnp.arange(L)[None]
  mask_BL, document_BL = position_1L != 4, (position_1L > 8).astype(jnp.int32)
  for window, chunk in ((None, None), (3, None), (None, 5), (4, 5)):
    options = attention.Options(1, 1, 2, window=window, chunk=chunk)
    context = attention.Context(mask_BL, document_BL, position_1L)
    found = np.asarray(attention.visible(options, context))[0]
    for i in range(L):
      for j in range(L):
        sees = j <= i and j != 4 and (i > 8) == (j > 8)
        sees &= window is None or i - j < window
        sees &= chunk is None or i // chunk == j // chunk
        assert found[i, j] == (sees or i == j), (i, j, window, chunk)


def test_sinks_take_part_in_the_softmax():
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(1, 3, 2, 4)).astype(np.float32) for _ in range(3))
  sees = np.tril(np.ones((1, 3, 3), bool))
  sinks = np.array([0.5, 30.0], np.float32)
  found = attention.attend(q, k, v, sees, 2.0, sinks)
  for h in range(2):
    for i in range(3):
      scores = np.exp([*(q[0, i, h] @ k[0, : i + 1, h].T / 2), sinks[h]])
      weights = (scores / scores.sum())[:-1]
      np.testing.assert_allclose(
        found[0, i, h], weights @ v[0, : i + 1, h], atol=1e-6
      )


def test_rotation_keeps_lengths_and_depends_on_distances():
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(2, 1, 1, 1, 8)).astype(np.float32)
  for interleaved in (False, True):

    def product(i, j, interleaved=interleaved):
      a, b = (
        rotary.rotate(
          x, np.array([[p]]), 100.0, interleaved=interleaved
        ).ravel()
        for x, p in ((q, i), (k, j))
      )
      np.testing.assert_allclose((a**2).sum(), (q**2).sum(), rtol=1e-5)
      return a @ b

    np.testing.assert_allclose(product(7, 3), product(104, 100), rtol=1e-4)
    assert abs(product(7, 3) - product(7, 4)) > 1e-2


def test_stretched_frequencies():
  """Fast pairs as before, slow ones `factor` times slower, a ramp between."""
  plain = np.asarray(rotary.Plain().frequencies(1e4, 64, jnp.float32))
  turns = 4096 * plain / (2 * np.pi)
  for scaling, fast, slow in (
    (rotary.Yarn(8.0, 4096), 32.0, 1.0),
    (rotary.Wavelength(8.0, 4096), 4.0, 1.0),
  ):
    found = np.asarray(scaling.frequencies(1e4, 64, jnp.float32)) / plain
    np.testing.assert_allclose(found[turns > 2 * fast], 1, rtol=1e-6)
    np.testing.assert_allclose(found[turns < slow / 2], 1 / 8, rtol=1e-6)
    assert (np.diff(found) <= 1e-6).all() and len(set(found.tolist())) > 3


@pytest.mark.parametrize(
  "options,words",
  [
    ({"ropes": "half"}, ['no "ropes"', 'did you mean "rope"']),
    ({"rope": "halves"}, ['no rope "halves"', 'did you mean "half"']),
    ({"qk_norm": "heads"}, ['"heads"', '"head"']),
    ({"bias": True}, ['no bias "True"']),
    ({"window": 0}, ["window = 0", "1 or more"]),
    ({"rope_scaling": {"name": "yarm"}}, ['"yarm"', '"yarn"']),
    ({"rope_scaling": {"name": "yarn"}}, ["factor > 0"]),
    ({"rope_scaling": YARN | {"beta": 1}}, ['no "beta"']),
    ({"q_lora_rank": 4}, ["set kv_lora_rank too"]),
    (LATENT | {"bias": "qkv"}, ['bias = "none" only']),
    (LATENT | {"rope_head_dim": 3}, ["rope_head_dim = 3 is odd"]),
    (LATENT | {"v_head_dim": None}, ["v_head_dim = None"]),
  ],
)
def test_impossible_options(options, words):
  with pytest.raises(ConfigError) as caught:
    build(options)
  for word in words:
    assert word in str(caught.value)


def test_variants_of_layers_are_checked():
  c = base.get_config().model
  c.variants = {"local": {"window": 4}}
  c.pattern = ("moe", "moe@locl")
  with pytest.raises(ConfigError, match='did you mean "local"'):
    models.build(c, vocab_size=V, seq_len=8, batch_sizes=(1,))
  c.pattern = ("moe", "moe@local")
  model = models.build(c, vocab_size=V, seq_len=8, batch_sizes=(1,))
  assert model.arch.layers == ("moe", "moe@local") * 2
  assert model.arch.attention_of("moe@local").window == 4
  assert model.arch.attention_of("moe").window is None
  with pytest.raises(ConfigError, match="vocab_size = 22 is less than the 23"):
    c.vocab_size = 22
    models.build(c, vocab_size=V, seq_len=8, batch_sizes=(1,))
