"""The accuracy of a linear classifier that has seen a few images' vectors.

V-MoE (2106.05974, 4.2) reports it for models that have seen other images. The vectors
of n images of every class, and the targets 1 and -1 of their classes, are fitted by
ridge regression. Its regularisation is the one of a grid that is best on every second
validation image, and the accuracy is that on the others; V-MoE's own code takes both
from the same images, and the best over several datasets.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from moe_jax.core.errors import ConfigError
from moe_jax.data.images.prepared import Images

# Times the largest eigenvalue of the Gram matrix.
_REGULARISATIONS = 2.0 ** np.arange(-30, 6)
_DRAWS = 5  # Choices of images, whose accuracies are averaged.


def accuracies(
  images: Images,
  scale,
  model,
  variables: Mapping,
  shots: Sequence[int],
  batch_size: int,
) -> dict[str, float]:
  """{"few_shot/N": accuracy} for N images of every class.

  Args:
    images: from `prepared.prepare`.
    scale: (uint8 images) -> what the model gets.
    model, variables: a `vision.Vision` and its weights.
    shots: numbers of images N.
    batch_size: images of a forward pass.

  Raises:
    ConfigError: a class has fewer images, or a model without such vectors.
  """
  pixels, labels = images.arrays["train"]
  counts = np.bincount(labels, minlength=len(images.classes))
  if counts.min() < max(shots):
    name = images.classes[counts.argmin()]
    raise ConfigError(
      f"--few_shot={max(shots)} needs as many training images of every class, and"
      f' "{name}" has {counts.min()}; lower it'
    )

  @jax.jit
  def vectors_of(batch, mask):
    return model.apply(variables, scale(batch), mask, classify=False)[0]

  vectors = functools.partial(_vectors, vectors_of, batch_size)
  of_others, wanted = images.arrays["validation"]
  others_NF, results = vectors(of_others), {n: [] for n in shots}
  for draw in range(_DRAWS):
    rng = np.random.default_rng(draw)
    order = [
      rng.permutation(np.flatnonzero(labels == c)) for c in range(len(counts))
    ]
    # The images of few shots are among those of many.
    chosen = np.stack([places[: max(shots)] for places in order], axis=1)
    found_NF = vectors(pixels, chosen.ravel())
    for n in shots:
      size = n * len(counts)
      own = found_NF[:size], labels[chosen[:n].ravel()]
      results[n].append(_accuracy(*own, others_NF, wanted, len(counts)))
  return {
    f"few_shot/{n}": float(np.mean(found)) for n, found in results.items()
  }


def _vectors(vectors_of, batch_size, pixels, numbers=None):
  """The vectors [N, F] of these images, or of all."""
  numbers = np.arange(len(pixels)) if numbers is None else numbers
  found = []
  for start in range(0, len(numbers), batch_size):
    some = numbers[start : start + batch_size]
    mask = np.arange(batch_size) < len(some)
    batch = np.zeros((batch_size, *pixels.shape[1:]), np.uint8)
    batch[: len(some)] = pixels[some]
    found.append(np.asarray(vectors_of(batch, mask))[: len(some)])
  return np.concatenate(found).astype(np.float64)


def _accuracy(x_NF, label_N, others_MF, wanted_M, num_classes):
  """The accuracy on the others of odd places; see the head of this file."""
  mean, std = x_NF.mean(0), x_NF.std(0) + 1e-6
  x_NF, others_MF = ((x - mean) / std for x in (x_NF, others_MF))
  target_NC = np.where(label_N[:, None] == np.arange(num_classes), 1.0, -1.0)
  bias_C = target_NC.mean(0)
  # The weights are combinations of the N vectors.
  values, basis_NN = np.linalg.eigh(x_NF @ x_NF.T)
  turned_NC = basis_NN.T @ (target_NC - bias_C)
  rows_MN = others_MF @ x_NF.T @ basis_NN
  most, found = -1.0, 0.0
  for factor in _REGULARISATIONS:
    shrunk = values.clip(0)[:, None] + factor * values.max()
    guess_M = (rows_MN @ (turned_NC / shrunk) + bias_C).argmax(1)
    right_M = guess_M == wanted_M
    if right_M[::2].mean() > most:  # The others have no part in the choice.
      most, found = right_M[::2].mean(), right_M[1::2].mean()
  return found
