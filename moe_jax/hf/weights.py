"""Tensors in safetensors files, and the parameters that they hold."""

import functools
import itertools
import logging
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from moe_jax.core import files
from moe_jax.core.errors import ConfigError, first_line
from moe_jax.hf import tensors
from moe_jax.hf.families import Family

_FLOATS = ("F64", "F32", "F16", "BF16")
_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
# Buffers that a model computes, which older files hold, and an output layer
# that is the embedding.
_NEEDLESS = re.compile(
  r"rotary_emb\.(inv_freq|(cos|sin)_cached)|masked_bias|\blm_head\.weight"
)


class Tensor(NamedTuple):
  """A tensor in the files.

  map: what is in it.
  leaves: full paths of its parameters.
  shapes: of their parts that are in it.
  at: where these are in them: (), (repeat,) or (repeat, expert).
  """

  map: tensors.Map
  leaves: tuple[str, ...]
  shapes: list[tuple[int, ...]]
  at: tuple[int, ...]


class Layout:
  """The place of each parameter of a model among the tensors of a family.

  leaves: {path: parameter, or its shape}.
  tensors: {name: Tensor}.
  """

  def __init__(self, family: Family, segments, variables: Mapping[str, Any]):
    """
    Args:
      family: of the tensors.
      segments: `arch.segments` of the model.
      variables: of the model, or their shapes.

    Raises:
      ConfigError: a parameter has no place in the files.
    """
    self.leaves = traverse_util.flatten_dict(dict(variables), sep="/")
    self.tensors = {}
    self._add("", {(): family.prefix}, family.outer)
    prefix = family.prefix + family.layer
    for segment, pattern, repeats, first in segments:
      for i in range(len(pattern)):
        layers = range(first + i, first + repeats * len(pattern), len(pattern))
        prefixes = {(r,): prefix.format(i=x) for r, x in enumerate(layers)}
        self._add(f"{segment}/{i}/", prefixes, family.tensors)
    placed = {leaf for x in self.tensors.values() for leaf in x.leaves}
    rest = sorted(self.leaves.keys() - placed)
    if rest:
      raise ConfigError(f"these parameters have no place in the files: {rest}")

  def _add(self, path, prefixes, maps):
    """Adds tensors.

    Args:
      path: where their parameters are.
      prefixes: {place in the parameters: how the names of tensors begin}.
      maps: of the tensors.
    """
    here = {}
    for full in self.leaves:
      collection, _, leaf = full.partition("/")
      if leaf.startswith(path):
        leaf = leaf.removeprefix(path)
        if collection == "balance":  # Whatever the balancer's label is.
          leaf = f"balance/moe/{leaf.rpartition('/')[2]}"
        here[leaf] = full
    there = {"", *here}
    for m in maps:
      if not ({*m.leaves} <= here.keys() and m.given in there):
        continue
      leaves = tuple(here.pop(leaf) for leaf in m.leaves)
      whole = [self.leaves[leaf].shape for leaf in leaves]
      experts = range(whole[0][1]) if "{e}" in m.tensor else ()
      for at, prefix in prefixes.items():
        names = {prefix + m.tensor.format(e=e): (*at, e) for e in experts}
        for name, place in (names or {prefix + m.tensor: at}).items():
          shapes = [shape[len(place) :] for shape in whole]
          self.tensors[name] = Tensor(m, leaves, shapes, place)

  def check(self, found: "Files", left_out: tuple[str, ...]) -> None:
    """Raises ConfigError unless the files have just these tensors.

    Args:
      found: the files.
      left_out: prefixes of tensors that belong to parts which are not here.
    """
    names = found.files.keys()
    left = sorted(name for name in names if name.startswith(left_out))
    if left:
      words = "%s: %d tensors are left out, of parts that are not here: %s"
      logging.warning(words, found.path, len(left), ", ".join(left[:3]))
    needless = {n for n in names if _NEEDLESS.search(n) or 0 in found.shape(n)}
    for what, which in (
      ("lacks", self.tensors.keys() - names),
      ("has unknown", names - self.tensors.keys() - needless - {*left}),
    ):
      if which:
        raise ConfigError(
          f"{found.path} {what} {len(which)} tensors, such as"
          f" {', '.join(sorted(which)[:5])}; is config.json that of these files?"
        )
    for name, tensor in self.tensors.items():
      found.check(name, tensor.map.form.shape(tensor.shapes))

  def read(self, found: "Files", dtype: str, shardings: Mapping | None) -> dict:
    """All parameters, on their devices.

    Args:
      found: the files, after `check`.
      dtype: of parameters; balancers' states are float32.
      shardings: of the variables; None: on one device.
    """
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = traverse_util.flatten_dict(shardings or {}, sep="/")
    names = {leaf: {} for leaf in self.leaves}
    for name, tensor in self.tensors.items():
      for leaf in tensor.leaves:
        names[leaf][tensor.at] = name
    arrays = {}
    for leaf, named in names.items():
      kind = dtype if leaf.startswith("params/") else "float32"
      part = functools.partial(self._part, found, leaf, named, kind)
      shape, sharding = self.leaves[leaf].shape, shardings.get(leaf, here)
      arrays[leaf] = jax.make_array_from_callback(shape, sharding, part)
    return traverse_util.unflatten_dict(arrays, sep="/")

  def _part(self, found, leaf, named, dtype, index):
    """The part of a parameter at these slices of its axes."""
    axes = len(next(iter(named)))  # Leading axes that count tensors.
    at = [range(n)[i] for n, i in zip(self.leaves[leaf].shape, index[:axes])]
    parts = []
    for place in itertools.product(*at):
      part = self._slice(found, leaf, named[place], index[axes:])
      parts.append(np.asarray(part, dtype))
    return np.stack(parts).reshape(*map(len, at), *parts[0].shape)

  def _slice(self, found, leaf, name, index):
    """The part of a parameter that is in a tensor, at these slices."""
    tensor, rows = self.tensors[name], slice(None)
    form, shapes = tensor.map.form, tensor.shapes
    if tensor.map.stacked:  # Rows of the device's own experts.
      experts = shapes[0][0]
      each = form.shape(shapes)[0] // experts
      first, last, _ = index[0].indices(experts)
      rows = slice(first * each, last * each)
      index = (slice(None), *index[1:])
    x = found.rows(name, rows)
    return form.split(x, shapes, tensor.leaves.index(leaf))[index]

  def write(self, folder: pathlib.Path, max_shard_bytes: int) -> dict:
    """Writes files of at most max_shard_bytes, or of a single larger tensor.

    Returns:
      {file name: index to write}; {} for a single file, which needs none.
    """
    from safetensors.numpy import save_file

    shards, room, total = [], 0, 0
    for name, tensor in self.tensors.items():
      size = math.prod(tensor.map.form.shape(tensor.shapes))
      size *= self.leaves[tensor.leaves[0]].dtype.itemsize
      if size > room:
        shards.append([])
        room = max_shard_bytes
      shards[-1].append(name)
      room, total = room - size, total + size
    where = {}
    for i, names in enumerate(shards, start=1):
      file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
      file = file if len(shards) > 1 else _WHOLE
      arrays = {name: self._tensor(self.tensors[name]) for name in names}
      save_file(arrays, folder / file, metadata={"format": "pt"})
      where |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    return {_INDEX: index} if len(shards) > 1 else {}

  def _tensor(self, tensor):
    """A tensor from the parameters."""
    parts = [np.asarray(self.leaves[leaf][tensor.at]) for leaf in tensor.leaves]
    return np.ascontiguousarray(tensor.map.form.join(parts))


