"""Images: their cache, their order, their random changes, and what is refused."""

import itertools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import base
from moe_jax.core.errors import ConfigError
from moe_jax.data.datasets import captioned_glyphs, glyphs
from moe_jax.data.images import augment, batches, folders, prepared
from moe_jax.moe.types import Mean
from moe_jax.tasks import classify_images, denoise

FEATURES = prepared.Features("image", "label")
AS_THEY_ARE = prepared.Size(None, None)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def digits(cache):
  return prepared.prepare(
    "digits", features=FEATURES, size=AS_THEY_ARE, cache_dir=cache
  )


def folder_of(
  path, sizes=((6, 6),), classes=("cat", "dog"), each=24, mode="RGB"
):
  """A folder of images by class, whose pixels are their numbers."""
  rng = np.random.default_rng(0)
  for name in classes:
    (path / "train" / name).mkdir(parents=True)
    for i, size in zip(range(each), itertools.cycle(sizes)):
      shape = (*size, 3) if mode == "RGB" else size
      pixels = rng.integers(0, 256, shape).astype(np.uint8)
      Image.fromarray(pixels).save(path / "train" / name / f"{i:02}.png")
  return path


def of_folder(path, cache, size=AS_THEY_ARE):
  return prepared.prepare(
    "own", data_dir=path, features=FEATURES, size=size, cache_dir=cache
  )


