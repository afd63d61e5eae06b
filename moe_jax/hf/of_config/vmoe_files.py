"""The files of a checkpoint of V-MoE's public code: arrays in parts, in msgpack.

PREFIX.index is a map with "shard_count" and a nested map "index", which has for each
array its shape, dtype, and in which file each part of it is. PREFIX.data-SSSSS-of-NNNNN
has the parts: {number of the array: [[pieces of the flat part], its slices], ...}. Arrays
are numbered in the order of their sorted paths. Of the extension types of msgpack
1 is an array, 6 the slices of all axes, and 8 an entry of the index.
"""

import pathlib
from collections.abc import Mapping

import msgpack
import numpy as np
from flax import traverse_util

from moe_jax.core.errors import ConfigError, first_line

_ARRAY, _SLICES, _ENTRY = 1, 6, 8
_CHUNKS = (
  "__msgpack_array_chunk_a87ca2__"  # Says that a map has parts of arrays.
)
_VERSION = "20220622"
_MOST_BYTES = 2**28  # The largest size of a piece.


def exists(prefix: str) -> bool:
  """Whether there is a checkpoint of this prefix."""
  return pathlib.Path(f"{prefix}.index").is_file()


def read(prefix: str) -> dict[str, np.ndarray]:
  """Returns the arrays of a checkpoint, by their paths.

  Raises:
    ConfigError: a file is missing or damaged.
  """
  try:
    return _read(prefix)
  except Exception as e:  # msgpack and NumPy raise many kinds.
    raise ConfigError(
      f"the checkpoint {prefix} cannot be read ({type(e).__name__}: {first_line(e)});"
      " fetch its files .index and .data-* again"
    ) from e


def _read(prefix):
  index = _unpacked(pathlib.Path(f"{prefix}.index"))
  if index.get("version") not in (None, _VERSION):
    raise ValueError(f"its version {index['version']} is not known")
  entries = dict(sorted(traverse_util.flatten_dict(index["index"]).items()))
  arrays = {path: np.zeros(*entry[:2]) for path, entry in entries.items()}
  filled = dict.fromkeys(arrays, 0)
  for shard in range(index["shard_count"]):
    parts = _unpacked(_shard(prefix, shard, index["shard_count"]))
    for number, (path, array) in enumerate(arrays.items()):
      for pieces, slices in parts.get(str(number), ()):
        part = array[slices]
        array[slices] = np.concatenate(pieces).reshape(part.shape)
        filled[path] += part.size
  for path, array in arrays.items():
    if filled[path] != array.size:
      raise ValueError(f"{'/'.join(path)} is not whole")
  return {"/".join(path): array for path, array in arrays.items()}


def write(prefix: str, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes arrays as a checkpoint of one file of parts.

  Args:
    prefix: of the files.
    arrays: by their paths.
  """
  pathlib.Path(prefix).parent.mkdir(parents=True, exist_ok=True)
  paths = sorted(tuple(name.split("/")) for name in arrays)
  entries, parts = {}, {_CHUNKS: True}
  for number, path in enumerate(paths):
    array = np.asarray(arrays["/".join(path)], order="C")
    ends = [msgpack.packb((0, n, None)) for n in array.shape]
    slices = _ext(_SLICES, ends)
    shaped = msgpack.packb((array.shape, array.dtype.name, False, {}))
    entries[path] = _ext(_ENTRY, (shaped, (slices.data,), (0,)))
    step = max(1, _MOST_BYTES // array.itemsize)
    flat = array.reshape(-1)
    pieces = [
      _packed_array(flat[i : i + step]) for i in range(0, flat.size, step)
    ]
    parts[str(number)] = [[pieces, slices]]
  index = {"shard_count": 1, "index": traverse_util.unflatten_dict(entries)}
  index["version"] = _VERSION
  _shard(prefix, 0, 1).write_bytes(msgpack.packb(parts))
  # The index comes last, because it says that there is a checkpoint.
  pathlib.Path(f"{prefix}.index").write_bytes(msgpack.packb(index))


def _shard(prefix, number, count):
  return pathlib.Path(f"{prefix}.data-{number:05d}-of-{count:05d}")


def _ext(code, value):
  return msgpack.ExtType(code, msgpack.packb(value))


def _packed_array(array):
  value = array.shape, array.dtype.name, array.tobytes()
  return _ext(_ARRAY, value)


def _unpacked(path):
  # Maps of parts, and those of an index, have strings as keys.
  return msgpack.unpackb(
    path.read_bytes(), ext_hook=_unpack, strict_map_key=False
  )


def _unpack(code, data):
  """The value of an extension type."""
  if code == _ARRAY:
    shape, dtype, content = msgpack.unpackb(data)
    return np.frombuffer(content, _dtype(dtype)).reshape(shape)
  if code == _SLICES:
    return _slices(data)
  if code == _ENTRY:
    shaped, _, _ = msgpack.unpackb(data, raw=True)
    shape, dtype, _, _ = msgpack.unpackb(shaped, raw=False)
    return tuple(shape), _dtype(dtype)
  raise ValueError(f"it has the unknown extension type {code}")


def _slices(data):
  ends = (msgpack.unpackb(one) for one in msgpack.unpackb(data, raw=True))
  return tuple(slice(*one) for one in ends)


def _dtype(name):
  import ml_dtypes

  own = {"bfloat16": ml_dtypes.bfloat16}
  return np.dtype(own.get(name, name))
