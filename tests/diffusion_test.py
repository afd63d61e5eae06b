"""Diffusion transformers: Wan2.2's public code, timesteps, sampling, meshes."""

import functools
import gc
import os
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base, wan2_2
from moe_jax import models
from moe_jax.core.errors import ConfigError
from moe_jax.data.images import videos
from moe_jax.hf.of_config import wan
from moe_jax.models import counts
from moe_jax.models.diffusion import Condition
from moe_jax.models.generation import flow
from moe_jax.models.parts import video
from moe_jax.tasks import denoise
from moe_jax.training import program
from tests import compiled, pair_of_runs, tiers, wan_parity
from tests.encoder_decoder_training_test import assert_close


def section(d_model=24, d_ff=40, num_layers=2, num_heads=2, **more):
  m = base.get_config().model
  with m.unlocked():
    m.update(name="diffusion", d_model=d_model, d_ff=d_ff)
    m.update(num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_heads)
    m.update(head_dim=d_model // num_heads, norm="layer_bias", use_bias=True)
    m.update(activation="gelu", pattern=("dense",), **more)
    m.attention = {
      "bias": "all",
      "qk_norm": "projection",
      "rope": "interleaved",
      "rope_axes": 3,
    }
    if "video" not in more:
      m.video = {"patch": (1, 2, 2), "num_waves": 16}
  return m.to_dict()


def of_case(name, wider=0):
  """(model, parameters, arrays) of a file of `wan_parity`."""
  grid, length, width, o = wan_parity.CASES[name]
  video = {"patch": (1, 2, 2), "num_waves": o["freq_dim"]}
  sizes = o["dim"], o["ffn_dim"] + wider, o["num_layers"], o["num_heads"]
  model = models.build(
    section(*sizes, video=video),
    video_shape=(*grid, o["out_dim"]),
    more_channels=o["in_dim"] - o["out_dim"],
    text=(length, width),
  )
  with np.load(wan_parity.FOLDER / f"{name}.npz") as file:
    arrays = dict(file)
  params = {
    k.removeprefix("params/"): arrays.pop(k)
    for k in list(arrays)
    if k.startswith("params/")
  }
  return model, params, arrays


@pytest.mark.parametrize("name", wan_parity.CASES)
def test_the_public_code(name, tmp_path):
  """Predictions within 1e-5, and names both ways, through files too."""
  model, arrays, given = of_case(name)
  params = wan.to_params(arrays, model, name)
  condition = Condition(text_BMT=given["text"])
  with jax.default_matmul_precision("highest"):
    found, _ = compiled.apply(
      model, {"params": params}, given["video"], given["time"], condition
    )
  np.testing.assert_allclose(found, given["predicted"], atol=1e-5)
  back = wan.of_params(params, model)
  assert back.keys() == arrays.keys()
  for path, array in back.items():
    np.testing.assert_array_equal(array, arrays[path])
  wan.save(tmp_path / "a", model, params)
  again = wan.load(tmp_path / "a", model)
  jax.tree.map(np.testing.assert_array_equal, again, params)
  with pytest.raises(ConfigError, match="no \\*.safetensors"):
    wan.load(tmp_path, model)
  wan.check(tmp_path / "a", model)
  wider, *_ = of_case(name, wider=8)
  for read in (wan.load, wan.check):
    with pytest.raises(ConfigError, match="has blocks.0.ffn.* of shape"):
      read(tmp_path / "a", wider)
  for lost in ("blocks.1.ffn.0.bias", "head.head.weight"):
    fewer = {k: x for k, x in arrays.items() if k != lost}
    with pytest.raises(ConfigError, match=f"lacks 1 parameters.*{lost}"):
      wan.to_params(fewer, model, "here")
  (file,) = (tmp_path / "a").iterdir()
  file.write_bytes(file.read_bytes()[:100])
  with pytest.raises(ConfigError, match="no whole safetensors"):
    wan.load(tmp_path / "a", model)


@pytest.mark.parametrize("name, channels", [("t2v_a14b", 16), ("i2v_a14b", 36)])
def test_sizes_to_the_unit(name, channels):
  """The sizes of one of the two networks, by the published config."""
  c = wan2_2.get_config(name)
  task = program.build_task(c, prepare=False)
  model = program.build_model(c, task)
  found = counts.count(model, models.variables(model))
  d, ff, waves, text = 5120, 13_824, 256, 4096
  attention = 4 * (d * d + d) + 2 * d
  block = 2 * attention + 2 * d + 2 * d * ff + ff + d + 6 * d
  total = 40 * block + 4 * channels * d + d
  total += text * d + d + d * d + d + waves * d + d + d * d + d
  total += d * 6 * d + 6 * d + d * 64 + 64 + 2 * d
  assert found["total"] == found["active"] == total
  lengths = models.lengths(model, task.lengths)
  assert lengths == {"patches": 21 * 30 * 52}


def test_the_condition_matters():
  model, arrays, given = of_case("wan_a")
  params = wan.to_params(arrays, model, "here")
  video, time, text = given["video"], given["time"], given["text"]

  def predicted(text, mask=None):
    condition = Condition(text_BMT=text, mask_BM=mask)
    variables = {"params": params}
    return compiled.apply(model, variables, video, time, condition)[0]

  plain = predicted(text)
  assert np.abs(predicted(0 * text) - plain).max() > 1e-2
  mask = np.arange(text.shape[1])[None] < np.array([[2], [5]])
  other = np.where(mask[..., None], text, 7.0)
  masked = predicted(other, mask)
  np.testing.assert_allclose(masked, predicted(text, mask), atol=1e-5)
  np.testing.assert_allclose(masked[1], plain[1], atol=1e-5)
  assert np.abs(masked[0] - plain[0]).max() > 1e-3


# Sampling.


def pair():
  """(model, the variables of two networks) with classes."""
  model = models.build(section(), video_shape=(1, 4, 4, 1), num_classes=3)
  made = []
  for seed in range(2):
    variables = compiled.init(model, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    noise = jax.tree.map(
      lambda x, rng=rng: rng.normal(0, 0.1, x.shape).astype(x.dtype), variables
    )
    made.append(jax.tree.map(jnp.add, variables, noise))
  return model, made


def test_two_networks_as_each_by_hand():
  """Euler's steps in numpy, with guidance; at the boundary the first one runs."""
  model, (high, low) = pair()
  label = np.array([2, 0], np.int32)
  noise = (
    np.random.default_rng(0).normal(size=(2, 1, 4, 4, 1)).astype(np.float32)
  )
  how = flow.Sampling(steps=8, shift=3.0)
  times = how.times
  assert times[0] == 1 and times[-1] == 0 and (np.diff(times) < 0).all()
  boundary, steps = float(times[3]), []
  networks = (
    flow.Network("high", boundary, lambda: high, 4.0),
    flow.Network("low", 0.0, lambda: low, 2.0),
  )
  found = flow.sample(
    *(model, networks, noise, Condition(label), how),
    tell=lambda *step: steps.append(step[2]),
  )
  assert steps == ["high"] * 4 + ["low"] * 4
  x = noise
  for i in range(8):
    variables, guidance = (high, 4.0) if i <= 3 else (low, 2.0)
    time = np.full(2, times[i], np.float32)

    def v(labels, variables=variables, x=x, time=time):
      labels = np.asarray(labels, np.int32)
      return compiled.apply(model, variables, x, time, Condition(labels))[0]

    none = v([-1, -1])
    x = x + (times[i + 1] - times[i]) * (none + guidance * (v(label) - none))
  np.testing.assert_allclose(found, x, atol=1e-4)


def test_one_network_is_in_memory_at_a_time(monkeypatch):
  """In bytes of arrays: none at each read, and one network's after each step."""
  model, both = pair()
  both = jax.tree.map(np.array, both)  # On the host.
  size = sum(x.nbytes for x in jax.tree.leaves(both[0]))
  at_reads, after_steps, compiled = [], [], flow._compiled

  def alive():
    return sum(x.nbytes for x in jax.live_arrays())

  def reader(i):
    at_reads.append(alive() - before)
    return both[i]

  def counting(*args):
    def step(*arrays, **options):
      x = jax.block_until_ready(compiled(*args)(*arrays, **options))
      after_steps.append(alive() - before)
      return x

    return step

  monkeypatch.setattr(flow, "_compiled", counting)
  networks = (
    flow.Network("high", 0.5, functools.partial(reader, 0)),
    flow.Network("low", 0.0, functools.partial(reader, 1)),
  )
  noise = np.zeros((1, 1, 4, 4, 1), np.float32)
  label = Condition(np.zeros(1, np.int32))
  gc.collect()
  before = alive()
  flow.sample(model, networks, noise, label, flow.Sampling(steps=4))
  assert len(at_reads) == 2 and max(at_reads) < 0.01 * size
  assert len(after_steps) == 4
  assert size <= min(after_steps) <= max(after_steps) < 1.01 * size


class Knows:
  """A model that knows the video, told in either way, but for a part of it."""

  def __init__(self, predict, target, wrong=0.0):
    self.predict, self.target, self.wrong = predict, target, wrong

  def apply(self, variables, x, time, condition):
    t = time.reshape(-1, 1, 1, 1, 1)
    target = jnp.concatenate([jnp.asarray(self.target)] * (len(x) // 2))
    noise = (x - (1 - t) * target) / t
    found = noise if self.predict == "noise" else noise - target
    return (1 + self.wrong) * found, {}


def sampled(model, steps=6, guidance=1.0):
  noise = np.random.default_rng(1).normal(size=model.target.shape)
  one = (flow.Network("all", 0.0, dict, guidance),)
  how = flow.Sampling(steps=steps, shift=2.0, predict=model.predict)
  return flow.sample(model, one, noise.astype(np.float32), Condition(), how)


def test_noise_says_the_same_as_velocity():
  """And where it is a little wrong, the first step does not magnify it."""
  rng = np.random.default_rng(0)
  target = rng.normal(size=(2, 1, 4, 4, 1)).astype(np.float32)
  for predict, guidance in (("velocity", 1.0), ("noise", 1.0), ("noise", 2.0)):
    found = sampled(Knows(predict, target), guidance=guidance)
    np.testing.assert_allclose(found, target, atol=1e-4)
    found = sampled(Knows(predict, target, wrong=0.01), 40, guidance)
    assert np.abs(found - target).max() < 0.15
  found = sampled(Knows("noise", target, wrong=0.01), steps=1)
  assert np.abs(found).max() < 6  # The noise itself is up to 3.


def test_the_text_that_guidance_leads_away_from():
  """Zeros, or one that is given; at a guidance of 1 it plays no part."""
  model = models.build(section(), video_shape=(1, 4, 4, 1), text=(3, 5))
  variables = compiled.init(model, jax.random.key(0))
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda x: x + rng.normal(0, 0.1, x.shape).astype(x.dtype), variables
  )
  text, away = rng.normal(size=(2, 2, 3, 5)).astype(np.float32)
  noise = rng.normal(size=(2, 1, 4, 4, 1)).astype(np.float32)
  how, condition = flow.Sampling(steps=1), Condition(text_BMT=text)

  def found(guidance, none):
    one = (flow.Network("all", 0.0, lambda: variables, guidance),)
    given = none if none is None else Condition(text_BMT=none)
    args = model, one, noise, condition, how, None, given
    return np.asarray(flow.sample(*args))

  ones = np.ones(2, np.float32)

  def v(text):
    given = noise, ones, Condition(text_BMT=text)
    return compiled.apply(model, variables, *given)[0]

  for none in (None, away):
    start = v(0 * text if none is None else none)
    wanted = noise - (start + 3 * (v(text) - start))
    np.testing.assert_allclose(found(3.0, none), wanted, atol=1e-5)
  np.testing.assert_array_equal(found(1.0, away), found(1.0, None))


def test_both_a_class_and_a_text():
  """Each changes what is predicted."""
  sizes = {"video_shape": (1, 4, 4, 1), "num_classes": 3, "text": (3, 5)}
  model = models.build(section(), **sizes)
  variables = compiled.init(model, jax.random.key(0))
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda x: x + rng.normal(0, 0.1, x.shape).astype(x.dtype), variables
  )
  video, time, condition = model.example(2)
  video = rng.normal(size=video.shape).astype(np.float32)

  def predicted(**changes):
    own = condition._replace(**changes)
    return np.asarray(compiled.apply(model, variables, video, time, own)[0])

  plain = predicted()
  assert np.abs(predicted(label_B=np.array([1, 2])) - plain).max() > 1e-3
  text = rng.normal(size=(2, 3, 5)).astype(np.float32)
  assert np.abs(predicted(text_BMT=text) - plain).max() > 1e-3


# The task.


def data(channels=1, text=None):
  rng = np.random.default_rng(0)
  arrays = {}
  for split, n in (("train", 40), ("validation", 9)):
    arrays[split] = {
      "video": rng.integers(0, 256, (n, 1, 4, 4, channels)).astype(np.uint8),
      "label": rng.integers(0, 3, n).astype(np.int32),
    }
  return videos.Videos("random", (1, 4, 4, channels), 3, arrays=arrays)


class Fixed:
  """A model that predicts 0.3, and keeps what it is given."""

  class arch:  # noqa: N801
    dtype = "float32"

  def apply(self, variables, x, time, condition, mask, rng, **options):
    self.given = x, time, condition
    return jnp.full_like(x, 0.3), {}


def made(**options):
  c = base.get_config()
  c.data.batch_size = 20
  with c.unlocked():
    c.eval.update(batch_size=4, batches_per_domain=None)
  own = {"predict": "velocity", "shift": 1.0, "unconditional": 0.0} | options
  ends = own.pop("ends", (0.0, 1.0))
  ranges = {"a": (0.0, 0.5), "b": (0.5, 1.0)}
  return denoise.of_videos(c, data(), ranges, ends, **own)


def loss_of(task, batch, rng=None, train=False):
  model = Fixed()
  batch = {k: jnp.asarray(x) for k, x in batch.items()}
  loss, _, _ = task.loss(model, {}, batch, rng, 0, train)
  return loss, model.given


@pytest.mark.parametrize("predict", ["velocity", "noise"])
def test_the_loss_by_hand(predict):
  task = made(predict=predict)
  batch = task.train(3, None)[2]
  batch = {k: x[0] for k, x in batch.items()}
  batch["mask"] = np.arange(20) != 4
  loss, (x, time, condition) = loss_of(task, batch, jax.random.key(0), True)
  video, t = (
    batch["video"] / 127.5 - 1,
    np.float64(time).reshape(-1, 1, 1, 1, 1),
  )
  noise = (np.float64(x) - (1 - t) * video) / t
  target = noise - video if predict == "velocity" else noise
  wanted = ((0.3 - target) ** 2).mean((1, 2, 3, 4))[batch["mask"]].sum()
  assert float(loss.total) == pytest.approx(wanted, rel=1e-3)
  assert float(loss.weight) == 19
  np.testing.assert_array_equal(condition.label_B, batch["label"])
  assert abs(noise[t[:, 0, 0, 0, 0] > 0.2].std() - 1) < 0.15


def test_timesteps_have_their_shift_and_range():
  keys = jax.random.split(jax.random.key(0), 4000)
  for shift, ends in (
    (1.0, (0.0, 1.0)),
    (5.0, (0.0, 1.0)),
    (5.0, (0.875, 1.0)),
  ):
    draw = functools.partial(denoise._timestep, ends, shift)
    found = np.sort(jax.vmap(draw)(keys))
    low, high = (x / (shift - (shift - 1) * x) for x in ends)
    u = low + (high - low) * (np.arange(4000) + 0.5) / 4000
    wanted = shift * u / (1 + (shift - 1) * u)
    assert np.abs(found - wanted).max() < 0.04 * (ends[1] - ends[0])
    assert ends[0] <= found[0] and found[-1] <= ends[1]


def test_conditions_are_left_out_in_training_alone():
  task = made(unconditional=0.5)
  batch = {k: x[0] for k, x in task.train(3, None)[2].items()}
  _, (*_, condition) = loss_of(task, batch, jax.random.key(0), True)
  share = np.mean(np.asarray(condition.label_B) == -1)
  assert 0.2 < share < 0.8
  _, (*_, condition) = loss_of(
    task, batch | {"time": np.full(20, 0.3, np.float32)}
  )
  assert (np.asarray(condition.label_B) >= 0).all()


def test_validation_is_every_video_in_every_range():
  task = made()
  found = [*task.validation(None)]
  assert [name for name, _ in found] == ["a"] * 3 + ["b"] * 3
  for name, low in (("a", 0.0), ("b", 0.5)):
    parts = [b for own, b in found if own == name]
    mask = np.concatenate([b["mask"] for b in parts])
    number = np.concatenate([b["number"] for b in parts])[mask]
    time = np.concatenate([b["time"] for b in parts])[mask]
    np.testing.assert_array_equal(number, np.arange(9))
    assert low <= time.min() and time.max() <= low + 0.5
    # They cover the range evenly, in no order.
    np.testing.assert_allclose(np.diff(np.sort(time)), 0.5 / 9, rtol=1e-4)
    assert len({*np.sign(np.diff(time))}) == 2
  first, again = (loss_of(task, found[0][1])[0] for _ in range(2))
  assert float(first.total) == float(again.total)


# Steps.


def config(accumulation=1, balanced=True):
  """Experts by timestep in one layer, and a router that sees it in another."""
  c = wan2_2.get_config("tiny")
  c.data.batch_size = 16
  c.model.update(
    section(d_model=16, d_ff=24, num_heads=2) | {"dtype": "float64"}
  )
  c.model.update(num_layers=2, pattern=("moe@time", "moe"), remat="none")
  c.model.attention = {"bias": "all", "rope": "interleaved", "rope_axes": 3}
  moe = c.model.moe
  moe.update(
    num_experts=4, top_k=2, d_expert=12, activation="gelu", use_bias=True
  )
  moe.update(capacity_factor=1.0, tokens_per_group="2 sequences")
  moe.dispatcher = {"name": "gather", "order": "token"}
  moe.balancers = {"load": {"name": "switch", "coefficient": 0.1}}
  if not balanced:
    moe.balancers = {}
  by_time = {"name": "by_feature", "feature": "timestep", "num_values": 4}
  by_time["boundaries"] = (0.25, 0.5, 0.75)
  own = {"router": by_time, "top_k": 1, "balancers": {}}
  c.model.variants = {"time": {"moe": own | {"capacity_factor": 3.0}}}
  c.optim.optimizer = {"name": "sgd"}
  c.optim.update(learning_rate=0.1, schedule="constant", warmup_steps=0)
  c.optim.clip_norm = None
  c.train.accumulation = accumulation
  return c


@functools.cache
def stepped(sizes=None, accumulation=1, balanced=True):
  """(parameters, sums) after a step from the same start."""
  c = config(accumulation, balanced)
  options = {"predict": "velocity", "shift": 3.0, "unconditional": 0.2}
  ends = 0.0, 1.0
  task = denoise.of_videos(c, data(), {"all": ends}, ends, **options)
  return pair_of_runs.stepped(c, lambda mesh: task, sizes)


@pytest.mark.parametrize(
  "sizes",
  tiers.only([(1, 2, 2, 2)], [(2, 1, 4, 1), (1, 2, 2, 2), (8, 1, 1, 1)]),
)
def test_a_step_on_a_mesh_is_that_without(sizes):
  with jax.enable_x64(True):
    wanted, found = stepped(), stepped(sizes)
  assert_close(found, wanted)
  by_time, other = wanted[1]["stats"].values()
  # All tokens of a video have its timestep, and so one of the four experts.
  assert (
    by_time.count_E.sum(tuple(range(by_time.count_E.ndim - 1))) % 4 == 0
  ).all()
  assert by_time.count_E.sum() == 16 * 4 and other.count_E.sum() == 2 * 16 * 4


@pytest.mark.long
def test_micro_batches_are_one_large_batch():
  with jax.enable_x64(True):
    (params, sums), (others, wanted) = (
      stepped(accumulation=n, balanced=False) for n in (2, 1)
    )
  for name in ("loss", "task"):
    assert_close(sums[name], wanted[name])
  assert_close(params, others)


# What is refused.

IMPOSSIBLE = {
  r"patch = \(2, 2, 2\) does not divide videos of 1 frames": {
    "video": {"patch": (2, 2, 2)}
  },
  "needs model.video": {"video": {}},
  "num_waves = 7 is odd": {"video": {"patch": (1, 2, 2), "num_waves": 7}},
  "model.image = .* has no meaning in the model diffusion": {
    "image": {"patch": 2}
  },
  "rope_axes = 2, and the tokens of this model stand in a grid of 3": {
    "attention": {"rope_axes": 2}
  },
}


@pytest.mark.parametrize("words", IMPOSSIBLE)
def test_impossible_models(words):
  own = section() | IMPOSSIBLE[words]
  with pytest.raises(ConfigError, match=words):
    models.build(own, video_shape=(1, 4, 4, 1), num_classes=3)


def test_a_decoder_has_no_grid():
  own = section() | {"name": "decoder", "video": {}}
  with pytest.raises(ConfigError, match="stand in a grid of 1; set it to 1"):
    models.build(own, vocab_size=9)


@pytest.mark.parametrize(
  "levels, ends, edges",
  [
    (8, (0.875, 1.0), [0.875, 1.0]),
    (8, (0.0, 0.875), [0.125 * n for n in range(8)]),
    (10, (0.0, 0.3), [0.0, 0.1, 0.2, 0.3]),
    (8, (0.9, 1.0), [0.9, 1.0]),
    (1, (0.2, 0.3), [0.2, 0.3]),
  ],
)
def test_ranges_of_timesteps_are_of_equal_size(levels, ends, edges):
  found = denoise._ranges(levels, ends)
  pairs = [*found.values()]
  np.testing.assert_allclose([a for a, _ in pairs], edges[:-1], atol=1e-12)
  np.testing.assert_allclose([b for _, b in pairs], edges[1:], atol=1e-12)
  assert [*found] == [f"{a:.3f}-{b:.3f}" for a, b in pairs]


@pytest.mark.parametrize(
  "boundary, expert, words",
  [
    (0.5, None, "give both or neither"),
    (None, "low", "give both or neither"),
    (1.0, "high", "leaves no timesteps for task.expert = 'high'"),
    (0.0, "low", "leaves no timesteps"),
  ],
)
def test_impossible_boundaries(boundary, expert, words):
  with pytest.raises(ConfigError, match=words):
    denoise.timesteps(boundary, expert)


def test_a_boundary_of_the_timestep_outside_of_it():
  """Experts beyond it would never see a token."""
  router = {"name": "by_feature", "feature": "timestep", "num_values": 2}
  for boundary in (-0.1, 1.5):
    c = config()
    own = router | {"boundaries": (boundary,)}
    c.model.variants = {"time": {"moe": {"router": own, "top_k": 1}}}
    with pytest.raises(
      ConfigError, match=f'the boundary {boundary} of the feature "timestep"'
    ):
      models.build(c.model, video_shape=(1, 4, 4, 1))


COUNTS = {"train": 12, "validation": 4}


def folder_of(path, **changes):
  """A folder of arrays of videos, some of which are others, or more."""
  rng = np.random.default_rng(0)
  for split, n in COUNTS.items():
    arrays = {
      "video": rng.normal(size=(n, 2, 4, 4, 1)).astype(np.float32),
      "text": rng.normal(size=(n, 3, 5)).astype(np.float32),
      "label": np.arange(n) % 3,
    }
    kinds = {*arrays, "more", "text_mask"}
    for kind in kinds:
      array = changes.get(f"{split}_{kind}", arrays.get(kind))
      if array is not None:
        np.save(path / f"{split}_{kind}.npy", array)
  return str(path)


def of_folder(path, **changes):
  """The videos of `folder_of`."""
  return videos.of_folder("own", folder_of(path, **changes), path / "cache")


def test_folders_of_arrays(tmp_path):
  found = of_folder(tmp_path)
  assert found.shape == (2, 4, 4, 1) and found.text == (3, 5)
  assert found.num_classes == 3 and videos.is_folder(str(tmp_path))
  batch = videos.train_batches(found, 0, batch_size=4)[1]
  assert batch["text"].shape == (4, 3, 5) and batch["video"].dtype == np.float32


def same(kind, *shape, dtype=float):
  """Arrays of ones, of a kind for both splits."""
  return {f"{k}_{kind}": np.ones((n, *shape), dtype) for k, n in COUNTS.items()}


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"validation_text": None}, "text in one split alone"),
    ({"train_text": np.zeros((3, 3, 5))}, "entries; give each as many"),
    ({"train_video": np.zeros((12, 4, 4, 1))}, "5 axes are needed"),
    ({"validation_video": np.zeros((4, 2, 6, 4, 1))}, "make them equal"),
    (
      {"validation_label": np.full(4, 7)},
      "validation_label.npy has labels up to 7, and those of train go up to 2; re",
    ),
    (
      {"train_label": np.arange(12) % 3 - 1},
      "train_label.npy has the label -1, and labels begin at 0; number",
    ),
    (
      {"train_label": np.arange(12) % 3 * 10**9},
      "3 distinct labels up to 2000000000, and there would be 2000000001 classes",
    ),
    ({"train_label": np.arange(12) / 2}, "type float64, and it needs whole"),
    ({"train_text": np.zeros((12, 3, 5), bool)}, "needs float16, float32 or"),
    (
      same("text", 3, 5, dtype=np.uint8),
      "train_text.npy has the type uint8, and it needs float16",
    ),
    (
      same("video", 2, 4, 4, 1, dtype=np.uint16),
      r"train_video.npy has the type uint16, and it needs bytes \(uint8\), float16",
    ),
    (
      same("more", 2, 4, 4, 1, dtype=">f4"),
      "train_more.npy has the type >f4, .* this machine's order of bytes; write",
    ),
    (
      same("video", 2, 4, 4, 1, dtype=np.longdouble),
      "train_video.npy has the type .*, and it needs bytes",
    ),
    (
      {"train_video": np.ones((12, 2, 4, 4, 1), np.uint8)},
      "validation_video.npy has the type float32, and that of train has uint8; wr",
    ),
    (
      same("video", 2, 4, 4, 0),
      r"train_video.npy has the shape \(12, 2, 4, 4, 0\), and every size must be",
    ),
    (same("text", 0, 5), "train_text.npy has the shape .* must be at least 1"),
    (
      {f"{split}_text": None for split in videos.SPLITS}
      | same("text_mask", 3, dtype=bool),
      "text_mask.npy without train_text.npy",
    ),
    (
      same("text_mask", 4, dtype=bool),
      r"has the sizes \(4,\), and train_text.npy \(3,\)",
    ),
    (
      same("more", 2, 4, 6, 1),
      "train_more.npy has the sizes .* make them equal",
    ),
  ],
)
def test_arrays_that_do_not_fit(tmp_path, changes, words):
  with pytest.raises(ConfigError, match=words):
    of_folder(tmp_path, **changes)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float64])