class Files:
  """The safetensors files of a folder; tensors are read when asked for.

  files: {tensor: the file that has it}.
  """

  def __init__(self, path: pathlib.Path):
    self.path, listed, names = path, None, {_WHOLE}
    if not (path / _WHOLE).exists():
      listed = self._listed()
      names = {*listed.values()}
    self._handles = {name: _open(path / name) for name in names}
    there = [
      (n, name) for name, x in self._handles.items() for n in [*x.keys()]
    ]
    self.files = dict(there) if listed is None else listed
    for name, file in self.files.items() - {*there}:
      raise ConfigError(
        f"{path / file} lacks {name}, which {_INDEX} names; get it anew"
      )

  def _listed(self):
    """{tensor: file} of the index."""
    index = self.path / _INDEX
    try:
      found = files.read_json(index, "an index of tensors", "get it anew")
    except FileNotFoundError:
      raise ConfigError(
        f"{self.path} has neither {_WHOLE} nor {_INDEX}; get the model's weights"
      ) from None
    found = found.get("weight_map")
    if not isinstance(found, dict):
      found = {"weight_map": found}
    for name, file in found.items():
      if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]*", file):
        raise ConfigError(
          f"{index} says that {name} is in {file!r}, which is not a file of"
          " this folder; get it anew"
        )
    return found

  def _slice(self, name):
    return self._handles[self.files[name]].get_slice(name)

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of a tensor."""
    return tuple(self._slice(name).get_shape())

  def rows(self, name: str, rows: slice) -> np.ndarray:
    """Some rows of a tensor."""
    return self._slice(name)[rows]

  def room(self) -> int:
    """The number of tensors or the longest axis, whichever is larger.

    No model that these files hold has more layers, or a larger size.
    """
    sizes = [size for name in self.files for size in self.shape(name)]
    return max([len(self.files), *sizes])

  def check(self, name: str, shape: tuple[int, ...]) -> None:
    """Raises ConfigError for another shape, or a dtype that is not read."""
    x = self._slice(name)
    found, dtype = tuple(x.get_shape()), x.get_dtype()
    if found != shape or dtype not in _FLOATS:
      raise ConfigError(
        f"{self.path / self.files[name]}: {name} has shape {[*found]} and dtype"
        f" {dtype}; config.json means shape {[*shape]}, and what is read is"
        f" {', '.join(_FLOATS)}: convert it, or get the config.json of these"
        " files"
      )


def _open(file):
  try:
    from safetensors import SafetensorError, safe_open
  except ImportError:
    raise ConfigError(
      "reading safetensors needs the extra hf: pip install 'moe_jax[hf]'"
    ) from None
  try:
    return safe_open(file, framework="np")
  except (SafetensorError, OSError, ValueError) as e:
    raise ConfigError(
      f"{file} is missing or no whole safetensors file ({first_line(e)});"
      " get it anew"
    ) from None
