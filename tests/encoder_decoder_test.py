"""The encoder-decoder: attention across, positions, packing, dropout, cache."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from configs import tiny
from moe_jax import models
from moe_jax.core.errors import ConfigError
from moe_jax.models import counts
from moe_jax.models.attention import positions
from moe_jax.models.encoder_decoder import Text
from moe_jax.models.parts import dropout

V, B, LI, LT = 40, 4, 12, 8
RNG = jax.random.key(3)
LATENT = {"name": "latent", "kv_lora_rank": 4, "rope_head_dim": 4}
LATENT |= {"v_head_dim": 4}


def section(**model):
  """A T5 of two stacks with experts in every second layer, dropless."""
  c = tiny.get_config().model
  c.update(name="encoder_decoder", num_layers=2, pattern=("dense", "moe"))
  c.update(d_model=16, num_kv_heads=2, head_dim=6, d_ff=24, activation="relu")
  c.update(scale_embedding=False, scale_output=True)
  c.attention = {
    "rope": "none",
    "position_bias": "shared",
    "bias_buckets": 8,
    "bias_distance": 6,
    "scale_scores": False,
  }
  c.moe.update(d_expert=12, capacity_factor=None, activation="relu")
  c.moe.dispatcher = {"name": "sorted"}
  for key, value in model.items():
    c[key] = value
  return c


def begun(c):
  """(model, its parameters in float64)."""
  model = models.build(c, vocab_size=V)
  init = jax.jit(lambda: nn.unbox(models.init(model, RNG))["params"])
  return model, jax.tree.map(lambda x: x.astype("float64"), init())


@functools.cache
def made():
  return begun(section(dtype="float64"))


@functools.partial(jax.jit, static_argnums=0, static_argnames="train")
def apply(model, params, inputs, targets, rng=None, **options):
  """Logits, from one program for equal shapes."""
  return model.apply({"params": params}, inputs, targets, rng, **options)[0]


def texts(rows=B, seed=0):
  rng = np.random.default_rng(seed)
  inputs = rng.integers(0, V, (rows, LI)).astype(np.int32)
  return inputs, rng.integers(0, V, (rows, LT)).astype(np.int32)


@pytest.fixture(autouse=True)
def double_precision():
  with jax.enable_x64(True):
    yield


def logits(inputs, targets, **options):
  return apply(*made(), inputs, targets, **options)


def t5_bucket(back, causal, buckets, most):
  """The bucket of a distance as 1910.10683 tells it, in plain words of Python."""
  first = 0
  if not causal:
    buckets //= 2
    if back < 0:
      first, back = buckets, -back
  back = max(back, 0)
  exact = buckets // 2
  if back < exact:
    return first + back
  share = math.log(back / exact) / math.log(most / exact)
  return first + min(exact + int(share * (buckets - exact) + 1e-9), buckets - 1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("buckets, most", [(32, 128), (8, 6), (10, 40)])
def test_buckets_of_distances(causal, buckets, most):
  model, _ = made()
  options = dataclasses.replace(
    model.arch.decoder.kinds[0][1].attention,
    causal=causal,
    bias_buckets=buckets,
    bias_distance=most,
  )
  distances = np.arange(-200, 201)
  want = [t5_bucket(int(d), causal, buckets, most) for d in distances]
  found = positions.buckets(jnp.asarray(distances), options)
  np.testing.assert_array_equal(found, want)


def test_positions_decide():
  """Without the tables, the encoder could not tell two orders apart."""
  model, params = made()
  inputs, targets = texts()
  turned = Text(inputs[:, ::-1])
  with_bias = logits(Text(inputs), Text(targets))
  assert np.abs(with_bias - logits(turned, Text(targets))).max() > 1e-3
  none = {k: jnp.zeros_like(x) for k, x in params.items() if "bias" in k}
  bare = model, params | none
  one, two = (apply(*bare, x, Text(targets)) for x in (Text(inputs), turned))
  np.testing.assert_allclose(one, two, atol=1e-12)


def test_the_decoder_is_causal_and_the_encoder_is_not():
  inputs, targets = texts()
  before = logits(Text(inputs), Text(targets))
  targets = targets.copy()  # A program may still read the other one.
  targets[:, 5] = (targets[:, 5] + 1) % V
  after = logits(Text(inputs), Text(targets))
  np.testing.assert_allclose(before[:, :5], after[:, :5], atol=1e-12)
  assert (np.abs(before[:, 5:] - after[:, 5:]).max((0, 2)) > 1e-6).all()
  other = inputs.copy()
  other[:, -1] = (other[:, -1] + 1) % V
  later = logits(Text(other), Text(targets))
  assert (np.abs(later - after).max((0, 2)) > 1e-6).all()
  # The decoder sees the last input itself. What the encoder's first token became:
  model, params = made()

  @jax.jit
  def first(inputs):
    sides = Text(inputs), Text(targets)
    _, aux = model.apply({"params": params}, *sides, collect="routing")
    return aux["encoder"]["1"]["moe"]["choice"].weight_TK[..., 0, :]

  assert (np.abs(first(inputs) - first(other)).max((0, 2)) > 1e-6).all()


def test_padding_changes_nothing():
  inputs, targets = texts()
  want = logits(Text(inputs), Text(targets))
  junk = np.full((B, 3), 7, np.int32)
  real = lambda x: np.arange(x.shape[1] + 3) < x.shape[1]  # noqa: E731
  padded = [
    Text(np.hstack([x, junk]), np.tile(real(x), (B, 1)))
    for x in (inputs, targets)
  ]
  np.testing.assert_allclose(logits(*padded)[:, :LT], want, atol=1e-12)


def test_packed_texts_are_those_alone():
  """Pairs in one row: attention and positions end where a text does."""
  inputs, targets = texts()
  want = logits(Text(inputs), Text(targets))
  rows = []
  for x in (inputs, targets):
    numbers = np.repeat([0, 1], x.shape[1])[None].repeat(B // 2, 0)
    row = x.reshape(B // 2, -1)
    rows.append(Text(row, None, numbers.astype(np.int32)))
  packed = logits(*rows).reshape(B, LT, V)
  np.testing.assert_allclose(packed, want, atol=1e-12)


def test_tokens_one_at_a_time():
  """With a cache, from texts whose lengths differ on both sides."""
  model, params = made()
  inputs, targets = texts()
  mask = np.arange(LI) < np.array([LI, 3, 7, 1])[:, None]
  want = logits(Text(inputs, mask), Text(targets))

  @jax.jit
  def step(cache, side, token):
    return model.apply(
      {"params": params, **cache},
      side,
      Text(token),
      cache_length=LT,
      mutable=["cache", "memory"],
    )

  cache, side, found = {}, Text(inputs, mask), []
  for i in range(LT):
    (one, _), cache = step(cache, side, targets[:, i : i + 1])
    side = None
    found.append(one[:, 0])
  np.testing.assert_allclose(np.stack(found, 1), want, atol=1e-12)


def test_numbers_of_layers_and_their_sequences():
  model, _ = made()
  found = {k: (x.numbers, x.sequence) for k, x in model.sublayers.items()}
  assert found == {
    "encoder/1/moe": ((1,), "inputs"),
    "decoder/1/moe": ((3,), "targets"),
  }


def test_an_encoder_of_its_own():
  own = {"num_layers": 3, "pattern": ("moe@wide",), "d_ff": 8}
  own["variants"] = {"wide": {"moe": {"num_experts": 6}}}
  model = models.build(section(encoder=own), vocab_size=V)
  (path,) = (x for x in model.sublayers if x.startswith("encoder"))
  assert model.sublayers[path].numbers == (0, 1, 2)
  assert model.sublayers[path].recipe.num_experts == 6
  assert model.sublayers["decoder/1/moe"].numbers == (4,)


def test_a_source_vocabulary():
  model = models.build(section(source_vocab_size=2 * V), vocab_size=V)
  shapes = nn.unbox(models.variables(model))["params"]
  assert shapes["source_embedding"].shape == (2 * V, 16)
  _, params = begun(section(source_vocab_size=2 * V))
  inputs, targets = texts()
  one = apply(model, params, Text(inputs + V), Text(targets))
  two = apply(model, params, Text(inputs), Text(targets))
  assert np.abs(one - two).max() > 1e-3


def test_dense_networks_after_experts():
  """ST-MoE: x + moe(norm(x)), then x + mlp(norm(x))."""
  c = section(pattern=("dense", "moe+dense"))
  model = models.build(c, vocab_size=V)
  shapes = nn.unbox(models.variables(model))["params"]
  layer = shapes["encoder"]["1"]
  assert {"moe", "mlp", "ffn_norm", "mlp_norm"} <= layer.keys()
  inputs, targets = texts()
  _, params = begun(c)
  before = apply(model, params, Text(inputs), Text(targets))
  for name in ("mlp", "moe"):
    part = params["decoder"]["1"][name]
    part = part["experts"] if name == "moe" else part
    whole = part["down"]
    part["down"] = jnp.zeros_like(whole)
    after = apply(model, params, Text(inputs), Text(targets))
    part["down"] = whole
    assert np.abs(after - before).max() > 1e-3


def test_layers_without_a_position_bias_get_none():
  """Though others of the stack share a table; they may have other heads."""
  c = section(pattern=("dense@plain", "dense"))
  c.variants = {
    "plain": {"position_bias": "none", "num_heads": 1, "num_kv_heads": 1}
  }
  model, params = begun(c)
  inputs, targets = texts()
  for side in ("encoder", "decoder"):
    for part, name in (("attention", "out"), ("mlp", "down")):
      layer = params[side]["1"][part]
      layer[name] = jnp.zeros_like(layer[name])
  before = apply(model, params, Text(inputs), Text(targets))
  params["decoder_position_bias"] += 3 * jnp.arange(2)[None, :]
  params["decoder_position_bias"] *= jnp.arange(8)[:, None]
  after = apply(model, params, Text(inputs), Text(targets))
  np.testing.assert_array_equal(before, after)


def test_a_table_for_every_layer():
  c = section()
  c.attention.position_bias = "layer"
  model = models.build(c, vocab_size=V)
  shapes = nn.unbox(models.variables(model))["params"]
  assert not any("bias" in name for name in shapes)
  table = shapes["decoder"]["0"]["attention"]["position_bias"]
  assert table.shape == (1, 8, 2)
  c.update(name="decoder")
  decoder, params = begun(c)
  _, targets = texts()
  turned = targets.copy()
  turned[:, :2] = turned[:, 1::-1]
  run = jax.jit(lambda x: decoder.apply({"params": params}, x)[0][:, -1])
  one, two = map(run, (targets, turned))
  assert np.abs(one - two).max() > 1e-4


def test_what_drops_out():
  x = jnp.ones((4, 50, 100))
  rng_B = dropout.of_rows(RNG, 4)
  y = dropout.drop(x, 0.2, rng_B)
  assert abs(float((y == 0).mean()) - 0.2) < 0.02
  np.testing.assert_allclose(y[y != 0], 1.25)
  assert dropout.drop(x, 0.2, None) is x
  later = dropout.drop(x[2:], 0.2, dropout.of_rows(RNG, 2, 2))
  np.testing.assert_array_equal(y[2:], later)
  assert (y[0] != y[1]).any()


def test_dropout_of_a_model():
  """In training only, everywhere, and the same in any micro-batches."""
  model = models.build(section(dropout=0.3, dtype="float64"), vocab_size=V)
  _, params = made()
  inputs, targets = texts()
  sides = model, params, Text(inputs), Text(targets)
  still = apply(*sides, RNG, train=False)
  want = logits(Text(inputs), Text(targets))
  np.testing.assert_allclose(still, want, atol=1e-12)
  whole = apply(*sides, RNG, train=True)
  half = Text(inputs[2:]), Text(targets[2:])
  part = apply(model, params, *half, RNG, first=2, train=True)
  np.testing.assert_allclose(part, whole[2:], atol=1e-12)
  assert np.abs(whole - still).max() > 0.1
  many = [apply(*sides, jax.random.key(i), train=True) for i in range(8)]
  assert len({float(x[0, 0, 0]) for x in many}) == 8


RATES = ("attention_dropout", "hidden_dropout", "moe.expert_dropout")


@pytest.mark.parametrize(
  "rate, last",
  [*zip(RATES, (("out",), ("mlp", "down"), ("experts", "down")))],
)
def test_a_part_has_dropout_of_its_own(rate, last):
  """Nothing drops out where the last matrix of the part gives zeros."""
  c = section(dtype="float64", dropout=0.3)
  c.update(dict.fromkeys(RATES[:2], 0.0) | {"dropout": 0.0})
  c.moe.expert_dropout = 0.0
  c.update_from_flattened_dict({rate: 0.5})
  model, params = begun(c)
  flat = traverse_util.flatten_dict(params)
  closed = {k: x * 0 if k[-len(last) :] == last else x for k, x in flat.items()}
  assert closed.keys() == flat.keys()
  for weights, same in ((flat, False), (closed, True)):
    weights = traverse_util.unflatten_dict(weights)
    sides = model, weights, *map(Text, texts())
    trained, still = (apply(*sides, RNG, train=t) for t in (True, False))
    assert (np.abs(trained - still).max() < 1e-12) == same


@pytest.mark.parametrize("hidden, wanted", [(None, 0.3), (0.2, 0.2)])
def test_parts_take_the_dropout_of_the_model(hidden, wanted):
  c = section(dropout=0.3, hidden_dropout=hidden)
  layer = models.build(c, vocab_size=V).arch.decoder.layer("moe")
  c.moe.expert_dropout = wanted
  assert layer == models.build(c, vocab_size=V).arch.decoder.layer("moe")
  c.moe.expert_dropout = 0.1
  assert layer != models.build(c, vocab_size=V).arch.decoder.layer("moe")


@pytest.mark.parametrize("scaled", [True, False])
def test_first_weights(scaled):
  """Scores begin with equal variances, T5's embeddings with 1; T5X's biases."""
  width, head = 64, 16
  c = section(d_model=width, head_dim=head, init_scale=0.5)
  c.attention.update(scale_scores=scaled, bias_buckets=64, bias_distance=128)
  c.update(embedding_variance=None if scaled else 1.0, tie_embeddings=False)
  _, params = begun(c)
  wanted = 0.5 if scaled else 0.5 / head
  for name in ("attention", "cross"):
    found = params["decoder"]["0"][name]
    assert found["query"].var() * width == pytest.approx(wanted, rel=0.2)
    assert found["key"].var() * width == pytest.approx(0.5, rel=0.2)
  table = params["decoder_position_bias"]
  assert table.var() == pytest.approx(2 / sum(table.shape), rel=0.2)
  wanted = 1 / width if scaled else 1.0
  assert params["embedding"].var() == pytest.approx(wanted, rel=0.2)
  assert params["head"].var() == pytest.approx(1 / width, rel=0.2)


def test_every_place_drops_with_keys_of_its_own():
  rng_B = dropout.of_rows(RNG, 2)
  made = [
    np.asarray(jax.random.key_data(key)).tobytes()
    for layer in range(3)
    for place in dropout.PLACES
    for key in dropout.keys(rng_B, layer, place)
  ]
  assert len({*made}) == len(made) == 3 * 9 * 2


def test_operations_of_a_pair():
  """Counted by hand for one dense layer on both sides."""
  c = section(num_layers=1, pattern=("dense",))
  model = models.build(c, vocab_size=V)
  sizes = counts.count(model, models.variables(model))
  D, H, h, F = 16, 2, 6, 24
  attend, ffn = 4 * D * H * h, 2 * D * F
  assert sizes["active_encoder"] == attend + ffn
  assert sizes["active_decoder"] == 2 * attend + ffn
  encoder = 2 * LI * (attend + ffn) + 4 * H * h * LI**2
  decoder = 2 * LT * (attend + ffn + V * D) + 4 * H * h * LT**2
  cross = 2 * LT * attend // 2 + 2 * LI * attend // 2 + 4 * H * h * LT * LI
  lengths = {"inputs": LI, "targets": LT}
  found = counts.flops_per_token(model, sizes, lengths)
  assert found == round((encoder + decoder + cross) / (LI + LT))


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"encoder": {"layers": 3}}, ["model.encoder", "layers"]),
    ({"encoder": {"num_layers": 3}}, ["num_layers = 3", "pattern"]),
    ({"encoder": {"moe": {"num_expert": 3}}}, ["num_expert"]),
    ({"attention": LATENT}, ["latent", "grouped"]),
    ({"attention": {"position_bias": "rows"}}, ["position_bias", "rows"]),
    (
      {"attention": {"position_bias": "layer", "bias_distance": 3}},
      ["bias_distance = 3", "bias_buckets"],
    ),
    ({"dropout": 1.0}, ["dropout = 1.0"]),
    ({"pattern": ("moe", "dense+moe")}, ["dense+moe"]),
    ({"vocab_size": V - 1}, ["vocab_size", str(V - 1)]),
  ],
)
def test_bad_options(changes, words):
  with pytest.raises(ConfigError) as e:
    models.build(section(**changes), vocab_size=V)
  for word in words:
    assert word in str(e.value), str(e.value)


def test_what_a_decoder_refuses():
  c = section(name="decoder", encoder={"num_layers": 2})
  with pytest.raises(ConfigError, match="encoder_decoder"):
    models.build(c, vocab_size=V)
  c = section(name="decoder")
  c.attention.causal = False
  model = models.build(c, vocab_size=V)
  with pytest.raises(ConfigError, match="causal = False"):
    models.check(model, lengths={"inputs": 8}, batches={"rows": 8}, mesh=None)


def test_an_encoder_may_look_ahead_and_its_decoder_may_not():
  """Batch prioritized routing (2106.05974) in the encoder only, as ST-MoE has it."""
  lengths = {"inputs": LI, "targets": LT}
  check = functools.partial(
    models.check, lengths=lengths, batches={"rows": B}, mesh=None
  )
  bounded = {"capacity_factor": 1.0, "tokens_per_group": "sequence"}
  bounded["dispatcher"] = {"name": "gather", "order": "token"}
  c = section()
  c.moe.update(**bounded)
  router = {"name": "top_k", "priority": "score"}
  c.encoder = {"moe": {"router": router}}
  check(models.build(c, vocab_size=V))
  c.encoder = {}
  c.moe.router = router
  with pytest.raises(ConfigError, match="later tokens"):
    check(models.build(c, vocab_size=V))


def test_a_task_without_targets():
  with pytest.raises(ConfigError, match="targets"):
    models.check(
      made()[0], lengths={"inputs": 8}, batches={"rows": 8}, mesh=None
    )
