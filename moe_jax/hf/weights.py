"""Tensors in safetensors files, and the parameters that they hold."""

import collections
import functools
import itertools
import logging
import math
import pathlib
import re
from collections.abc import Mapping

import jax
import numpy as np
from flax import traverse_util

from moe_jax.core import files
from moe_jax.core.errors import ConfigError, first_line

_FLOATS = ("F64", "F32", "F16", "BF16")
_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
# Buffers that a model computes, which older files hold, and an output layer
# that is the embedding.
_NEEDLESS = re.compile(
  r"rotary_emb\.(inv_freq|(cos|sin)_cached)|masked_bias|\blm_head\.weight"
  r"|embed_positions\.weights"
)
_ROWS = 4096  # Rows of a tensor that are compared at a time.


def check(
  wanted: Mapping,
  store: "Files",
  left_out: tuple[str, ...],
  copies: Mapping[str, str] = {},
) -> None:
  """Raises ConfigError unless the files have just these tensors.

  Args:
    wanted: the tensors, by name.
    store: the files.
    left_out: prefixes of tensors that belong to parts which are not here.
    copies: {tensor that may be there: the tensor whose numbers it has}.
  """
  names = store.slices.keys()
  left = sorted(name for name in names if name.startswith(left_out))
  if left:
    words = "%s: %d tensors are left out, of parts that are not here: %s"
    logging.warning(words, store.path, len(left), ", ".join(left[:3]))
  needless = {n for n in names if _NEEDLESS.search(n) or 0 in store.shape(n)}
  needless |= copies.keys()
  for what, which in (
    ("lacks", wanted.keys() - names),
    ("has unknown", names - wanted.keys() - needless - {*left}),
  ):
    if which:
      raise ConfigError(
        f"{store.path} {what} {len(which)} tensors, such as"
        f" {', '.join(sorted(which)[:5])}; is config.json that of these files?"
      )
  for name, tensor in wanted.items():
    shape, dtype = store.shape(name), store.slices[name].get_dtype()
    if shape != tensor.shape or dtype not in _FLOATS:
      raise ConfigError(
        f"{store.path / store.files[name]}: {name} has shape {[*shape]} and"
        f" dtype {dtype}, not shape {[*tensor.shape]} and one of {_FLOATS};"
        " convert it, or get the config.json of these files"
      )
  for copy in sorted(names & copies.keys()):
    if not store.same(copy, copies[copy]):
      raise ConfigError(
        f"{store.path / store.files[copy]}: {copy} has other numbers than"
        f" {copies[copy]}, and a model here has one embedding; make them the same"
      )


def read(wanted: Mapping, store: "Files", dtype: str, shardings: Mapping):
  """Returns all parameters, on their devices.

  Args:
    wanted: the tensors that hold them, by name.
    store: the files, after `check`.
    dtype: of parameters; balancers' states are float32.
    shardings: of the variables; {}: on one device.
  """
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shardings = traverse_util.flatten_dict(shardings, sep="/")
  arrays, leaves, homes = {}, {}, collections.defaultdict(dict)
  for tensor in wanted.values():
    leaves |= tensor.leaves
    for leaf in tensor.leaves:
      homes[leaf] |= {p: (tensor, i) for i, p in enumerate(tensor.places)}

  def of_device(leaf, index):
    """The part of a parameter at these slices of its axes."""
    home, parts = homes[leaf], []
    axes = len(next(iter(home)))  # Leading axes that count places.
    places = [range(n)[i] for n, i in zip(leaves[leaf].shape, index[:axes])]
    kind = dtype if leaf.startswith("params/") else "float32"
    for tensor, i in map(home.get, itertools.product(*places)):
      each = tensor.shape[0] // len(tensor.places)
      rows = store.rows(tensor.name, slice(i * each, (i + 1) * each))
      part = tensor.parts(rows)[0][leaf]
      parts.append(np.asarray(part[index[axes:]], kind))
    return np.stack(parts).reshape(*map(len, places), *parts[0].shape)

  for leaf, x in leaves.items():
    part = functools.partial(of_device, leaf)
    sharding = shardings.get(leaf, here)
    arrays[leaf] = jax.make_array_from_callback(x.shape, sharding, part)
  return traverse_util.unflatten_dict(arrays, sep="/")


