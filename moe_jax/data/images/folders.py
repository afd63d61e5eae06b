"""Folders of images by class, read as datasets of TFDS.

train/CLASS/anything.png       the training images of a class
validation/CLASS/anything.png  its validation images; may be left out

Hidden files and folders, and the folder __MACOSX of archives, are not read.
"""

import collections
import pathlib
import types
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging

from moe_jax.core.errors import ConfigError

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_MOST = 2**16 - 1  # The largest value of a pixel with 16 bits.
# {split: (file, index of its class) of every image}.
Files = Mapping[str, Sequence[tuple[pathlib.Path, int]]]


def find(
  folder: pathlib.Path, splits: Sequence[str]
) -> tuple[Files, list[str]]:
  """Returns the files of a folder, and the names of its classes.

  Args:
    folder: a path, whether it is there or not.
    splits: names of the splits that are looked for.

  Returns:
    {} and [] where it has no folder of the first split with folders in it.

  Raises:
    ConfigError: a class has no images in the first split.
  """
  there = {split: folder / split for split in splits}
  there = {split: path for split, path in there.items() if path.is_dir()}
  inside = [path for own in there.values() for path in _shown(own)]
  classes = sorted({path.name for path in inside if path.is_dir()})
  if splits[0] not in there or not classes:
    return {}, []
  numbers = {name: number for number, name in enumerate(classes)}
  found, left_out = {split: [] for split in there}, collections.Counter()
  for split, own in there.items():
    for path in _files(own):
      if path.parent.parent != own:
        left_out["not directly in the folder of a class"] += 1
      elif path.suffix.lower() not in _SUFFIXES:
        left_out[f"with none of the suffixes {' '.join(_SUFFIXES)}"] += 1
      else:
        found[split].append((path, numbers[path.parent.name]))
  if left_out:
    reasons = ", ".join(f"{n} {why}" for why, n in left_out.items())
    logging.warning("Files of %s that are left out: %s", folder, reasons)
  trained = {number for _, number in found[splits[0]]}
  if lacking := [name for name in classes if numbers[name] not in trained]:
    raise ConfigError(
      f"{len(lacking)} of {len(classes)} classes have no images in {there[splits[0]]},"
      f" such as {lacking[0]}; put some into its folder there, or remove the class"
    )
  return found, classes


def _shown(folder):
  """The paths in a folder that are read, in order."""
  paths = sorted(folder.iterdir())
  return [p for p in paths if p.name[0] != "." and p.name != "__MACOSX"]


def _files(folder):
  """Yields the files in a folder at any depth."""
  for path in _shown(folder):
    if path.suffix.lower() not in _SUFFIXES and path.is_dir():
      yield from _files(path)
    else:
      yield path


class Builder:
  """The attributes of a TFDS builder that reading needs.

  info: with `features` and `splits`, as in TFDS.
  """

  def __init__(
    self, files: Files, classes: Sequence[str], image: str, label: str
  ):
    """Takes the results of `find`, and the names of the two features."""
    import tensorflow_datasets as tfds

    features = {
      image: tfds.features.Image(),
      label: tfds.features.ClassLabel(names=list(classes)),
    }
    splits = {
      split: types.SimpleNamespace(num_examples=len(found))
      for split, found in files.items()
    }
    self.info = types.SimpleNamespace(features=features, splits=splits)
    self._files, self._names = files, (image, label)

  def file(self, split: str, number: int) -> pathlib.Path:
    """Returns the file of an example.

    Args:
      split: "train" or "validation".
      number: index of the example in its split.
    """
    return self._files[split][number][0]

  def as_data_source(self, split: str) -> "_Examples":
    """Returns the examples of a split, by index."""
    return _Examples(self._files[split], self._names)


class _Examples:
  """Examples by index; an image is read when its example is asked for."""

  def __init__(self, files, names):
    self._files, self._names = files, names

  def __len__(self):
    return len(self._files)

  def __getitems__(self, numbers):
    return [
      dict(zip(self._names, (_read(path), label)))
      for path, label in (self._files[number] for number in numbers)
    ]


def _read(path):
  """Returns the pixels of a file, uint8 [H, W, 3], or [H, W, 1] of grey images.

  They are turned as the camera says; numbers of 16 bits keep their upper 8.
  """
  from PIL import Image, ImageOps

  try:
    with Image.open(path) as image:
      image = ImageOps.exif_transpose(image)
      if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > _MOST:
          raise ValueError(f"its numbers are not between 0 and {_MOST}")
        pixels = (pixels >> 8).astype(np.uint8)
      elif image.mode == "F":
        raise ValueError("its numbers are fractions; write it with bytes")
      else:
        kind = "L" if image.mode in ("1", "L", "LA") else "RGB"
        pixels = np.asarray(image.convert(kind))
  except Exception as e:  # Pillow raises many kinds.
    raise ValueError(f"{path} is no whole image: {e}") from e
  return pixels.reshape(*pixels.shape[:2], -1)
