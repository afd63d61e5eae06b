"""Parameters under other names, with an array for every layer, and ours."""

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from moe_jax import models
from moe_jax.core.errors import ConfigError

# (name there, path here, number of the repeat; None outside of layers).
Name = tuple[str, str, int | None]


def names(
  segments, outside: Mapping[str, str], of_layer: Callable
) -> Iterable[Name]:
  """Yields the names of all parameters.

  Args:
    segments: of a `stack.Stack`.
    outside: {name there: path here} outside of the layers.
    of_layer: (number, kind) -> the same inside of a layer, whose path comes
      before.
  """
  for theirs, ours in outside.items():
    yield theirs, ours, None
  for segment, pattern, repeats, first in segments:
    for place, kind in enumerate(pattern):
      for repeat in range(repeats):
        number = first + place + repeat * len(pattern)
        for theirs, ours in of_layer(number, kind).items():
          yield theirs, f"{segment}/{place}/{ours}", repeat


def nested(
  arrays: Mapping[str, np.ndarray],
  of: Iterable[Name],
  here: Callable,
  model: nn.Module,
  where: str,
  free: Collection[str] = (),
) -> dict:
  """Returns parameters as a model has them.

  Args:
    arrays: by their names there.
    of: see `names`; the model need not have all of them.
    here: (array, path here) -> the array in its shape here.
    model: that is to have them.
    where: they come from, for messages.
    free: paths here whose arrays may have another shape.

  Raises:
    ConfigError: an array has no place in the model or another shape, or the
      model lacks one.
  """
  found, flat = placed(arrays, of, here, model, where, free), {}
  for ours in dict.fromkeys(path for path, _ in found):
    repeats = [array for (path, _), array in found.items() if path == ours]
    flat[ours] = repeats[0] if (ours, None) in found else np.stack(repeats)
  return traverse_util.unflatten_dict(flat, sep="/")


def placed(arrays, of, here, model, where, free=()) -> dict:
  """Returns {(path here, number of the repeat): array}, checked.

  Args:
    arrays, of, here, model, where, free: as in `nested`.

  Raises:
    ConfigError: as in `nested`.
  """
  of = [*of]
  known = {theirs for theirs, _, _ in of}
  left = sorted(arrays.keys() - known)
  wanted = nn.unbox(models.variables(model))["params"]
  wanted = traverse_util.flatten_dict(wanted, sep="/")
  if left:
    raise ConfigError(
      f"{where} has {len(left)} parameters that the model has no place for:"
      f" {', '.join(left[:3])}; change model.num_layers, prefix and pattern"
      " to those of its config"
    )
  lacking = [
    name for name, ours, _ in of if ours in wanted and name not in arrays
  ]
  lacking += sorted(wanted.keys() - {ours for _, ours, _ in of})
  if lacking:
    raise ConfigError(
      f"{where} lacks {len(lacking)} parameters that the model has:"
      f" {', '.join(lacking[:3])}; fetch all of its files, or give the config of them"
    )
  return {
    (ours, repeat): _fitting(
      *(arrays[theirs], theirs, ours, repeat, here),
      *(None if ours in free else wanted.get(ours), where),
    )
    for theirs, ours, repeat in of
    if theirs in arrays
  }


def _fitting(array, theirs, ours, repeat, here, wanted, where):
  """An array in its shape here; raises ConfigError if it is not the model's."""
  if not jnp.issubdtype(array.dtype, jnp.floating):
    raise ConfigError(
      f"{where} has {theirs} of {array.dtype}, and a weight is a fraction; give the"
      " weights as they were published"
    )
  shape = None
  if wanted is not None:
    shape = wanted.shape[repeat is not None :]
  with contextlib.suppress(ValueError):  # Arrays of other sizes raise.
    made = here(np.asarray(array), ours)
    if shape in (None, made.shape):
      return made
  raise ConfigError(
    f"{where} has {theirs} of shape {tuple(array.shape)}, from which the model's {ours}"
    f" of shape {tuple(shape or ())} cannot be made; give the config of these weights"
  )


def flat(params: Mapping, of: Iterable[Name], there: Callable) -> dict:
  """Returns {name there: array} of nested parameters.

  Args:
    params: of a model.
    of: see `names`; parameters of a path may be missing.
    there: (array, path here) -> the array in its shape there.
  """
  own, arrays = traverse_util.flatten_dict(dict(params), sep="/"), {}
  for theirs, ours, repeat in of:
    if ours in own:
      array = own[ours] if repeat is None else own[ours][repeat]
      arrays[theirs] = there(np.asarray(array), ours)
  return arrays
