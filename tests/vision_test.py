"""Vision transformers: V-MoE's public code, its files, counts, masks and meshes."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from configs import vmoe as config_file
from moe_jax import models
from moe_jax.core.errors import ConfigError
from moe_jax.data.images import prepared
from moe_jax.hf.of_config import vmoe, vmoe_files
from moe_jax.models import counts
from moe_jax.models.parts import image as image_lib
from moe_jax.moe.routers import top_k
from moe_jax.moe.types import Side
from moe_jax.tasks import classify_images
from moe_jax.training import balancing, program
from tests import compiled, images_test, pair_of_runs, vision_parity
from tests.encoder_decoder_training_test import assert_close


def made(name, **more):
  """(setting, model) of a case of `vision_parity`."""
  s = vision_parity.setting(name)
  section = vision_parity.section(s)
  section["moe"] |= more
  return s, models.build(section, image_shape=s["shape"], num_classes=7)


def stored(name):
  """(parameters by their names, image, logits, losses and noise) of a file."""
  with np.load(vision_parity.FOLDER / f"{name}.npz") as file:
    arrays = dict(file)
  params = {
    k.removeprefix("params/"): arrays.pop(k)
    for k in list(arrays)
    if k.startswith("params/")
  }
  return params, arrays.pop("image"), arrays.pop("logits"), arrays


def give_noise(monkeypatch, noise_GTE):
  """Gives the router the noise of a file, in the place of its own."""

  @jax.custom_batching.custom_vmap
  def noisy(logits_TE, noise):
    return logits_TE  # Without its group; the groups are routed together.

  @noisy.def_vmap
  def of_groups(groups, batched, logits_GTE, noise):
    return logits_GTE + noise * noise_GTE, True

  def given(logits_TE, rng, noise):
    assert rng is not None
    return noisy(logits_TE, noise)

  monkeypatch.setattr(top_k, "_noisy", given)


@pytest.mark.parametrize("name", vision_parity.CASES)
def test_the_public_code(name, monkeypatch):
  """Logits and balancing losses within 1e-5, and names both ways."""
  (s, model), (arrays, image, logits, theirs) = made(name), stored(name)
  options = {}
  if s["noise"]:
    give_noise(monkeypatch, theirs.pop("noise"))
    options = {"rng": jax.random.key(0), "train": True}
  params = vmoe.to_params(arrays, model, name)
  back = vmoe.of_params(params, model)
  assert back.keys() == arrays.keys()
  for path, array in back.items():
    np.testing.assert_array_equal(array, arrays[path])
  apply = functools.partial(model.apply, **options)
  with jax.default_matmul_precision("highest"):
    found, aux = jax.jit(apply)({"params": params}, image)
  np.testing.assert_allclose(found, logits, atol=1e-5)
  names = vision_parity.losses(s)
  # Their sum over losses and layers, for every group.
  total_G = theirs.pop("auxiliary") if s["noise"] else sum(theirs.values())
  assert [key.partition("/")[0] for key in theirs] == names
  stats = balancing.statistics(aux, model.sublayers)
  so_far = {k: x.count_E.sum((1, 2)) for k, x in stats.items()}
  loss = balancing.loss(model.sublayers, {}, stats, so_far, params)
  # Each of ours has 1 more, which changes no gradient.
  more = sum(vision_parity.WEIGHTS[of] for of in names)
  assert float(loss) == pytest.approx(more + np.mean(total_G), abs=1e-5)


@pytest.mark.parametrize("name", classify_images.LOSSES)
def test_the_losses_of_classes_are_those_of_the_public_code(name):
  """The calls of its `train.trainer.get_loss_fn`, on its logits."""
  logits, label = stored("ample")[2], np.arange(vision_parity.IMAGES) % 7
  theirs = {
    "softmax": optax.softmax_cross_entropy,
    "sigmoid": lambda *args: jnp.sum(
      optax.sigmoid_binary_cross_entropy(*args), axis=-1
    ),
  }[name](logits, np.eye(7, dtype=np.float32)[label])
  mask = np.ones(len(label), bool)
  loss, _ = images_test.scored(logits, label, mask, loss=name)
  assert float(loss.value()) == pytest.approx(float(theirs.mean()), abs=1e-5)


def test_priority_and_capacity_matter():
  """The options that the cases above tell apart change the logits."""
  arrays, image, logits, _ = stored("tight_priority")
  for name in ("tight", "ample_priority", "scarce_priority"):
    _, model = made(name)
    params = vmoe.to_params(arrays, model, name)
    assert (
      np.abs(compiled.apply(model, {"params": params}, image)[0] - logits).max()
      > 1e-3
    )


def test_soft_layers_against_the_paper():
  """2308.00951, equations 1 to 3 and section 2.3, by loops over numpy."""
  s, model = made("soft")
  rng, part = np.random.default_rng(0), "encoder/1/moe"
  sublayer = model.sublayers[part]
  t, d, e, slots = 6, s["d_model"], s["num_experts"], s["slots"]
  x_TD = rng.normal(size=(t, d))
  params = sublayer.recipe.router.init(jax.random.key(0), d, e)
  phi = np.float64(params["kernel"])
  scale = 1.7
  params["scale"] = jnp.full(1, scale)

  def unit(v):
    return v / np.sqrt((v**2).sum())

  logits = np.array(
    [
      [
        [scale * unit(x) @ unit(phi[:, i, j]) for j in range(slots)]
        for i in range(e)
      ]
      for x in x_TD
    ]
  )
  shares = np.exp(logits)
  side = Side(jnp.ones(t, bool))
  with jax.enable_x64(True):
    routing = sublayer.recipe.router.route(
      params,
      jnp.asarray(x_TD),
      num_experts=e,
      select=lambda x: x,
      side=side,
      rng=None,
    )
  choice = routing.choice
  dispatch, combine = choice.dispatch_TEC, choice.combine_TEC
  np.testing.assert_allclose(dispatch, shares / shares.sum(0), rtol=1e-6)
  total = shares.sum((1, 2), keepdims=True)
  np.testing.assert_allclose(combine, shares / total, rtol=1e-6)


def test_files_of_checkpoints(tmp_path):
  _, model = made("normed")
  arrays, *_ = stored("normed")
  params = vmoe.to_params(arrays, model, "here")
  prefix = f"{tmp_path}/folder/checkpoint"
  vmoe.save(prefix, model, params)
  again = vmoe.load(prefix, model)
  jax.tree.map(np.testing.assert_array_equal, again, params)
  # The file as V-MoE's own code wrote it, in two parts with pieces of 64 bytes.
  theirs = vmoe_files.read(str(vision_parity.FOLDER / "checkpoint"))
  want = {
    "params/a/bias": np.float32(3),
    "params/a/kernel": np.arange(40, dtype=np.float32).reshape(5, 8),
    "step": np.int32(4),
  }
  assert theirs.keys() == want.keys()
  for name, array in want.items():
    np.testing.assert_array_equal(theirs[name], array)
    assert theirs[name].dtype == array.dtype


def test_damaged_files(tmp_path):
  _, model = made("ample")
  params = vmoe.to_params(stored("ample")[0], model, "here")
  prefix = f"{tmp_path}/checkpoint"
  with pytest.raises(ConfigError, match="cannot be read.*index"):
    vmoe.load(prefix, model)
  vmoe.save(prefix, model, params)
  (part,) = tmp_path.glob("*.data-*")
  whole = part.read_bytes()
  for content in (b"", whole[: len(whole) // 2], b"\x80"):
    part.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read.*fetch its files"):
      vmoe.load(prefix, model)
  part.write_bytes(whole)
  with pytest.raises(ConfigError, match="no place for.*encoderblock_1/Moe"):
    vmoe.load(prefix, made("soft")[1])


# Millions, as the paper has them in table 8 (V-MoE) and 2 (Soft MoE).
PUBLISHED = {
  "vmoe:dense_s_32": 36.5,
  "vmoe:s_32": 296.9,
  "vmoe:dense_b_16": 100.5,
  "vmoe:b_16": 979.0,
  "vmoe:dense_l_16": 323.1,
  "vmoe:l_16": 3446.0,
  "vmoe:dense_h_14": 655.8,
  "vmoe:h_14_last5": 2688.6,
  "soft_moe:s_16": 933,
  "soft_moe:b_16": 3700,
  "soft_moe:l_16": 13_100,
}
# (d, ff, layers, layers with experts, patch), and where they are others: experts,
# classes, pixels, and whether there is a layer before the output.
OTHERS = (32, 18_291, 224, True)
SHAPES = {
  "vmoe:s_32": (512, 2048, 8, 4, 32),
  "vmoe:b_32": (768, 3072, 12, 6, 32),
  "vmoe:b_16": (768, 3072, 12, 6, 16),
  "vmoe:l_32": (1024, 4096, 24, 2, 32),
  "vmoe:l_16": (1024, 4096, 24, 12, 16),
  "vmoe:h_14_last5": (1280, 5120, 32, 5, 14),
  "vmoe:h_14_every2": (1280, 5120, 32, 16, 14),
  "vmoe:imagenet_s_32": (512, 2048, 8, 2, 32, 8, 1000, 224, True),
  "vmoe:imagenet21k_b_16": (768, 3072, 12, 6, 16, 8, 21_843, 224, False),
  "vmoe:imagenet_b_16_384": (768, 3072, 12, 6, 16, 8, 1000, 384, False),
}


@functools.cache
def counted(name):
  file, _, variant = name.partition(":")
  c = importlib.import_module(f"configs.{file}").get_config(variant)
  task = program.build_task(c, prepare=False)
  model = program.build_model(c, task)
  return counts.count(model, models.variables(model))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
  total, published = counted(name)["total"] / 1e6, PUBLISHED[name]
  if name.startswith("vmoe"):
    assert round(total, 1) == published
  else:  # Its table leaves the other digits out.
    digits = 100 if published > 1000 else 1
    assert total // digits * digits == published


@pytest.mark.parametrize("name", SHAPES)
def test_sizes_to_the_unit(name):
  d, ff, layers, sparse, p, *others = SHAPES[name]
  experts, classes, pixels, more = others or OTHERS
  places, mlp = (pixels // p) ** 2 + 1, 2 * d * ff + ff + d
  total = 3 * p * p * d + d + places * d + d
  total += layers * (4 * d * d + 4 * d + 4 * d) + 2 * d
  total += (layers - sparse) * mlp + sparse * (experts * mlp + d * experts)
  head = more * (d * d + d) + classes * (d + 1)
  assert counted(name)["total"] == total + head
  idle = sparse * (experts - 2) * mlp
  assert counted(name)["active"] == total + head - idle


@pytest.mark.parametrize(
  "name, d, ff, layers",
  [("s_16", 384, 1536, 12), ("b_16", 768, 3072, 12), ("l_16", 1024, 4096, 24)],
)
def test_sizes_of_soft_moe_to_the_unit(name, d, ff, layers):
  """128 experts of a slot each, in the second half of the layers (2308.00951)."""
  places, mlp, sparse = 14**2, 2 * d * ff + ff + d, layers // 2
  # With scales of heads, which are 64 wide, for queries and for keys.
  attention = 4 * (d * d + d) + 2 * 64
  total = 3 * 16 * 16 * d + d + places * d
  total += layers * (attention + 2 * 2 * d) + (layers - sparse) * mlp + 2 * d
  # Experts, directions of their slots, and a scale.
  total += sparse * (128 * mlp + 128 * d + 1)
  assert counted(f"soft_moe:{name}")["total"] == total + 29_593 * (d + 1)


def test_patches_by_loops():
  """A patch is its pixels row by row; the class token is the first."""
  s, model = made("ample")
  rng = np.random.default_rng(0)
  image = rng.normal(size=(2, *s["shape"])).astype(np.float32)
  params = vmoe.to_params(stored("ample")[0], model, "here")
  (height, width, _), p = s["shape"], s["patch"]
  rows = []
  for one in image:
    patches = [
      one[i : i + p, j : j + p].reshape(-1)
      for i in range(0, height, p)
      for j in range(0, width, p)
    ]
    vectors = np.stack(patches) @ params["patches"] + params["patches_bias"]
    rows.append(np.concatenate([params["class_token"][0], vectors]))
  want = np.stack(rows) + params["positions"]

  class Vectors(nn.Module):
    @nn.compact
    def __call__(self, x):
      return image_lib.vectors(self, model.arch, x)

  own = {k: params[k] for k in ("patches", "patches_bias", "class_token")}
  own["positions"] = params["positions"]
  found = Vectors().apply({"params": own}, image)
  np.testing.assert_allclose(found, want, atol=1e-5)


def test_padding_changes_no_image():
  """Rows that are no images take no slots and reach no statistics."""
  _, model = made("tight", tokens_per_group="sequence")
  params = vmoe.to_params(stored("tight")[0], model, "here")
  image = stored("tight")[1]
  mask = np.array([True, True, False, True, True, False])
  filled = np.where(mask[:, None, None, None], image, np.nan)
  logits, aux = compiled.apply(model, {"params": params}, filled, mask)
  alone, of_alone = compiled.apply(model, {"params": params}, image[mask])
  np.testing.assert_allclose(logits[mask], alone, atol=1e-6)
  for stats in (aux, of_alone):
    (count,) = [
      x.count_E for x in balancing.statistics(stats, model.sublayers).values()
    ]
    assert count.sum() == mask.sum() * 7 * 2


def test_vectors_before_the_classes():
  _, model = made("ample")
  params = vmoe.to_params(stored("ample")[0], model, "here")
  image = stored("ample")[1]
  vector, _ = compiled.apply(model, {"params": params}, image, classify=False)
  logits = vector @ params["head"] + params["head_bias"][None]
  np.testing.assert_allclose(logits, stored("ample")[2], atol=1e-5)


def test_equal_experts():
  for equal in (True, False):
    _, model = made("ample", equal_experts=equal)
    params = compiled.init(model, jax.random.key(0))["params"]
    experts = params["encoder"]["1"]["moe"]["experts"]
    for name in ("up", "down"):
      first, *others = experts[name][0]
      assert all(np.array_equal(first, x) for x in others) == equal


# Steps.

ROWS, SIZE = 16, 6


def images(channels=1):
  rng = np.random.default_rng(0)
  arrays = {
    split: (
      rng.integers(0, 256, (n, SIZE, SIZE, channels)).astype(np.uint8),
      rng.integers(0, 3, n).astype(np.int32),
    )
    for split, n in (("train", 64), ("validation", 21))
  }
  return prepared.Images(
    "random", (SIZE, SIZE, channels), ("a", "b", "c"), "0", arrays
  )


def config(accumulation=1, balanced=True):
  c = config_file.get_config("tiny")
  c.data.batch_size = ROWS
  c.eval.update(batch_size=8, batches_per_domain=None)
  c.model.update(dtype="float64", num_layers=1, pattern=("moe",), remat="none")
  c.model.update(dropout=0.1)
  moe = c.model.moe
  # Groups of two images, and slots for fewer tokens than come.
  moe.update(
    tokens_per_group="2 sequences", capacity_factor=0.7, capacity_multiple=1
  )
  c.task.augment = {"flip": True, "shift": 1, "area": (0.5, 1.0), "mixup": 0.4}
  c.optim.optimizer = {"name": "sgd"}
  c.optim.update(learning_rate=0.1, schedule="constant", warmup_steps=0)
  c.optim.clip_norm = None
  c.train.accumulation = accumulation
  if not balanced:
    moe.balancers = {}
    c.task.augment.mixup = 0.0  # It mixes images of a micro-batch.
  return c


@functools.cache
def stepped(sizes=None, accumulation=1, balanced=True):
  """(parameters, sums) after a step from the same start."""
  c = config(accumulation, balanced)
  augment = classify_images.augment_lib.Augmentation(**c.task.augment)
  task = classify_images.of_images(c, images(), (SIZE, SIZE), augment=augment)
  return pair_of_runs.stepped(c, lambda mesh: task, sizes)


@pytest.mark.long
@pytest.mark.parametrize("sizes", [(2, 1, 4, 1), (1, 2, 2, 2), (8, 1, 1, 1)])
def test_a_step_on_a_mesh_is_that_without(sizes):
  with jax.enable_x64(True):
    wanted, found = stepped(), stepped(sizes)
  assert_close(found, wanted)
  dropped = [x.dropped["capacity"].sum() for x in wanted[1]["stats"].values()]
  assert sum(dropped) > 0


@pytest.mark.long
def test_micro_batches_are_one_large_batch():
  with jax.enable_x64(True):
    (params, sums), (others, wanted) = (
      stepped(accumulation=n, balanced=False) for n in (2, 1)
    )
  for name in ("loss", "task"):
    assert_close(sums[name], wanted[name])
  assert_close(params, others)


# Impossible models.

IMPOSSIBLE = {
  "patch = 4 does not divide images of 9 x 6": {"image": {"patch": 4}},
  "needs model.image": {"image": {}},
  "model.vocab_size = 9 has no meaning in the model vision": {"vocab_size": 9},
  "model.encoder = .* has no meaning": {"encoder": {"num_layers": 1}},
  'model.image has no "pach"': {"image": {"pach": 4}},
  'model.image.pooling = "all"|pooling': {
    "image": {"patch": 3, "pooling": "all"}
  },
  "multiple of 4": {"image": {"patch": 3, "positions": "waves"}, "d_model": 26},
  "tokens_per_group = 20 is neither": {"moe": {"tokens_per_group": 20}},
}


@pytest.mark.parametrize("words", IMPOSSIBLE)
def test_impossible_models(words):
  s = vision_parity.setting("ample")
  section = vision_parity.section(s)
  changes = dict(IMPOSSIBLE[words])
  section["moe"] |= changes.pop("moe", {})
  section |= changes
  if "d_model" in changes:
    section |= {"num_heads": 2, "num_kv_heads": 2, "head_dim": 13}
  with pytest.raises(ConfigError, match=words):
    model = models.build(section, image_shape=s["shape"], num_classes=7)
    batches = {"rows": 6}
    models.check(model, lengths=model.lengths, batches=batches, mesh=None)
    models.variables(model)


def test_a_decoder_reads_no_images():
  section = vision_parity.section(vision_parity.setting("ample"))
  section |= {"name": "decoder"}
  with pytest.raises(ConfigError, match="set model.name = vision"):
    models.build(section, vocab_size=9)
