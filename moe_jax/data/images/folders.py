"""Folders of images by class, read as datasets of TFDS.

train/CLASS/anything.png       the training images of a class
validation/CLASS/anything.png  those of validation; may be left out
"""

import pathlib
import types
from collections.abc import Mapping, Sequence

import numpy as np

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_MOST = 2**16 - 1  # Of a pixel with 16 bits.
# {split: (file, number of its class) of every image}.
Files = Mapping[str, Sequence[tuple[pathlib.Path, int]]]


def find(
  folder: pathlib.Path, splits: Sequence[str]
) -> tuple[Files, list[str]]:
  """Returns the files of a folder, and the names of its classes.

  Args:
    folder: need not be there.
    splits: names of the splits that are looked for.

  Returns:
    {} and [] where it has no folder of the first split with folders in it.
  """
  there = [split for split in splits if (folder / split).is_dir()]
  if splits[0] not in there:
    return {}, []
  classes = sorted(
    {
      path.name
      for split in there
      for path in (folder / split).iterdir()
      if path.is_dir()
    }
  )
  found = {
    split: [
      (path, number)
      for number, name in enumerate(classes)
      for path in _images(folder / split / name)
    ]
    for split in there
  }
  return (found, classes) if classes else ({}, [])


def _images(folder):
  if not folder.is_dir():
    return []
  return sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES)


class Builder:
  """The part of a TFDS builder that reading takes.

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

  def as_data_source(self, split: str) -> "_Examples":
    """Returns the examples of a split."""
    return _Examples(self._files[split], self._names)


class _Examples:
  """Examples by number, whose images are read when they are asked for."""

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
  """Returns the pixels of a file, uint8 [H, W, 3], or [H, W, 1] of grey ones.

  They stand as the camera says, and of 16 bits the upper ones are kept.
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