def test_types_of_arrays(tmp_path, dtype):
  """Labels may have another type in each split, and gaps."""
  labels = {"train_label": np.array([0, 5, 10] * 4, ">i4")}
  labels["validation_label"] = np.array([10, 5, 0, 0], np.uint8)
  found = of_folder(
    tmp_path, **same("video", 2, 4, 4, 1, dtype=dtype), **labels
  )
  batch = videos.train_batches(found, 0, batch_size=12)[0]
  assert found.num_classes == 11 and batch["video"].dtype == dtype
  assert sorted(batch["label"].tolist()) == [0] * 4 + [5] * 4 + [10] * 4


@pytest.mark.parametrize("number", [np.nan, -np.inf, 1e300])
@pytest.mark.parametrize("kind", ["video", "text"])
def test_numbers_that_are_not_finite(tmp_path, monkeypatch, kind, number):
  """They are found in any part of a file, which is not read as a whole."""
  monkeypatch.setattr(videos, "_READ_AT_ONCE", 600)
  array = np.load(f"{folder_of(tmp_path)}/validation_{kind}.npy")
  array = array.astype(float)
  array[2].flat[-1] = number
  train = np.load(tmp_path / f"train_{kind}.npy").astype(float)
  changes = {f"validation_{kind}": array, f"train_{kind}": train}
  words = f"{tmp_path}/validation_{kind}.npy has NaN, .* in row 2, counted from"
  for _ in range(2):
    with pytest.raises(ConfigError, match=words):
      of_folder(tmp_path, **changes)
  array[2] = 0
  assert of_folder(tmp_path, **changes).fingerprint


