"""Handwritten digits: 1,797 images of 8 x 8 pixels, in the extra `data`.

They are the test images of UCI's "Optical Recognition of Handwritten Digits" (CC BY
4.0), and are read from the installed package scikit-learn without importing it. They
are few and easy: good for a first run, and for no claim.
"""

import gzip

import numpy as np

from moe_jax.data.datasets import _builder, installed

_DISTRIBUTION = "scikit-learn"
_FILE = "sklearn/datasets/data/digits.csv.gz"


def build() -> type[_builder.Pictures]:
  """Returns the TFDS builder of this dataset."""
  return Digits


class Digits(_builder.Pictures):
  """Handwritten digits; a hash of each image decides whether it is held out."""

  SHAPE = (8, 8, 1)
  CLASSES = tuple("0123456789")

  @staticmethod
  def sources() -> dict[str, str]:
    """Returns {name: version} of the packages that have the images."""
    return {_DISTRIBUTION: installed(_DISTRIBUTION, "'moe_jax[data]'").version}

  def splits(self):
    """Returns {"train": pairs of a number and an example}."""
    return {"train": enumerate(_images())}


def _images():
  """Yields the images, in their order."""
  package = installed(_DISTRIBUTION, "'moe_jax[data]'")
  with gzip.open(package.locate_file(_FILE)) as file:
    rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
  for row in rows:
    # The darkness of a pixel is a number from 0 to 16.
    pixels = (row[:-1].astype(int) * 255 // 16).astype(np.uint8)
    yield {"image": pixels.reshape(8, 8, 1), "label": int(row[-1])}
