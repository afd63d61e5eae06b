"""Images of one size and their labels in memory-mapped files, made once.

A cache is a folder with two flat files for each split, of pixels and of labels, and
an index.json. See `data.caches`.
"""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import either, integer, items, number, optional
from moe_jax.data import caches, sources
from moe_jax.data.images import folders

SPLITS = sources.SPLITS

_FORMAT = 2  # Add one when the meaning of the files changes.


class Features(NamedTuple):
  """The features that are read: names of an image and of a label."""

  image: str
  label: str

  def check(self, name: str, builder) -> None:
    """Raises ConfigError for a dataset without images or labels of these names.

    Args:
      name: of the dataset, for the message.
      builder: of TFDS.
    """
    import tensorflow_datasets as tfds

    kinds = {
      "image": (tfds.features.Image, "images"),
      "label": (tfds.features.ClassLabel, "class labels"),
    }
    features = dict(builder.info.features.items())
    for key, (kind, what) in kinds.items():
      fitting = sorted(k for k, f in features.items() if isinstance(f, kind))
      own = getattr(self, key)
      if own not in fitting:
        others = ", ".join(fitting) or f"there are none, but {sorted(features)}"
        raise ConfigError(
          f'dataset {name} has no {what} under the name "{own}"; set task.{key} to a'
          f" feature with {what}: {others}"
        )
    sizes = {k: v.num_examples for k, v in builder.info.splits.items()}
    if sizes and not (sizes.get("train") and sizes.get("validation", 1)):
      raise ConfigError(
        f"dataset {name} has no images in the split train, or an empty split"
        f" validation: {sizes}; prepare a copy of it that has images there"
      )

  def plain(self, folder: pathlib.Path):
    """See `sources.Wanted`."""
    files, classes = folders.find(folder, SPLITS)
    paths = [path for found in files.values() for path, _ in found]
    return (
      (paths, lambda: folders.Builder(files, classes, *self)) if files else None
    )

  @property
  def words(self) -> str:
    """See `sources.Wanted`."""
    return "folders of images train/CLASS"


_PIXELS = integer(1)
# Pixels of each side of an image, or (height, width); None: images keep theirs.
SIZE = optional(either(_PIXELS, items((_PIXELS, _PIXELS))))
CHANNELS = optional(either(integer(1, 1), integer(3, 3)))
CROP = optional(number(0, 1, above=0))


def pair(size) -> tuple[int, int] | None:
  """Returns (height, width) of a value of `SIZE`."""
  return (size, size) if isinstance(size, int) else size and tuple(size)


class Size(NamedTuple):
  """The form that all images get.

  pixels: (height, width) that they are resized to; None: they already have one
    size.
  channels: 1 or 3; None: all have the same number.
  crop: the share that is kept of the largest part in the middle with the
    proportions of `pixels`; None: the whole image is squeezed into them.
  """

  pixels: tuple[int, int] | None
  channels: int | None
  crop: float | None = None


