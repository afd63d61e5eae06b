"""Tensors in safetensors files, and the parameters that they hold."""

import itertools
import json
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
# Buffers that a model computes, which older files hold.
_BUFFERS = re.compile(r"rotary_emb\.(inv_freq|(cos|sin)_cached)|masked_bias")


class Place(NamedTuple):
  """The tensors of a map in all layers of one kind, or a tensor beside them.

  map: what is in such a tensor.
  leaves: full paths of its parameters.
  names: {index in the parameters: name of the tensor}. An index is (), (layer,)
    or (layer, expert).
  """

  map: tensors.Map
  leaves: tuple[str, ...]
  names: dict[tuple[int, ...], str]


class Layout:
  """Where each parameter of a model is among the tensors of a family.

  leaves: {path: parameter, or its shape}.
  places: of all tensors.
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
    self.places, self.head = [], family.prefix + family.head
    for leaf, name, form in (
      ("params/embedding", family.embedding, tensors.SAME),
      ("params/final_norm/scale", family.final_norm, tensors.SAME),
      ("params/head", family.head, tensors.LINEAR),
    ):
      if leaf in self.leaves:
        m = tensors.Map((leaf,), name, form)
        self.places.append(Place(m, m.leaves, {(): family.prefix + name}))
    for segment, pattern, repeats, first in segments:
      for i in range(len(pattern)):
        layers = range(first + i, first + repeats * len(pattern), len(pattern))
        prefix = family.prefix + family.layer
        prefixes = [prefix.format(i=layer) for layer in layers]
        self._add(f"{segment}/{i}/", prefixes, family.tensors)
    placed = {leaf for place in self.places for leaf in place.leaves}
    rest = sorted(self.leaves.keys() - placed)
    if rest:
      raise ConfigError(f"these parameters have no place in the files: {rest}")

  def _add(self, path, prefixes, maps):
    """Adds places of layers whose parameters are at path, and tensors at
    prefixes."""
    here = {}
    for full in self.leaves:
      collection, _, leaf = full.partition("/")
      if leaf.startswith(path):
        leaf = leaf.removeprefix(path)
        if collection == "balance":  # Whatever the balancer's label is.
          leaf = f"balance/moe/{leaf.rpartition('/')[2]}"
        here[leaf] = full
    for m in maps:
      wanted = {*m.leaves, m.given} - {""}
      if wanted <= here.keys() and m.unless not in here:
        leaves = tuple(here[leaf] for leaf in m.leaves)
        names = {(r,): p + m.tensor for r, p in enumerate(prefixes)}
        if "{e}" in m.tensor:
          names = {
            (r, e): name.format(e=e)
            for (r,), name in names.items()
            for e in range(self.leaves[leaves[0]].shape[1])
          }
        self.places.append(Place(m, leaves, names))

  def _shapes(self, place):
    """Shapes of the parameters that are in a tensor."""
    axes = len(next(iter(place.names)))
    return [self.leaves[leaf].shape[axes:] for leaf in place.leaves]

  def check(self, found: "Files", left_out: tuple[str, ...]) -> None:
    """Raises ConfigError unless the files have just these tensors.

    Args:
      found: the files.
      left_out: prefixes of tensors that belong to parts which are not here.
    """
    expected, names = {}, found.files.keys()
    for place in self.places:
      shape = place.map.form.shape(self._shapes(place))
      expected |= dict.fromkeys(place.names.values(), shape)
    extra = {name for name in names if name.startswith(left_out)}
    if extra:
      logging.warning(
        "%s: %d tensors are left out, of parts that are not here: %s",
        *(found.path, len(extra), ", ".join(sorted(extra)[:3])),
      )
    # Buffers, nothing, or the embedding that is the output layer too.
    extra |= {n for n in names if _BUFFERS.search(n) or 0 in found.shape(n)}
    extra |= {self.head} - {"params/head" in self.leaves and self.head}
    for what, which in (
      ("lacks", expected.keys() - names),
      ("has unknown", names - expected.keys() - extra),
    ):
      if which:
        raise ConfigError(
          f"{found.path} {what} {len(which)} tensors, such as"
          f" {', '.join(sorted(which)[:5])}; is config.json that of these files?"
        )
    for name, shape in expected.items():
      found.check(name, shape)

  def read(self, found: "Files", dtype: str, shardings: Mapping | None) -> dict:
    """All parameters, on their devices.

    Args:
      found: the files, after `check`.
      dtype: of parameters; balancers' states are float32.
      shardings: of the variables; None: on one device.
    """
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if shardings is not None:
      shardings = traverse_util.flatten_dict(shardings, sep="/")
    arrays = {}
    for place in self.places:
      for which, leaf in enumerate(place.leaves):
        kind = dtype if leaf.startswith("params/") else "float32"

        def part(index, place=place, which=which, kind=kind):
          return np.asarray(self._part(found, place, which, index), kind)

        arrays[leaf] = jax.make_array_from_callback(
          self.leaves[leaf].shape, shardings[leaf] if shardings else here, part
        )
    return traverse_util.unflatten_dict(arrays, sep="/")

  def _part(self, found, place, which, index):
    """The part of a parameter at these slices of its axes."""
    shapes, parts = self._shapes(place), []
    axes = self.leaves[place.leaves[0]].shape[: -len(shapes[0])]
    at = [range(n)[i] for n, i in zip(axes, index)]
    index, rows = index[len(axes) :], [slice(None)]
    if place.map.stacked:  # One expert after another.
      each = place.map.form.shape(shapes)[0] // shapes[0][0]
      experts = range(shapes[0][0])[index[0]]
      rows = [slice(e * each, (e + 1) * each) for e in experts]
      index = (slice(None), *index[1:])
    for i in itertools.product(*at):
      some = [found.rows(place.names[i], r) for r in rows]
      some = [place.map.form.read(x, shapes)[which][index] for x in some]
      parts.append(np.concatenate(some))
    return np.stack(parts).reshape(*map(len, at), *parts[0].shape)

  def write(self, folder: pathlib.Path, max_shard_bytes: int) -> None:
    """Writes files of at most max_shard_bytes, or of a single larger tensor,
    and an index if they are several."""
    from safetensors.numpy import save_file

    shards, room, total = [{}], max_shard_bytes, 0
    for place in self.places:
      shape = place.map.form.shape(self._shapes(place))
      size = math.prod(shape) * self.leaves[place.leaves[0]].dtype.itemsize
      for at, name in place.names.items():
        if size > room and shards[-1]:
          shards.append({})
          room = max_shard_bytes
        shards[-1][name] = place, at
        room, total = room - size, total + size
    where = {}
    for i, shard in enumerate(shards, start=1):
      file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
      file = file if len(shards) > 1 else _WHOLE
      arrays = {}
      for name, (place, at) in shard.items():
        parts = [np.asarray(self.leaves[leaf][at]) for leaf in place.leaves]
        arrays[name] = np.ascontiguousarray(place.map.form.write(parts))
      save_file(arrays, folder / file, metadata={"format": "pt"})
      where |= dict.fromkeys(shard, file)
    if len(shards) > 1:
      index = {"metadata": {"total_size": total}, "weight_map": where}
      (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))


class Files:
  """The safetensors files of a folder; tensors are read when asked for.

  files: {tensor: the file that has it}.
  """

  def __init__(self, path: pathlib.Path):
    self.path, self._handles = path, {}
    if (path / _WHOLE).exists():
      self.files = dict.fromkeys(self._handle(_WHOLE).keys(), _WHOLE)
    elif (path / _INDEX).exists():
      self.files = self._indexed(path / _INDEX)
    else:
      raise ConfigError(
        f"{path} has neither {_WHOLE} nor {_INDEX}; get the model's weights"
      )

  def _indexed(self, index):
    """{tensor: file} of an index, whose files have these tensors."""
    found = files.read_json(index, "an index of tensors", "get it anew")
    found = found.get("weight_map")
    if not isinstance(found, dict):
      found = {"weight_map": found}
    for name, file in found.items():
      if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]*", file):
        raise ConfigError(
          f"{index} says that {name} is in {file!r}, which is not a file of"
          " this folder; get it anew"
        )
    files_there = {*found.values()}
    there = {(n, f) for f in files_there for n in [*self._handle(f).keys()]}
    for name, file in found.items() - there:
      raise ConfigError(
        f"{self.path / file} lacks {name}, which {index} names; get it anew"
      )
    return found

  def _handle(self, name):
    file = self.path / name
    if name not in self._handles:
      try:
        from safetensors import SafetensorError, safe_open

        self._handles[name] = safe_open(file, framework="np")
      except ImportError:
        raise ConfigError(
          "reading safetensors needs the extra hf: pip install 'moe_jax[hf]'"
        ) from None
      except FileNotFoundError:
        raise ConfigError(
          f"{file} is missing, which the index of {self.path} names; get it"
        ) from None
      except (SafetensorError, OSError, ValueError) as e:
        raise ConfigError(
          f"{file} is no whole safetensors file ({first_line(e)}); get it anew"
        ) from None
    return self._handles[name]

  def _slice(self, name):
    return self._handle(self.files[name]).get_slice(name)

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of a tensor."""
    return tuple(self._slice(name).get_shape())

  def rows(self, name: str, rows: slice) -> np.ndarray:
    """Some rows of a tensor."""
    return self._slice(name)[rows]

  def limits(self) -> dict[str, int]:
    """The most layers, and the longest axis, that these tensors allow."""
    axes = [size for name in self.files for size in self.shape(name)]
    return {"layers": len(self.files), "size": max(axes, default=0)}

  def check(self, name: str, shape: tuple[int, ...]) -> None:
    """Raises ConfigError for another shape, or a dtype that is not read."""
    where = f"{self.path / self.files[name]}: {name}"
    if self.shape(name) != shape:
      raise ConfigError(
        f"{where} has shape {list(self.shape(name))}, and by config.json it is"
        f" {list(shape)}; is config.json that of these files?"
      )
    dtype = self._slice(name).get_dtype()
    if dtype not in _FLOATS:
      raise ConfigError(
        f"{where} has dtype {dtype}, which is not read; convert it to one of"
        f" {', '.join(_FLOATS)}"
      )
