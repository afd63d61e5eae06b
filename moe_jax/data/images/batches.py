"""Batches of images by step: a batch depends on the number of its step alone."""

from collections.abc import Iterator

import numpy as np

from moe_jax.data import batches
from moe_jax.data.images.prepared import Images

Batch = batches.Batch
DOMAIN = "images"  # All images are of one domain.


def train_batches(
  images: Images,
  seed: int,
  rows: np.ndarray | None = None,
  *,
  batch_size: int,
  accumulation: int | None = None,
) -> batches.ByStep:
  """Returns the training batches: every epoch is a new order of all images.

  Args:
    images: from `prepared.prepare`.
    seed, rows, batch_size, accumulation: as in `batches.train_batches`.

  Returns:
    Batches by step: `image` uint8 [B, H, W, channels], `label` int32 [B], `mask`
    bool [B], True; [A, B/A, ...] with accumulation.
  """
  import grain  # Slow to import: only where data is read.

  pixels, labels = images.arrays["train"]
  order = grain.MapDataset.range(len(labels)).seed(seed).shuffle().repeat()

  def read(places):
    numbers = np.array([order[place] for place in places.tolist()], int)
    return _batch(pixels, labels, numbers, len(numbers))

  return batches.by_step(read, batch_size, accumulation, rows)


def validation_batches(
  images: Images,
  rows: np.ndarray | None = None,
  *,
  batch_size: int,
  batches_per_domain: int | None = None,
) -> Iterator[tuple[str, Batch]]:
  """Returns every validation image once, always in the same order.

  Args:
    images, rows: as in `train_batches`.
    batch_size, batches_per_domain: as in `batches.validation_batches`.

  Returns:
    Pairs of `DOMAIN` and a batch as in `train_batches`, whose last rows may be
    padding, with `mask` False.
  """
  pixels, labels = images.arrays["validation"]
  chosen = batch_size, batches_per_domain, rows
  for domain, numbers, read in batches.validation_rows(
    {DOMAIN: len(labels)}, *chosen
  ):
    yield domain, _batch(pixels, labels, read, len(numbers))


def _batch(pixels, labels, numbers, size):
  """Returns the images of these indices, padded to `size` rows."""
  image = np.zeros((size, *pixels.shape[1:]), np.uint8)
  label, mask = np.zeros(size, np.int32), np.arange(size) < len(numbers)
  image[: len(numbers)], label[: len(numbers)] = (
    pixels[numbers],
    labels[numbers],
  )
  return {"image": image, "label": label, "mask": mask}