@dataclasses.dataclass(frozen=True)
class Images:
  """The images of a prepared dataset. Without `classes` there are none.

  name: of the dataset.
  shape: H, W and channels of every image.
  classes: names of the classes.
  fingerprint: sha256 of all pixels and labels.
  arrays: {split: (uint8 [N, H, W, channels], int32 [N])}, mapped from files.
  sources: {name: version} of everything that they were made from.
  directory: the cache's folder.
  """

  name: str
  shape: tuple[int, int, int]
  classes: tuple[str, ...] = ()
  fingerprint: str = ""
  arrays: Mapping[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(
    default_factory=dict, repr=False, compare=False
  )
  sources: Mapping = dataclasses.field(default_factory=dict)
  directory: pathlib.Path | None = None


def of_config(
  config,
  features: Features,
  size: Size,
  fingerprint: str | None,
  least_classes: int = 2,
) -> Images:
  """Returns the images that `config.data` names.

  Args:
    config: a whole config.
    features, size, fingerprint, least_classes: as in `prepare`.

  Raises:
    ConfigError: as in `prepare`.
  """
  return prepare(
    config.data.name,
    data_dir=config.data.dir,
    features=features,
    size=size,
    cache_dir=config.data.cache_dir,
    plugins=tuple(config.plugins),
    fingerprint=fingerprint,
    least_classes=least_classes,
  )


def prepare(
  name: str,
  *,
  data_dir: str | os.PathLike | None = None,
  features: Features,
  size: Size,
  cache_dir: str | os.PathLike | None = None,
  plugins: tuple[str, ...] = (),
  fingerprint: str | None = None,
  least_classes: int = 2,
) -> Images:
  """Returns the images of a dataset; makes their cache where there is none yet.

  Args:
    name: a dataset of `registry.names("datasets")`, or any that TFDS knows,
      such as "cifar10"; with `data_dir`, any word to call it by.
    data_dir: folder of a prepared TFDS dataset, or of images by class, see
      `folders`. It has a split `train`; images are held out of it by their hash
      if there is no split `validation`.
    features: the features that are read.
    size: of all images.
    cache_dir, plugins, fingerprint: as in `corpora.prepare`.
    least_classes: the least number of classes.

  Raises:
    ConfigError: there is no such dataset, folder, feature, split or content;
      images have several sizes; a label is no class; there are too few classes;
      a file is damaged; or there is no space.
  """
  if fingerprint is not None:
    folders = caches.entries(name, cache_dir)
    made = [*filter(None, (_open(folder, fingerprint) for folder in folders))]
    if made:
      sources.tell_changed(made, data_dir, features)
      return made[0]
  source = sources.find(name, data_dir, plugins, features)
  folder = caches.entry(name, cache_dir, [_FORMAT, source[0], features, size])

  def write(folder):
    _write(folder, name, source, features, size, least_classes)

  images = caches.get(name, folder, write, _open)
  _check_classes(name, images.classes, least_classes)
  if fingerprint not in (None, images.fingerprint):
    raise ConfigError(
      f"{name} has fingerprint {images.fingerprint}, but {fingerprint} was asked for"
      " and is not in data.cache_dir; install the versions that it was made from"
      " (run.json has them), or start a new run"
    )
  return images


def _open(folder, fingerprint=None):
  """Returns the `Images` of a cache folder; None if damaged or not wanted."""

  def made(index):
    if fingerprint not in (None, index.get("fingerprint")):
      return None
    arrays = _mapped(folder, index)
    caches.check_content(folder, index, lambda: _fingerprint(arrays))
    return Images(
      name=index["name"],
      shape=tuple(index["shape"]),
      classes=tuple(index["classes"]),
      fingerprint=index["fingerprint"],
      arrays=arrays,
      sources=index["sources"],
      directory=folder,
    )

  return caches.read(folder, _FORMAT, made)


def _mapped(folder, index):
  """Returns `Images.arrays` of a cache folder."""
  return {
    split: (
      np.memmap(
        folder / f"{split}.pixels", np.uint8, "r", shape=(n, *index["shape"])
      ),
      np.memmap(folder / f"{split}.labels", "<i4", "r", shape=(n,)),
    )
    for split, n in index["num_images"].items()
  }


def _fingerprint(arrays):
  digests = {
    split: [hashlib.sha256(np.ascontiguousarray(x)).hexdigest() for x in pair]
    for split, pair in arrays.items()
  }
  return caches.sha256(digests)


def _write(folder, name, source, features, size, least_classes):
  """Writes all files of a cache."""
  versions, prepared = source
  builder = prepared(folder)
  features.check(name, builder)
  classes = list(dict(builder.info.features.items())[features.label].names)
  _check_classes(name, classes, least_classes)
  counts, shape = dict.fromkeys(SPLITS, 0), None
  with contextlib.ExitStack() as stack:
    files = {
      (split, kind): stack.enter_context(
        (folder / f"{split}.{kind}").open("wb")
      )
      for split in SPLITS
      for kind in ("pixels", "labels")
    }
    for split, place, pixels, label in _read(name, builder, features, size):
      shape = shape or pixels.shape
      _check(pixels, label, shape, len(classes), place)
      files[split, "pixels"].write(pixels.tobytes())
      files[split, "labels"].write(np.int32(label).astype("<i4").tobytes())
      counts[split] += 1
  if not all(counts.values()):
    raise ConfigError(
      f"dataset {name} has too few images to hold some out: {counts}; use more, or"
      " give it a split validation"
    )
  index = {"format": _FORMAT, "name": name, "sources": versions, "shape": shape}
  index |= {"classes": classes, "num_images": counts}
  index["fingerprint"] = _fingerprint(_mapped(folder, index))
  caches.write_index(folder, index)


def _read(name, builder, features, size):
  """Yields (split, words for its place, pixels, label) of every image."""
  held_out = "validation" in builder.info.splits
  for split in SPLITS if held_out else ("train",):
    for index, example in enumerate(sources.examples(name, builder, split)):
      pixels = np.asarray(example[features.image])
      place = f"image {index} of the split {split} of dataset {name}"
      if isinstance(builder, folders.Builder):
        place += f" ({builder.file(split, index)})"
      if pixels.dtype != np.uint8:
        raise ConfigError(
          f"{place} has numbers of type {pixels.dtype}, and images are bytes (uint8);"
          " prepare a copy of the dataset with bytes"
        )
      # The stored pixels decide: the same images are held out at any size.
      own = split if held_out else sources.split_of(pixels.tobytes())
      yield own, place, _sized(pixels, size), int(example[features.label])


def _sized(pixels, size):
  """Returns an image with the pixels and channels of `size`."""
  from PIL import Image, ImageOps

  channels = size.channels or pixels.shape[2]
  is_whole = size.pixels is None or size.crop in (None, 1)
  same = (size.pixels or pixels.shape[:2], channels) == (
    pixels.shape[:2],
    pixels.shape[2],
  )
  if is_whole and same:
    return pixels
  image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
  image = image.convert("L" if channels == 1 else "RGB")
  # Where it makes an image smaller, Pillow smooths it first.
  if size.pixels is not None and size.crop is not None:
    how = {"method": Image.Resampling.BICUBIC, "bleed": (1 - size.crop) / 2}
    image = ImageOps.fit(image, size.pixels[::-1], **how)
  elif size.pixels is not None:
    image = image.resize(size.pixels[::-1], Image.Resampling.BICUBIC)
  pixels = np.asarray(image)
  return pixels.reshape(*pixels.shape[:2], channels)


def _check_classes(name, classes, least):
  """Raises ConfigError for a dataset with too few classes."""
  if len(classes) < least:
    raise ConfigError(
      f"dataset {name} has {len(classes)} classes ({', '.join(classes)}), and {least}"
      " are needed; add images of another class"
    )


def _check(pixels, label, shape, num_classes, place):
  if pixels.shape != shape:
    raise ConfigError(
      f"{place} has height, width and channels {pixels.shape}, and the first one has"
      f" {shape}; set task.size and task.channels, to which all are changed"
    )
  if not 0 <= label < num_classes:
    raise ConfigError(
      f"{place} has the label {label}, which is not one of its {num_classes} classes"
      f" 0 to {num_classes - 1}; leave it out, or mend the dataset"
    )