def test_a_fingerprint_is_of_the_content(tmp_path, monkeypatch):
  """Files are read once, and again where a file changes."""
  read, digest = [], videos._digest
  monkeypatch.setattr(
    videos, "_digest", lambda *args: read.append(args) or digest(*args)
  )
  path, file = folder_of(tmp_path), tmp_path / "train_video.npy"

  def again(path=path):
    read.clear()
    found = videos.of_folder("own", path, tmp_path / "cache").fingerprint
    return found, len(read)

  first = again()[0]
  assert again() == (first, 0)
  file.touch()
  assert again() == (first, 6) and again() == (first, 0)
  shutil.copytree(path, tmp_path / "copy")
  assert again(f"{tmp_path}/copy") == (first, 6)
  # A row more or less at once is the same content.
  monkeypatch.setattr(videos, "_READ_AT_ONCE", 600)
  file.touch()
  assert again() == (first, 6)
  # Other content of the same size, at the same time.
  time, array = file.stat().st_mtime_ns, np.load(file)
  array[-1, -1, -1, -1] += 1
  np.save(file, array)
  os.utime(file, ns=(time, time))
  other, number = again()
  assert other != first and number == 6 and again() == (other, 0)


def test_a_run_goes_on_with_the_same_arrays(tmp_path):
  c = wan2_2.get_config("tiny")
  c.data.dir, c.task = folder_of(tmp_path), {"name": "denoise"}
  c.data.cache_dir = str(tmp_path / "cache")
  own = program.build_task(c).fingerprint
  (tmp_path / "train_text.npy").touch()
  assert program.build_task(c, fingerprint=own).fingerprint == own
  folder_of(tmp_path, **same("text", 3, 5))
  with pytest.raises(ConfigError, match="not those that the run began with"):
    program.build_task(c, fingerprint=own)


