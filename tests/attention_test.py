"""Attention: what a token sees, where it stands, and that a cache, padding and
other documents change nothing."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from moe_jax import models
from moe_jax.core.errors import ConfigError
from moe_jax.models import attention, counts
from moe_jax.models.attention import context, heads, positions
from tests import mesh_cases, tiers

L, V = 14, 23
END = V - 1  # The token that ends a document.
FIRST = 5  # Tokens of the first of two documents, or of padding.
YARN = {"name": "yarn", "factor": 4.0, "original_length": 8}
LATENT = {"name": "latent", "kv_lora_rank": 6, "rope_head_dim": 4}
LATENT |= {"v_head_dim": 3}
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
  "of a plugin": {"name": "fading", "rate": 0.3, "chunk": 4},
}
# One for each place in which a position, or what a token sees, is computed.
DIFFERENT = ["grouped", "yarn", "wavelength", "no positions", "chunk", "sinks"]
DIFFERENT += ["norm of projections", "latent", "latent, plain query"]
DIFFERENT += ["of a plugin"]


def build(options, norm="rms", dtype="float64", **more):
  c = base.get_config().model
  heads = 4 if "kv_lora_rank" in options else 2
  c.update(d_model=12, num_layers=2, num_heads=4, num_kv_heads=heads)
  c.update(head_dim=6, dtype=dtype, norm=norm)
  c.attention = options
  c.update(pattern=("dense",), d_ff=5)
  c.update(more)
  plugins = ("tests/plugins",)
  return models.build(c, vocab_size=V, end_of_document=END, plugins=plugins)


def drawn(model, seed=0):
  """Variables in which nothing is zero or one."""
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros((1, L), jnp.int32))
  )
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: rng.normal(size=x.shape), shapes)


def stepwise(model, variables, tokens_BL, mask_BL, sizes):
  """Logits of calls that take so many tokens each."""

  @jax.jit
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


@pytest.mark.parametrize("name", tiers.only(DIFFERENT, VARIANTS))
def test_a_text_is_the_same_wherever_it_stands(name):
  """Alone; behind another document; behind padding; with a cache also around
  padding, as a batch of several turns has it."""
  with jax.enable_x64(True):
    model = build(VARIANTS[name], norm="layer" if "norm" in name else "rms")
    variables = drawn(model)
    run = jax.jit(model.apply)
    texts_BL = np.random.default_rng(1).integers(0, END, (3, L))
    all_BL = np.ones((3, L), bool)
    alone = run(variables, texts_BL, all_BL)[0][:, : L - FIRST]
    tokens_BL, mask_BL = np.roll(texts_BL, FIRST, axis=1), all_BL.copy()
    # Done before its arguments change: they may be the program's own memory.
    together = np.asarray(run(variables, tokens_BL, all_BL)[0])
    tokens_BL[0, FIRST - 1] = END
    mask_BL[1, :FIRST] = False
    mask_BL[2, [0, 1, 2, 6, 7]] = False
    tokens_BL[2, mask_BL[2]] = texts_BL[2, : L - FIRST]
    at_once = run(variables, tokens_BL, mask_BL)[0]
    sizes = (FIRST + 1, 1, 1, FIRST + 1)
    by_and_by = stepwise(model, variables, tokens_BL, mask_BL, sizes)
    for found in (at_once, by_and_by):
      np.testing.assert_allclose(found[:2, FIRST:], alone[:2], atol=1e-9)
      first = slice(FIRST - 1)
      np.testing.assert_allclose(found[0, first], together[0, first], atol=1e-9)
    np.testing.assert_allclose(by_and_by[2, mask_BL[2]], alone[2], atol=1e-9)
    assert np.abs(together[:, FIRST:] - alone).max(axis=(1, 2)).min() > 1e-3


def test_documents_and_own_positions():
  """Counted among the real tokens of a document; its end may be masked, and
  padding may be made of ends."""
  rows = (
    # mask, ends, positions in the row, documents, positions in the document
    ("00110111", "00001010", "00012234", "00000112", "00012010"),
    ("11011001", "00100000", "01223444", "00011111", "01201222"),
    ("00111101", "11000010", "00012344", "01222223", "00012340"),
  )
  mask, ends, *wanted = (
    np.array([[list(x) for x in row] for row in rows])
    .swapaxes(0, 1)
    .astype(int)
  )
  whole = context.located(mask.astype(bool), np.zeros(ends.shape, bool))
  apart = context.located(mask.astype(bool), ends.astype(bool))
  assert not whole.document_BL.any()
  np.testing.assert_array_equal(whole.position_BL, wanted[0])
  np.testing.assert_array_equal(apart.document_BL, wanted[1])
  np.testing.assert_array_equal(apart.position_BL, wanted[2])


def test_without_a_cache_differences_are_of_places_in_the_row():
  """They are the same for any tokens: a constant, as no batch changes it."""
  tokens_BL = np.array([[3, END, 3, 3]])
  mask_BL = np.array([[True, False, True, True]])
  tokens = context.make(None, tokens_BL, mask_BL, END, None).tokens
  np.testing.assert_array_equal(tokens.relative_BL, [[0, 1, 2, 3]])
  np.testing.assert_array_equal(tokens.position_BL, [[0, 1, 0, 1]])


def test_a_router_sees_positions_in_the_document():
  model = build({}, pattern=("moe",), num_layers=1, dtype="float32")
  recipe = model.sublayers["decoder/0/moe"].recipe
  route = recipe.router.route

  def by_position(params, x_TD, *, side, **more):
    # The first expert is that of the position.
    x_TD = jax.nn.one_hot(side.features["position"], x_TD.shape[-1])
    params = {"kernel": jnp.eye(x_TD.shape[-1], recipe.num_experts)}
    return route(params, x_TD, side=side, **more)

  router = dataclasses.replace(recipe.router, route=by_position)
  model = mesh_cases.with_recipes(
    model, lambda recipe: dataclasses.replace(recipe, router=router)
  )
  tokens_BL = np.array([[3, 1, 2, END, 5, 6], [0, 1, END, 0, 4, 0]])
  mask_BL = np.array([[0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1]], bool)
  variables = jax.tree.map(lambda x: x.astype(np.float32), drawn(model))
  run = jax.jit(lambda *a: model.apply(*a, collect="routing"))
  _, aux = run(variables, tokens_BL, mask_BL)
  expert_BL = aux["decoder"]["0"]["moe"]["choice"].expert_TK[0, ..., 0]
  wanted_BL = np.array([[0, 0, 1, 2, 0, 1], [0, 1, 2, 0, 1, 2]])
  np.testing.assert_array_equal(expert_BL[mask_BL], wanted_BL[mask_BL])


@pytest.mark.parametrize("name", ["sinks", "norm of projections", "latent"])
def test_a_padded_vector_that_is_not_finite_stays_where_it_is(name):
  """It reaches no other token, and no parameter's gradient."""
  options = build(VARIANTS[name]).arch.layer("dense").attention
  module = options.module(options)
  mask_BL = np.array([[False, True, True, False, True]])
  tokens_BL = np.zeros(mask_BL.shape, int)
  about = context.make(None, tokens_BL, mask_BL, None, None)
  x_BLD = np.random.default_rng(0).normal(size=(1, 5, 12)).astype(np.float32)

  def loss(variables, x_BLD):
    y_BLD = module.apply(variables, x_BLD, about)
    return jnp.where(mask_BL[..., None], y_BLD, 0).sum()

  @jax.jit
  def both(x_BLD, other_BLD):
    variables = module.init(jax.random.key(0), x_BLD, about)
    return tuple(
      jax.value_and_grad(loss)(variables, x) for x in (x_BLD, other_BLD)
    )

  other_BLD = x_BLD.copy()
  other_BLD[0, 0], other_BLD[0, 3] = np.nan, np.inf
  clean, found = both(x_BLD, other_BLD)
  jax.tree.map(np.testing.assert_array_equal, clean, found)
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(clean[1]))


