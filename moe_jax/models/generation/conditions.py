"""The conditions of samples, from files of arrays and numbers of classes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.core.errors import ConfigError
from moe_jax.data.images import videos
from moe_jax.models.diffusion import Condition


class Given(NamedTuple):
  """The conditions of samples: classes, and paths of files of numpy.save.

  label: classes, which take turns; None: each class in turn.
  text: vectors of texts, fractions [..., M, T].
  text_mask: bool [..., M], False for vectors of padding.
  text_none, text_none_mask: the text that guidance leads away from, and its
    mask; None: zeros, with the mask of the text.
  more: further channels that the model reads, bytes or numbers from -1 to 1.
  """

  label: Sequence[int] | None = None
  text: str | None = None
  text_mask: str | None = None
  text_none: str | None = None
  text_none_mask: str | None = None
  more: str | None = None


def read(given: Given, arch, number: int):
  """Returns the conditions of samples.

  Args:
    given: names and files; their arrays are repeated as often as there are
      samples.
    arch: a `diffusion.Architecture`.
    number: samples.

  Returns:
    A Condition; the Condition that guidance leads away from, or None; and the
    further channels of the model, or None.

  Raises:
    ConfigError: a file cannot be read, or has another shape or numbers that are
      not finite; or a flag is given for an input that the model does not have.
  """
  _refuse(given, ("label",), arch.num_classes, "classes")
  texts = "text", "text_mask", "text_none", "text_none_mask"
  _refuse(given, texts, arch.text, "texts")
  _refuse(given, ("more",), arch.more_channels, "channels beside")
  condition = Condition(_labels(given.label, arch.num_classes, number))
  none = more = None
  if arch.text:

    def of_text(name, mask):
      text = _array(f"--{name}", getattr(given, name), arch.text, number)
      path = getattr(given, mask)
      shape = arch.text[:1]
      return text, path and _array(f"--{mask}", path, shape, number, bool)

    text, mask = of_text("text", "text_mask")
    condition = condition._replace(text_BMT=text, mask_BM=mask)
    if given.text_none:
      away, own = of_text("text_none", "text_none_mask")
      if (mask is None) != (own is None):  # The model takes both in one batch.
        every = np.ones((number, *arch.text[:1]), bool)
        mask, own = (every if x is None else x for x in (mask, own))
      condition = condition._replace(mask_BM=mask)
      none = condition.none._replace(text_BMT=away, mask_BM=own)
    elif given.text_none_mask:
      raise ConfigError("--text_none_mask is of --text_none; give both")
  if arch.more_channels:
    shape = (*arch.shape[:3], arch.more_channels)
    more = np.asarray(
      videos.numbers(_array("--more", given.more, shape, number))
    )
  return condition, none, more


def _labels(label, num_classes, number):
  if not num_classes:
    return None
  for one in label or ():
    if one >= num_classes:
      raise ConfigError(
        f"--label={one} is not below the {num_classes} classes of the run"
      )
  return np.resize(np.array([*(label or range(num_classes))], np.int32), number)


def _refuse(given, names, there, what):
  """Raises ConfigError for flags of inputs that a model does not have."""
  for name in names:
    if getattr(given, name) is not None and not there:
      raise ConfigError(
        f"--{name} is of {what}, and this model has none; leave it out"
      )


def _array(flag, path, shape, number, dtype=float):
  """The array of a file, repeated as often as there are samples."""
  words = f"[..., {', '.join(map(str, shape))}]"
  if path is None:
    raise ConfigError(f"the model needs {flag}=FILE.npy with an array {words}")
  try:
    array = np.load(path, allow_pickle=False)
  except (OSError, ValueError, EOFError) as e:
    raise ConfigError(
      f"{flag}={path} is no array of numbers that can be read; write it with numpy.save"
    ) from e
  if not isinstance(array, np.ndarray):
    raise ConfigError(
      f"{flag}={path} has several arrays; write one with numpy.save"
    )
  if array.shape[-len(shape) :] != tuple(shape) or not array.size:
    raise ConfigError(
      f"{flag}={path} has the shape {array.shape}, and the model needs {words}"
    )
  _check_numbers(flag, path, array, dtype)
  return np.resize(array.reshape(-1, *shape), (number, *shape))


def _check_numbers(flag, path, array, dtype):
  """Raises ConfigError for an array of another type, or with NaN or infinity."""
  kind, words = np.floating, "fractions (float32)"
  if dtype is bool:
    kind, words = np.bool_, "true or false (bool)"
  of_pixels = flag == "--more" and array.dtype == np.uint8
  if not (np.issubdtype(array.dtype, kind) or of_pixels):
    raise ConfigError(
      f"{flag}={path} has {array.dtype}, and not {words}; write it as that"
    )
  if not np.isfinite(array).all():
    raise ConfigError(f"{flag}={path} has numbers that are not finite; mend it")