def test_a_folder_that_is_not_there(tmp_path):
  c = wan2_2.get_config("tiny")
  c.data.dir, c.task = str(tmp_path / "lost"), {"name": "denoise"}
  with pytest.raises(
    ConfigError, match="lost does not exist; .* arrays such as train_video.npy"
  ):
    program.build_task(c)


def test_several_arrays_in_a_file(tmp_path):
  path = folder_of(tmp_path)
  with open(tmp_path / "train_text.npy", "wb") as file:
    np.savez(file, a=np.zeros(3), b=np.zeros(3))
  with pytest.raises(
    ConfigError, match="several arrays, and 3 axes are needed"
  ):
    videos.of_folder("own", path)


def test_a_config_of_other_data(tmp_path):
  """Sizes that are given too have to be those of the arrays."""
  c = wan2_2.get_config("tiny")
  c.data.dir, c.task = folder_of(tmp_path), {"name": "denoise"}
  c.data.cache_dir = str(tmp_path / "cache")
  assert program.build_task(c).given["text"] == (3, 5)
  for key, value in {
    "shape": (2, 4, 4, 3),
    "text": (3, 6),
    "num_classes": 5,
    "more_channels": 2,
  }.items():
    c.task = {"name": "denoise", key: value}
    with pytest.raises(ConfigError, match=f"task.{key} = .* is not that of"):
      program.build_task(c)


