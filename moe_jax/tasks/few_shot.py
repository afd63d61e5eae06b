"""The accuracy of a linear classifier that has seen a few images' vectors.

V-MoE (2106.05974, 4.2) reports it for models that have seen other images. The
vectors of n images of every class, and the targets 1 and -1 of their classes,
are fitted by ridge regression. The regularisation is the best of a grid on
every second validation image, and the accuracy is that on the others; V-MoE's
own code takes both from the same images, and the best over several datasets.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from moe_jax.core.errors import ConfigError
from moe_jax.data.images.prepared import Images

# The grid, in units of the largest eigenvalue of the Gram matrix.
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
  """Returns {"few_shot/N": accuracy} for N images of every class.

  Args:
    images: from `prepared.prepare`.
    scale: uint8 images -> the model's images.
    model, variables: a `vision.Vision` and its weights.
    shots: numbers of images N.
    batch_size: images of a forward pass.

  Returns:
    The accuracies, and "few_shot_images", the number of images that they count.

  Raises:
    ConfigError: as in `check`; or a vector of the model contains NaN or
      infinity.
  """
  check(images, shots)
  pixels, labels = images.arrays["train"]
  num_classes = len(images.classes)

  @jax.jit
  def vectors_of(batch, mask):
    return model.apply(variables, scale(batch), mask, classify=False)[0]

  vectors = functools.partial(_vectors, vectors_of, batch_size)
  of_others, wanted = images.arrays["validation"]
  others_NF, results = vectors(of_others), {n: [] for n in shots}
  for draw in range(_DRAWS):
    rng = np.random.default_rng(draw)
    order = [
      rng.permutation(np.flatnonzero(labels == c)) for c in range(num_classes)
    ]
    # The images of few shots are among those of many.
    chosen = np.stack([places[: max(shots)] for places in order], axis=1)
    found_NF = vectors(pixels, chosen.ravel())
    for n in shots:
      size = n * num_classes
      own = found_NF[:size], labels[chosen[:n].ravel()]
      results[n].append(_accuracy(*own, others_NF, wanted, num_classes))
  means = {f"few_shot/{n}": float(np.mean(x)) for n, x in results.items()}
  return means | {"few_shot_images": float(len(wanted) // 2)}


def check(images: Images, shots: Sequence[int]) -> None:
  """Raises ConfigError if the data has too few images for `accuracies`.

  Commands call it before they evaluate anything.

  Args:
    images, shots: as in `accuracies`.
  """
  labels, others = (images.arrays[k][1] for k in ("train", "validation"))
  counts = np.bincount(labels, minlength=len(images.classes))
  if counts.min() < max(shots):
    name = images.classes[counts.argmin()]
    raise ConfigError(
      f"--few_shot={max(shots)} needs as many training images of every class, and"
      f' "{name}" has {counts.min()}; lower it'
    )
  if len(others) < 2:
    raise ConfigError(
      "--few_shot needs at least 2 validation images, since every second image"
      f" counts, and dataset {images.name} has {len(others)}; leave --few_shot out"
    )


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
  vectors_NF = np.concatenate(found).astype(np.float64)
  if not np.isfinite(vectors_NF).all():
    raise ConfigError(
      "--few_shot needs finite vectors, and the vectors of this model contain NaN or"
      " infinity; give weights from before the run diverged"
    )
  return vectors_NF


def _accuracy(x_NF, label_N, others_MF, wanted_M, num_classes):
  """The accuracy on the others of odd places; see the head of this file."""
  mean, std = x_NF.mean(0), x_NF.std(0) + 1e-6
  x_NF, others_MF = ((x - mean) / std for x in (x_NF, others_MF))
  target_NC = np.where(label_N[:, None] == np.arange(num_classes), 1.0, -1.0)
  bias_C = target_NC.mean(0)
  left_FR, values_R, right_RC = _ridge(x_NF, target_NC - bias_C)
  rows_MR, most, found = others_MF @ left_FR, -1.0, 0.0
  for factor in _REGULARISATIONS:
    shrunk_R = values_R + factor * (values_R.max() or 1)
    guess_M = (rows_MR @ (right_RC / shrunk_R[:, None]) + bias_C).argmax(1)
    right_M = guess_M == wanted_M
    if right_M[::2].mean() > most:  # Images at odd places have no part in it.
      most, found = right_M[::2].mean(), right_M[1::2].mean()
  return found


def _ridge(x_NF, target_NC):
  """(left, values, right): the weights [F, C] are left @ (right / (values + r)).

  The values are the eigenvalues of the Gram matrix of the features or of the vectors,
  whichever matrix is smaller, as in V-MoE's own code.
  """
  if len(x_NF) >= x_NF.shape[1]:
    values_F, basis_FF = np.linalg.eigh(x_NF.T @ x_NF)
    return basis_FF, values_F.clip(0), basis_FF.T @ (x_NF.T @ target_NC)
  values_N, basis_NN = np.linalg.eigh(x_NF @ x_NF.T)
  return x_NF.T @ basis_NN, values_N.clip(0), basis_NN.T @ target_NC
