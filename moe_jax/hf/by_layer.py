"""Parameters under other names, one array for every layer, and nested ones here."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
from flax import traverse_util

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
    of_layer: (number, kind) -> the same inside of a layer, after its place here.
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
  where: str,
) -> dict:
  """Parameters as a model has them.

  Args:
    arrays: by their names there.
    of: see `names`; a name need not be there.
    here: (array, path here) -> the array in its shape here.
    where: they come from, for messages.

  Raises:
    ConfigError: an array has no place in the model.
  """
  left, found = dict(arrays), {}
  for theirs, ours, repeat in of:
    if theirs in left:
      found[ours, repeat] = here(np.asarray(left.pop(theirs)), ours)
  if left:
    raise ConfigError(
      f"{where} has {len(left)} parameters that the model has no place for:"
      f" {', '.join(sorted(left)[:3])}; change model.num_layers, prefix and pattern"
      " to those of its config"
    )
  flat = {}
  for ours in dict.fromkeys(path for path, _ in found):
    repeats = [array for (path, _), array in found.items() if path == ours]
    flat[ours] = repeats[0] if (ours, None) in found else np.stack(repeats)
  return traverse_util.unflatten_dict(flat, sep="/")


def flat(params: Mapping, of: Iterable[Name], there: Callable) -> dict:
  """{name there: array} of nested parameters.

  Args:
    params: of a model.
    of: see `names`; a path need not be there.
    there: (array, path here) -> the array in its shape there.
  """
  own, arrays = traverse_util.flatten_dict(dict(params), sep="/"), {}
  for theirs, ours, repeat in of:
    if ours in own:
      array = own[ours] if repeat is None else own[ours][repeat]
      arrays[theirs] = there(np.asarray(array), ours)
  return arrays