def test_a_padded_token_without_an_embedding_changes_no_gradient():
  model = build({}, dtype="float32", tie_embeddings=False)
  tokens_BL = np.random.default_rng(0).integers(1, END, (2, L))
  mask_BL = np.arange(L) >= np.array([[0], [3]])
  tokens_BL[~mask_BL] = 0
  variables = jax.tree.map(lambda x: x.astype(np.float32), drawn(model))

  @jax.jit
  @jax.grad
  def gradient(variables):
    logits_BLV, _ = model.apply(variables, tokens_BL, mask_BL)
    return jnp.where(mask_BL, logits_BLV[..., 1], 0).sum()

  clean = gradient(variables)
  variables["params"]["embedding"].value[0] = np.nan
  found = gradient(variables)
  jax.tree.map(np.testing.assert_array_equal, clean, found)


def test_what_a_token_sees():
  """Window, chunk, documents and padding, place by place."""
  position_1L = jnp.arange(L)[None]
  mask_BL, document_BL = position_1L != 4, (position_1L > 8).astype(jnp.int32)
  own_BL = jnp.where(position_1L > 8, position_1L - 9, position_1L)
  tokens = context.Tokens(mask_BL, document_BL, own_BL, position_1L)
  for window, chunk in ((None, None), (3, None), (None, 5), (4, 5)):
    options = attention.Options(1, 1, 2, 1e4, 1e-6, window=window, chunk=chunk)
    found = context.visible(options, context.Context(tokens))
    found = np.asarray(found)[0]
    for i in range(L):
      for j in range(L):
        sees = j <= i and j != 4 and (i > 8) == (j > 8)
        sees &= window is None or i - j < window
        first = 9 * (i > 8)
        sees &= chunk is None or (i - first) // chunk == (j - first) // chunk
        assert found[i, j] == (sees or i == j), (i, j, window, chunk)