def write(wanted: Mapping, folder: pathlib.Path, max_shard_bytes: int) -> dict:
  """Writes files of at most max_shard_bytes, or of a single larger tensor.

  Args:
    wanted: the tensors, by name.
    folder: to write to.
    max_shard_bytes: the largest size of a file.

  Returns:
    {file name: index to write}; {} for a single file, which needs none.
  """
  from safetensors.numpy import save_file

  shards, room, total, where = [], 0, 0, {}
  for tensor in wanted.values():
    size = math.prod(tensor.shape) * tensor.dtype.itemsize
    if size > room:
      shards.append([])
      room = max_shard_bytes
    shards[-1].append(tensor)
    room, total = room - size, total + size
  for i, shard in enumerate(shards, start=1):
    file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
    file = file if len(shards) > 1 else _WHOLE
    arrays = {tensor.name: tensor.value() for tensor in shard}
    save_file(arrays, folder / file, metadata={"format": "pt"})
    where |= dict.fromkeys(arrays, file)
  index = {"metadata": {"total_size": total}, "weight_map": where}
  return {_INDEX: index} if len(shards) > 1 else {}


class Files:
  """The safetensors files of a folder; tensors are read when asked for.

  files: {tensor: the file that has it}.
  slices: {tensor: its shape, dtype and rows}.
  """

  def __init__(self, path: pathlib.Path):
    self.path, listed, there = path, {}, {}
    if not (path / _WHOLE).exists():
      listed = _listed(path)
    for file in {*listed.values()} or [_WHOLE]:
      handle = _open(path / file)
      for name in [*handle.keys()]:
        there[name, file] = handle.get_slice(name)
    self.files = listed or dict(there.keys())
    for name, file in self.files.items() - there.keys():
      raise ConfigError(
        f"{path / file} lacks {name}, which {_INDEX} names; download it again"
      )
    self.slices = {x[0]: there[x] for x in self.files.items()}

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of a tensor."""
    return tuple(self.slices[name].get_shape())

  def rows(self, name: str, rows: slice) -> np.ndarray:
    """Returns some rows of a tensor.

    Args:
      name, rows: of the tensor, and a slice.
    """
    return self.slices[name][rows]

  def same(self, name: str, other: str) -> bool:
    """Whether two tensors have the same numbers.

    Args:
      name, other: of the tensors.
    """
    if self.shape(name) != self.shape(other):
      return False
    ends = [*range(0, self.shape(name)[0], _ROWS), self.shape(name)[0]]
    return all(
      np.array_equal(self.rows(name, rows), self.rows(other, rows))
      for rows in map(slice, ends, ends[1:])
    )

  def room(self) -> int:
    """Returns the number of tensors or the longest axis, whichever is larger.

    No model that these files hold has more layers, or a larger size.
    """
    sizes = [size for name in self.slices for size in self.shape(name)]
    return max([len(self.slices), *sizes])


def _listed(path):
  """{tensor: file} of the index in a folder."""
  index = path / _INDEX
  if not index.exists():
    raise ConfigError(
      f"{path} has neither {_WHOLE} nor {_INDEX}; get the model's weights"
    )
  content = files.read_json(index, "an index of tensors", "download it again")
  weight_map = content.get("weight_map")
  if not isinstance(weight_map, dict):
    weight_map = {"weight_map": weight_map}
  for name, file in weight_map.items():
    if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]*", file):
      raise ConfigError(
        f"{index} says that {name} is in {file!r}, which is not a file of this"
        " folder; download it again"
      )
  return weight_map


def _open(file):
  try:
    from safetensors import SafetensorError, safe_open

    return safe_open(file, framework="np")
  except ImportError:
    raise ConfigError(
      "reading safetensors needs the extra hf: pip install 'moe_jax[hf]'"
    ) from None
  except (SafetensorError, OSError, ValueError) as e:
    raise ConfigError(
      f"{file} is missing or no whole safetensors file ({first_line(e)});"
      " download it again"
    ) from None