def test_digits_are_those_of_scikit_learn(digits):
  from sklearn import datasets

  data = datasets.load_digits()
  images, labels = (
    np.concatenate([digits.arrays[split][i] for split in prepared.SPLITS])
    for i in range(2)
  )
  assert digits.shape == (8, 8, 1) and digits.classes == tuple("0123456789")
  assert (
    len(images) == 1797 and len(digits.arrays["validation"][0]) / 1797 > 0.03
  )
  wanted = (data.images * 255 // 16).astype(np.uint8)

  def in_order(x, y):
    rows = np.concatenate([x.reshape(len(x), -1), y[:, None]], axis=1)
    return rows[np.lexsort(rows.T)]

  np.testing.assert_array_equal(
    in_order(images, labels), in_order(wanted, data.target)
  )


def test_a_cache_is_used_again_and_mended(digits, cache, monkeypatch):
  def again():
    return prepared.prepare(
      "digits", features=FEATURES, size=AS_THEY_ARE, cache_dir=cache
    )

  with monkeypatch.context() as m:
    m.setattr(prepared, "_write", None)
    assert again() == digits
  pixels = digits.directory / "train.pixels"
  whole = pixels.read_bytes()
  for content in (whole[:-1], bytes([whole[0] ^ 1]) + whole[1:], b""):
    pixels.write_bytes(content)
    assert again().fingerprint == digits.fingerprint
    assert pixels.read_bytes() == whole
  # Its bytes are read once, and again only where a file is another.
  with monkeypatch.context() as m:
    m.setattr(prepared, "_fingerprint", None)
    assert again() == digits
    os.utime(pixels)
    with pytest.raises(TypeError):
      again()
  with pytest.raises(ConfigError, match="but 123 was asked for"):
    prepared.prepare(
      "digits",
      features=FEATURES,
      size=AS_THEY_ARE,
      cache_dir=cache,
      fingerprint="123",
    )


def test_folders_of_images(tmp_path):
  path = folder_of(tmp_path / "a")
  images = of_folder(path, tmp_path)
  assert images.classes == ("cat", "dog") and images.shape == (6, 6, 3)
  assert sum(len(x) for x, _ in images.arrays.values()) == 48
  # The second image of the first class, wherever it is.
  wanted = np.asarray(Image.open(path / "train" / "cat" / "01.png"))
  found = np.concatenate([x for x, _ in images.arrays.values()])
  assert (found == wanted).all((1, 2, 3)).sum() == 1
  # A split validation of its own is taken as it is.
  (path / "validation" / "dog").mkdir(parents=True)
  for file in sorted(path.glob("train/dog/1*")):
    file.rename(path / "validation" / "dog" / file.name)
  images = of_folder(path, tmp_path)
  labels = [np.bincount(y).tolist() for _, y in images.arrays.values()]
  assert labels == [[24, 14], [0, 10]]


def test_what_is_no_image_of_a_class(tmp_path, monkeypatch):
  """Hidden files are not read, and others are counted in a warning."""
  path, warnings = folder_of(tmp_path / "a"), []
  wanted = of_folder(path, tmp_path)
  monkeypatch.setattr(
    folders.logging, "warning", lambda text, *args: warnings.append(text % args)
  )
  for name in (".git", "__MACOSX/cat", "cat/__MACOSX"):
    (path / "train" / name).mkdir(parents=True)
    (path / "train" / name / "00.png").write_bytes(b"")
  (path / "train" / "cat" / "._00.png").write_bytes(b"")
  assert of_folder(path, tmp_path) == wanted and not warnings
  (path / "train" / "dog" / "more" / "most").mkdir(parents=True)
  for name in (
    "dog/more/0.png",
    "dog/more/most/0.png",
    "read.me",
    "dog/0.avif",
  ):
    (path / "train" / name).write_bytes(b"")
  assert of_folder(path, tmp_path) == wanted
  (warning,) = warnings
  assert f"Files of {path} that are left out: " in warning
  assert "3 not directly in the folder of a class" in warning
  assert "1 with none of the suffixes .bmp .gif" in warning


def test_a_classifier_needs_two_classes(tmp_path, monkeypatch):
  """A denoiser does not, and its cache of such images is no way around."""
  path = folder_of(tmp_path / "a", classes=("cat",), each=48)
  words = r"own has 1 classes \(cat\), and 2 are needed"
  with pytest.raises(ConfigError, match=words):
    of_folder(path, tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == ["a"]
  c = base.get_config()
  c.data.update(name="own", dir=str(path), cache_dir=str(tmp_path))
  task = denoise.build(c)
  assert task.given["num_classes"] == 1
  with pytest.raises(ConfigError, match=words):
    of_folder(path, tmp_path)


def test_images_of_several_sizes(tmp_path):
  path = folder_of(tmp_path / "a", sizes=((6, 6), (6, 8)), each=48)
  with pytest.raises(
    ConfigError,
    match=r"image 1 .*a/train/cat/01.png\) has .*\(6, 8, 3\).*set task.size",
  ):
    of_folder(path, tmp_path)
  images = of_folder(path, tmp_path, prepared.Size((4, 5), 1))
  assert images.shape == (4, 5, 1)
  grey = folder_of(tmp_path / "b", mode="L")
  assert of_folder(grey, tmp_path).shape == (6, 6, 1)
  (grey / "train" / "cat" / "00.png").unlink()
  Image.new("RGB", (6, 6)).save(grey / "train" / "cat" / "00.png")
  with pytest.raises(ConfigError, match="set task.size and task.channels"):
    of_folder(grey, tmp_path)
  assert not list(tmp_path.glob("own-*/*.scratch"))


def test_images_are_held_out_alike_at_any_size(tmp_path):
  """So that a run at another size begins with none of its validation images."""
  path, shares = folder_of(tmp_path / "a"), []
  for number, file in enumerate(sorted(path.glob("train/*/*"))):
    # An image of one brightness, which stays whatever its size is.
    Image.new("RGB", (6, 6), (5 * number,) * 3).save(file)
  for size in (AS_THEY_ARE, prepared.Size((3, 3), 1), prepared.Size((9, 9), 3)):
    images, _ = of_folder(path, tmp_path, size).arrays["validation"]
    shares.append(sorted(images[:, 0, 0, 0].tolist()))
  assert shares[0] and shares[0] == shares[1] == shares[2]


def test_kinds_of_files(tmp_path):
  """Grey of 16 bits, turned photographs, palettes; and what is refused."""
  read = {}
  deep = np.array([[0, 256, 65535], [512, 1024, 32768]], np.uint16)
  Image.fromarray(deep).save(tmp_path / "deep.png")
  read["deep"] = folders._read(tmp_path / "deep.png")
  np.testing.assert_array_equal(read["deep"][..., 0], deep >> 8)
  photo, exif = Image.new("RGB", (4, 2), (9, 8, 7)), Image.Exif()
  exif[0x0112] = 6  # It is to be turned by a quarter.
  photo.save(tmp_path / "photo.png", exif=exif)
  assert folders._read(tmp_path / "photo.png").shape == (4, 2, 3)
  photo.convert("P").save(tmp_path / "palette.gif")
  assert folders._read(tmp_path / "palette.gif").shape == (2, 4, 3)
  Image.fromarray(np.full((2, 2), 0.5, np.float32)).save(tmp_path / "f.tiff")
  with pytest.raises(ValueError, match="f.tiff is no whole image: its numbers"):
    folders._read(tmp_path / "f.tiff")


def test_numbers_that_are_no_bytes(tmp_path, monkeypatch):
  path = folder_of(tmp_path / "a")
  monkeypatch.setattr(
    folders, "_read", lambda _: np.zeros((6, 6, 3), np.uint16)
  )
  with pytest.raises(
    ConfigError, match="has numbers of type uint16, and images"
  ):
    of_folder(path, tmp_path)


def test_a_smaller_image_is_smooth(tmp_path):
  """Pillow averages: a fine checkerboard becomes grey."""
  board = (np.indices((8, 8)).sum(0) % 2 * 255).astype(np.uint8)
  small = prepared._sized(board[..., None], prepared.Size((2, 2), 3))
  assert small.shape == (2, 2, 3) and np.abs(small.astype(int) - 127).max() < 20


def test_the_middle_of_an_image():
  """The largest part with the proportions that are wanted, and a share of it."""
  image = np.zeros((20, 60, 3), np.uint8)
  image[:, 20:40] = 200  # Black, grey, black.
  image[:2], image[-2:] = 100, 100
  squeezed, whole, share = (
    prepared._sized(image, prepared.Size((20, 20), 3, crop)).astype(int)
    for crop in (None, 1.0, 0.8)
  )
  assert squeezed[10, 1, 0] < 10 and squeezed[10, 10, 0] > 190
  np.testing.assert_array_equal(whole, image[:, 20:40])
  # Of 20 rows and columns 16 are there, without those of 100 and of 0.
  assert abs(share - 200).max() < 10


def damaged(path):
  (path / "train" / "dog" / "03.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")


def cut(path):
  file = path / "train" / "dog" / "03.png"
  file.write_bytes(file.read_bytes()[:60])


def empty(path):
  for file in path.glob("train/*/*"):
    file.unlink()


def few(path):
  for file in path.glob("train/*/*"):
    if file.name != "00.png":
      file.unlink()


def no_dogs(path):
  for file in path.glob("train/dog/*"):
    file.rename(file.with_suffix(".avif"))


def only_in_validation(path):
  (path / "validation").mkdir()
  (path / "train" / "dog").rename(path / "validation" / "dog")


def an_empty_class(path):
  (path / "train" / "bird").mkdir()


def no_classes(path):
  for file in path.glob("train/*/*"):
    file.rename(path / "train" / f"{file.parent.name}{file.name}")
  for name in ("cat", "dog"):
    (path / "train" / name).rmdir()


@pytest.mark.parametrize(
  "change, words",
  [
    (
      damaged,
      "split train of dataset own cannot be read.*dog/03.png is no whole",
    ),
    (cut, "dog/03.png is no whole image"),
    (
      empty,
      "2 of 2 classes have no images in .*a/train, such as cat; put some",
    ),
    (no_dogs, "1 of 2 classes have no images in .*a/train, such as dog; put"),
    (only_in_validation, "1 of 2 classes have no images .* such as dog; put"),
    (an_empty_class, "1 of 3 classes have no images .* such as bird; put some"),
    (few, "too few images to hold some out"),
    (no_classes, "folders of images train/CLASS"),
  ],
)
def test_folders_that_are_refused(tmp_path, change, words):
  path = folder_of(tmp_path / "a")
  change(path)
  with pytest.raises(ConfigError, match=words):
    of_folder(path, tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_labels_and_features_that_are_refused(tmp_path, monkeypatch):
  path = folder_of(tmp_path / "a")
  with monkeypatch.context() as m:
    read = folders.find

    def shifted(*args):
      files, classes = read(*args)
      return {k: [(p, n + 1) for p, n in x] for k, x in files.items()}, classes

    m.setattr(folders, "find", shifted)
    with pytest.raises(
      ConfigError, match="label 2, which is not one of its 2 cl"
    ):
      of_folder(path, tmp_path)
  for name, words in (
    ("caption", "no images under"),
    ("label", "no images under"),
  ):
    with pytest.raises(ConfigError, match=words):
      prepared.prepare(
        "digits",
        features=prepared.Features(name, "label"),
        size=AS_THEY_ARE,
        cache_dir=tmp_path,
      )
  builder = folders.Builder({"train": []}, ["a"], "image", "label")
  with pytest.raises(
    ConfigError, match='no class labels under the name "text"'
  ):
    FEATURES._replace(label="text").check("x", builder)


def test_an_epoch_is_every_image_once(digits):
  size = len(digits.arrays["train"][0])
  stream = batches.train_batches(digits, 3, batch_size=size)
  for epoch in (0, 1):
    pixels = stream[epoch]["image"].reshape(size, -1)
    wanted = digits.arrays["train"][0].reshape(size, -1)
    np.testing.assert_array_equal(
      pixels[np.lexsort(pixels.T)], wanted[np.lexsort(wanted.T)]
    )
  assert (stream[0]["image"] != stream[1]["image"]).any()


def test_a_batch_depends_on_its_step_alone(digits):
  whole = batches.train_batches(digits, 3, batch_size=12, accumulation=3)[7]
  assert whole["image"].shape == (3, 4, 8, 8, 1) and whole["mask"].all()
  rows = batches.train_batches(
    digits, 3, np.array([1, 2]), batch_size=12, accumulation=3
  )[7]
  for name, array in whole.items():
    np.testing.assert_array_equal(rows[name], array[:, 1:3])
  flat = batches.train_batches(digits, 3, batch_size=12)[7]
  np.testing.assert_array_equal(flat["label"], whole["label"].ravel())
  other = batches.train_batches(digits, 4, batch_size=12)[7]
  assert (other["label"] != flat["label"]).any()


def test_validation_is_every_image_once(digits):
  pixels, labels = digits.arrays["validation"]
  found = [b for _, b in batches.validation_batches(digits, batch_size=25)]
  mask = np.concatenate([b["mask"] for b in found])
  assert mask.sum() == len(labels) and len(mask) == 25 * len(found)
  for name, wanted in (("image", pixels), ("label", labels)):
    joined = np.concatenate([b[name] for b in found])
    np.testing.assert_array_equal(joined[mask], wanted)
  some = batches.validation_batches(digits, batch_size=4, batches_per_domain=2)
  assert len([*some]) == 2


# Changes of images.

SIZE = (6, 6)


def change(how, x, key=0, size=SIZE):
  args = x, size, jnp.float32, jax.random.key(key), 0
  return np.asarray(augment.changed(augment.Augmentation(**how), *args))


def pixels(n=4, channels=3, size=SIZE):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (n, *size, channels)).astype(np.uint8)


def test_numbers_of_bytes():
  x = augment.scaled(pixels(), SIZE, jnp.float32)
  np.testing.assert_allclose(x, pixels() / 127.5 - 1, atol=1e-6)
  np.testing.assert_allclose(change({}, pixels()), x, atol=1e-6)
  assert augment.scaled(pixels(), (3, 12), jnp.float32).shape == (4, 3, 12, 3)


def test_changes_by_the_place_in_the_step():
  """A row changes as it does in a batch that begins elsewhere."""
  how = augment.Augmentation(
    flip=True, shift=2, area=(0.3, 0.9), brightness=0.2
  )
  args = SIZE, jnp.float32, jax.random.key(5)
  whole = augment.changed(how, pixels(), *args, 0)
  part = augment.changed(how, pixels()[2:], *args, 2)
  np.testing.assert_array_equal(whole[2:], part)
  assert (
    np.asarray(augment.changed(how, pixels()[2:], *args, 0)) != part
  ).any()


def test_flips():
  x = pixels(64)
  found = change({"flip": True}, x)
  plain, mirrored = (y / 127.5 - 1 for y in (x, x[:, :, ::-1]))
  same, other = (
    np.abs(found - y).max((1, 2, 3)) < 1e-5 for y in (plain, mirrored)
  )
  assert (same ^ other).all() and 16 < other.sum() < 48


def test_shifts():
  """Every place within two pixels, with -1 (black) behind."""
  x = np.zeros((200, *SIZE, 1), np.uint8)
  x[:, 2, 3] = 255
  found = change({"shift": 2}, x)[..., 0]
  places = {tuple(np.argwhere(one == 1)[0] - (2, 3)) for one in found}
  assert places == set(itertools.product(range(-2, 3), repeat=2))


def test_parts():
  """A part of a ramp is a ramp that is less steep, by the share of its side."""
  ramp = np.tile(
    np.arange(16, dtype=np.uint8)[:, None, None] * 16, (200, 1, 16, 1)
  )
  found = change({"area": (0.25, 0.25)}, ramp, size=(16, 16))[..., 0]
  steps = np.diff((found[:, 3:-3, 8] + 1) * 127.5, axis=1)
  share = steps.mean(1) / 16
  ratio = 0.5 * np.sqrt([3 / 4, 4 / 3])
  assert ratio[0] - 0.03 < share.min() < share.max() < ratio[1] + 0.03
  assert share.std() > 0.02
  np.testing.assert_allclose(
    change({"area": (1.0, 1.0)}, pixels()), change({}, pixels()), atol=1e-4
  )
  # Stored images are larger than what the model gets.
  assert change({}, pixels(size=(9, 9))).shape == (4, *SIZE, 3)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colours(name):
  x = pixels(8)
  found, plain = change({name: 0.4}, x), x / 127.5 - 1
  assert (np.abs(found - plain).max((1, 2, 3)) > 1e-2).sum() > 5
  assert np.abs(found).max() <= 1
  grey = np.full((3, *SIZE, 3), 90, np.uint8)
  if name != "brightness":  # Grey has neither contrast nor colour.
    np.testing.assert_allclose(
      change({name: 0.4}, grey), grey / 127.5 - 1, atol=1e-5
    )


def test_mixtures_are_shares_of_two():
  how = augment.Augmentation(mixup=0.5)
  x, target = pixels(32).astype(np.float32), np.eye(32, dtype=np.float32)
  mixed, targets = augment.mixed(how, x, target, jax.random.key(0), 0)
  share = np.diag(targets)
  assert (share >= 0.5).all() and share.std() > 0.05
  np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
  s = share[:, None, None, None]
  wanted = s * x + (1 - s) * np.roll(x, -1, axis=0)
  np.testing.assert_allclose(mixed, wanted, rtol=1e-5)
  same, _ = augment.mixed(
    augment.Augmentation(), x, target, jax.random.key(0), 0
  )
  np.testing.assert_array_equal(same, x)


def test_impossible_changes():
  with pytest.raises(ConfigError, match="change the order"):
    augment.Augmentation(area=(0.9, 0.2))
  with pytest.raises(ConfigError, match="needs images with 3 channels"):
    augment.Augmentation(saturation=0.2).check(1)


# Losses.


class Fixed:
  """A model whose logits are given."""

  class arch:  # noqa: N801
    dtype = "float32"

  def __init__(self, logits):
    self.logits = jnp.asarray(logits)

  def apply(self, variables, x, mask, rng, **options):
    return self.logits[: len(x)], {}


def scored(logits, label, mask, train=False, **options):
  task = classify_images.scoring((6, 6, 1), SIZE, logits.shape[1], **options)
  batch = {"image": pixels(len(label), 1), "label": label, "mask": mask}
  rng = jax.random.key(0) if train else None
  loss, sums, _ = task.loss(Fixed(logits), {}, batch, rng, 0, train)
  return loss, task.metrics(loss, sums)


def test_losses_and_accuracies():
  rng = np.random.default_rng(0)
  logits, label = rng.normal(size=(9, 7)), rng.integers(0, 7, 9)
  mask = np.arange(9) != 4
  shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  chance = 1 / (1 + np.exp(-logits))
  hot = np.eye(7)[label]
  smooth = 0.9 * hot + 0.1 / 7
  wanted = {
    "softmax": lambda t: -(t * np.log(shares)).sum(1),
    "sigmoid": lambda t: (
      -(t * np.log(chance) + (1 - t) * np.log(1 - chance)).sum(1)
    ),
  }
  for name, of in wanted.items():
    loss, metrics = scored(logits, label, mask, loss=name, label_smoothing=0.1)
    assert isinstance(loss, Mean) and float(loss.weight) == 8
    assert float(loss.total) == pytest.approx(of(hot)[mask].sum(), rel=1e-5)
    loss, _ = scored(logits, label, mask, True, loss=name, label_smoothing=0.1)
    assert float(loss.total) == pytest.approx(of(smooth)[mask].sum(), rel=1e-5)
  order = np.argsort(-logits, axis=1)
  for n, name in ((1, "accuracy"), (5, "accuracy_5")):
    right = (order[:, :n] == label[:, None]).any(1)[mask].sum()
    assert float(metrics[name].total) == right


def test_equal_logits_are_not_right():
  _, metrics = scored(np.zeros((7, 7)), np.arange(7), np.ones(7, bool))
  assert float(metrics["accuracy"].total) == 1
  assert float(metrics["accuracy_5"].total) == 5


def test_a_model_that_diverged_is_right_nowhere():
  logits = np.full((7, 7), np.nan)
  _, metrics = scored(logits, np.arange(7), np.ones(7, bool))
  assert float(metrics["accuracy"].total) == 0
  assert float(metrics["accuracy_5"].total) == 0


# Drawn images.


def test_drawn_images():
  import matplotlib

  folder = f"{matplotlib.get_data_path()}/fonts/ttf"
  fonts = [f"{folder}/{font}.ttf" for font in glyphs._FONTS]
  first, again = (
    glyphs.draw(np.random.default_rng(3), fonts) for _ in range(2)
  )
  np.testing.assert_array_equal(first["image"], again["image"])
  examples = [glyphs.draw(np.random.default_rng(i), fonts) for i in range(60)]
  captions = [x["caption"].split() for x in examples]
  for x, words in zip(examples, captions):
    assert (
      x["image"].shape == glyphs.Glyphs.SHAPE and x["image"].dtype == np.uint8
    )
    colour, character, other, shape = words[1], words[2], words[-2], words[-1]
    assert glyphs.CLASSES[x["label"]] == character and colour != other
    assert {colour, other} <= glyphs.COLOURS.keys() and shape in glyphs.SHAPES
  assert len({x["label"] for x in examples}) > 20
  json.dumps(glyphs.Glyphs.sources())


def test_the_character_has_its_colour():
  """Where it stands and in which colour, as the caption says, in most images."""
  import matplotlib

  folder = f"{matplotlib.get_data_path()}/fonts/ttf"
  fonts, near = [f"{folder}/{font}.ttf" for font in glyphs._FONTS], []
  for i in range(60):
    x = glyphs.draw(np.random.default_rng(i), fonts)
    words = x["caption"].split()
    dx, dy = glyphs.SIDES[words[3]]
    rows = {-1: slice(0, 16), 1: slice(16, 32), 0: slice(0, 32)}
    part = x["image"][rows[dy], rows[dx]].astype(int)
    distance = np.abs(part - np.array(glyphs.COLOURS[words[1]])).max(-1)
    near.append((distance < 70).sum())
  assert np.mean(np.array(near) >= 4) > 0.9


def test_codes_of_images_and_captions():
  """144 codes of pixels, which are not text, and then a caption that is."""
  import matplotlib

  folder = f"{matplotlib.get_data_path()}/fonts/ttf"
  fonts = [f"{folder}/{font}.ttf" for font in glyphs._FONTS]
  x = glyphs.draw(np.random.default_rng(3), fonts)
  text = captioned_glyphs._document(x)["text"]
  codes, caption = np.frombuffer(text[:144], np.uint8), text[144:]
  assert codes.min() >= captioned_glyphs.FIRST and caption.isascii()
  assert caption.decode() == x["caption"]
  small = Image.fromarray(x["image"]).resize((12, 12), Image.Resampling.BOX)
  shown = captioned_glyphs.pixels_of(codes).astype(int)
  # Half of the steps of 2, 3 and 2 bits.
  assert (np.abs(shown - np.asarray(small)) <= (32, 16, 32)).all()
  assert len(np.unique(shown.reshape(-1, 3), axis=0)) > 4


def test_captions_are_english():
  import matplotlib

  folder = f"{matplotlib.get_data_path()}/fonts/ttf"
  fonts = [f"{folder}/{font}.ttf" for font in glyphs._FONTS]
  captions = [
    glyphs.draw(np.random.default_rng(i), fonts)["caption"] for i in range(40)
  ]
  assert any("an orange" in caption for caption in captions)
  assert not any("a orange" in caption for caption in captions)