def test_sinks_take_part_in_the_softmax():
  class Given(heads.Heads):
    """Attention of queries, keys and values that are given."""

    @nn.compact
    def __call__(self, *args):
      return self.attend(*args)

  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(1, 3, 2, 4)).astype(np.float32) for _ in range(3))
  mask_BL = np.ones((1, 3), bool)
  about = context.make(None, np.zeros((1, 3), int), mask_BL, None, None)
  options = attention.Options(2, 2, 4, 1e4, 1e-6, sinks=True)
  sinks = np.array([0.5, 30.0], np.float32)
  found = Given(options).apply(
    {"params": {"sinks": sinks}}, q, k, v, about, 2.0
  )
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
  for rope in ("half", "interleaved"):
    options = attention.Options(1, 1, 8, 100.0, 1e-6, rope=rope)

    def product(i, j, options=options):
      a, b = (
        positions.rotate(x, np.array([[p]]), options).ravel()
        for x, p in ((q, i), (k, j))
      )
      np.testing.assert_allclose((a**2).sum(), (q**2).sum(), rtol=1e-5)
      return a @ b

    np.testing.assert_allclose(product(7, 3), product(104, 100), rtol=1e-4)
    assert abs(product(7, 3) - product(7, 4)) > 1e-2


def test_stretched_frequencies():
  """Fast pairs as before, slow ones `factor` times slower, a ramp between."""
  plain = np.asarray(positions.Plain().frequencies(1e4, 64, jnp.float32))
  turns = 4096 * plain / (2 * np.pi)
  for scaling, fast, slow in (
    (positions.Yarn(8.0, 4096), 32.0, 1.0),
    (positions.Wavelength(8.0, 4096), 4.0, 1.0),
  ):
    found = np.asarray(scaling.frequencies(1e4, 64, jnp.float32)) / plain
    np.testing.assert_allclose(found[turns > 2 * fast], 1, rtol=1e-6)
    np.testing.assert_allclose(found[turns < slow / 2], 1 / 8, rtol=1e-6)
    assert (np.diff(found) <= 1e-6).all() and len(set(found.tolist())) > 3