def test_channels_beside_are_scaled_as_videos_are(tmp_path):
  """In training and in pictures: bytes are numbers from -1 to 1."""
  rng = np.random.default_rng(0)
  more = {
    f"{k}_more": rng.integers(0, 256, (n, 2, 4, 4, 2)).astype(np.uint8)
    for k, n in COUNTS.items()
  }
  found = of_folder(tmp_path, **more)
  c = base.get_config()
  c.data.batch_size = c.eval.batch_size = 4
  options = {"predict": "velocity", "shift": 1.0, "unconditional": 0.0}
  ends = 0.0, 1.0
  task = denoise.of_videos(c, found, {"a": ends}, ends, **options)
  batch = {k: x[0] for k, x in task.train(3, None)[2].items()}
  _, (x, _, _) = loss_of(task, batch, jax.random.key(0), True)
  beside = batch["more"] / 127.5 - 1
  np.testing.assert_allclose(x[..., 1:], beside, atol=1e-6)

  class Seen(Fixed):
    def apply(self, variables, x, time, condition, collect=None):
      assert -1 <= x[..., 1:].min() <= x[..., 1:].max() <= 1
      return jnp.zeros_like(x[..., :1]), {}

  Seen.lengths, Seen.sublayers = {"patches": 8}, {}
  Seen.arch = types.SimpleNamespace(
    dtype="float32", shape=found.shape, video=video.Video((1, 2, 2))
  )
  with jax.disable_jit():
    made = task.pictures(Seen(), {})
  assert made.keys() == {"denoised", "samples"}


def test_a_damaged_array(tmp_path):
  folder_of(tmp_path)
  (tmp_path / "train_text.npy").write_bytes(b"\x93NUMPY nothing")
  with pytest.raises(ConfigError, match="train_text.npy is no whole array"):
    videos.of_folder("own", str(tmp_path))