@pytest.mark.parametrize(
  "options,words",
  [
    ({"ropes": "half"}, ['no "ropes"', 'did you mean "rope"']),
    ({"rope": "halves"}, ["model.attention.rope = 'halves'", '"half"']),
    ({"qk_norm": "heads"}, ["'heads'", 'did you mean "head"']),
    ({"bias": True}, ["bias = True", '"qkv"']),
    ({"window": 0}, ["model.attention.window = 0", "from 1"]),
    ({"clip": -1.0}, ["clip = -1.0", "above 0"]),
    ({"rope_scaling": {"name": "yarm"}}, ["'yarm'", '"yarn"']),
    ({"rope_scaling": {"name": "yarn"}}, ['needs "factor"', "above 0"]),
    ({"rope_scaling": YARN | {"factor": None}}, ["factor = None", "above 0"]),
    ({"rope_scaling": YARN | {"beta": 1}}, ['no "beta"']),
    ({"temperature": (0.1, 0, 1)}, ["temperature[1] = 0", "from 1"]),
    ({"q_lora_rank": 4}, ['model.attention has no "q_lora_rank"']),
    ({"name": "laten"}, ['"laten" in attention', 'did you mean "latent"']),
    ({"name": ["latent"]}, ["model.attention.name = ['latent'] is not a text"]),
    ({"name": "latent"}, ['model.attention needs "kv_lora_rank"']),
    (LATENT | {"bias": "qkv"}, ['model.attention has no "bias"']),
    (LATENT | {"rope": "none"}, ["a rope", "grouped"]),
    (LATENT | {"rope_head_dim": 3}, ["rope_head_dim = 3 is odd"]),
    (LATENT | {"v_head_dim": None}, ["v_head_dim = None", "from 1"]),
  ],
)
def test_impossible_options(options, words):
  with pytest.raises(ConfigError) as caught:
    build(options)
  for word in words:
    assert word in str(caught.value)


def test_layers_may_have_several_kinds_of_attention():
  """Another kind in a variant takes none of the model's own options."""
  variants = {
    "wide": {"kv_lora_rank": 9},
    "fade": {"name": "fading", "rate": 0.2},
    "usual": {"name": "grouped", "num_kv_heads": 2},
  }
  pattern = ("dense", *(f"dense@{name}" for name in variants))
  more = {"variants": variants, "pattern": pattern, "num_layers": 4}
  more["dtype"] = "float32"
  model = build(LATENT | {"window": 3}, **more)
  kinds = [model.arch.layer(kind).attention for kind in pattern]
  assert [kind.name for kind in kinds] == [
    *("latent", "latent", "fading", "grouped")
  ]
  assert [kind.window for kind in kinds] == [3, 3, None, None]
  assert kinds[1].kv_lora_rank == 9 and kinds[2].rate == 0.2
  assert counts.kv_cache_per_token(model) == (6 + 4) + (9 + 4) + 24 + 24
  layers = drawn(model)["params"]["decoder"]
  assert layers["2"]["attention"].keys() == {"value", "out"}
  variants["fade"]["window"] = 0
  with pytest.raises(ConfigError, match="model.variants.fade.window = 0"):
    build(LATENT, **more)


def test_a_kind_of_attention_that_is_none_is_named(tmp_path):
  (tmp_path / "attention").mkdir()
  (tmp_path / "attention" / "mine.py").write_text("build = len\n")
  c = base.get_config().model
  c.attention = {"name": "mine"}
  words = "attention/mine: build is .*, not a subclass of Options; see"
  with pytest.raises(ConfigError, match=words):
    models.build(c, vocab_size=V, plugins=(str(tmp_path),))


def test_variants_of_layers_are_checked():
  c = base.get_config().model
  c.variants = {"local": {"window": 4}}
  c.pattern = ("moe", "moe@locl")
  with pytest.raises(ConfigError, match='did you mean "moe@local"'):
    models.build(c, vocab_size=V)
  c.pattern = ("moe", "moe@local")
  model = models.build(c, vocab_size=V)
  assert model.arch.layers == ("moe", "moe@local") * 2
  assert model.arch.layer("moe@local").attention.window == 4
  assert model.arch.layer("moe").attention.window is None
  with pytest.raises(ConfigError, match="vocab_size = 22 is less than the 23"):
    c.vocab_size = 22
    models.build(c, vocab_size=V)
