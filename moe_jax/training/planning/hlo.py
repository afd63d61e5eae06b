"""The collectives of a compiled program, read from its HLO text."""

import collections
import re
from typing import NamedTuple

import jax
import numpy as np

KINDS = (
  "ragged-all-to-all",
  "all-to-all",
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "collective-permute",
)
# Bits of an element, by its name in HLO; other names contain them, as f8e4m3.
_BITS = {"token": 0, "pred": 8}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CALL = re.compile(r"(calls|to_apply)=%?([\w.-]+)")
_LOOP = re.compile(r"condition=%?([\w.-]+), body=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_LIMIT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_SENDS = re.compile(
  rf"^\s*(?:ROOT )?%?([\w.-]+) = (.+?) ({'|'.join(KINDS)})(-start|-done)?\((.*)"
)


class Collective(NamedTuple):
  """A collective of a compiled program.

  kind: of KINDS.
  size: bytes of its results on one device.
  groups: of devices, by their place in the mesh.
  times: how often a call of the program runs it.
  name: jax's name of the operation.
  """

  kind: str
  size: int
  groups: tuple[tuple[int, ...], ...]
  times: int
  name: str


class Moved(NamedTuple):
  """The collectives of one kind over the same mesh axes, in one call.

  count: how many.
  results: bytes of their results on a device.
  arrays: bytes of the whole arrays that they gather, scatter or sum, which is
    the same for all ways of doing so; of an all-to-all, the results.
  """

  count: int
  results: int
  arrays: int


def collectives(text: str) -> list[Collective]:
  """Returns all collectives of a program, except of a device with itself.

  Args:
    text: `jax.jit(f).lower(...).compile().as_text()`.
  """
  found = []
  bodies, times = computations(text)
  for name, lines in bodies.items():
    begun = {}  # An asynchronous operation has its result at its end.
    for line in lines:
      match = _SENDS.match(line)
      if not match:
        continue
      instruction, result, kind, part, rest = match.groups()
      if part == "-start":
        begun[instruction] = rest
        continue
      if part == "-done":
        rest = begun[re.search(r"%([\w.-]+)\)", rest)[1]]
      groups = _groups(rest)
      if max(map(len, groups)) > 1:
        label = re.search(r'op_name="([^"]*)"', rest)
        label = label[1] if label else ""
        one = kind, size_of(result), groups, times[name], label
        found.append(Collective(*one))
  return found


def by_axes(
  found: list[Collective], mesh: jax.sharding.Mesh
) -> dict[tuple[str, tuple[str, ...]], Moved]:
  """Returns the collectives of a program by kind and mesh axes.

  Args:
    found: from `collectives`.
    mesh: that the program was compiled for.
  """
  sums = {}
  for one in found:
    group = len(one.groups[0]) if one.kind == "reduce-scatter" else 1
    key, size = (one.kind, axes(one.groups, mesh)), one.times * one.size
    old = sums.get(key, Moved(0, 0, 0))
    new = Moved(one.times, size, size * group)
    sums[key] = Moved(*(x + y for x, y in zip(old, new)))
  return dict(sorted(sums.items()))


def axes(groups, mesh: jax.sharding.Mesh) -> tuple[str, ...]:
  """Returns the mesh axes that groups of devices are lines of, or pairs lie in.

  Args:
    groups: of places in the mesh, in the order of its devices.
    mesh: that the program was compiled for.
  """
  place = np.stack(np.unravel_index(np.arange(mesh.size), mesh.devices.shape))
  varies = [
    any(len({int(row[i]) for i in group}) > 1 for group in groups)
    for row in place
  ]
  return tuple(a for a, moves in zip(mesh.axis_names, varies) if moves)


def computations(text):
  """Returns ({name: its lines}, {name: how often a program's call runs it}).

  Args:
    text: as in `collectives`.
  """
  computations, entry, lines = {}, None, None
  for line in text.splitlines():
    head = _HEAD.match(line)
    if head:
      lines = computations[head[2]] = []
      entry = head[2] if head[1] else entry
    elif line == "}":
      lines = None
    elif lines is not None:
      lines.append(line)
  times = collections.Counter()

  def walk(name, count):
    times[name] += count
    for line in computations[name]:
      for condition, body in _LOOP.findall(line):
        walk(body, count * _trips(line, computations[condition]))
      for _, called in _CALL.findall(line):
        walk(called, count)
      for branches in _BRANCHES.findall(line):
        for called in re.findall(r"[\w.-]+", branches):
          walk(called, count)

  walk(entry, 1)
  return computations, times


def _trips(loop, condition):
  """The trip count of a loop: declared, or the only limit that it compares to.

  A loop that ends by another condition counts as one trip.
  """
  told = _TRIPS.search(loop)
  limits = _LIMIT.findall("\n".join(condition))
  if told or len(limits) == 1:
    return int(told[1] if told else limits[0])
  return 1


def _groups(attributes):
  """Groups of devices, in any of HLO's notations."""
  text = attributes.partition("replica_groups=")[2]
  if not text:
    pairs = attributes.partition("source_target_pairs=")[2]
    return _braces(pairs)
  if text.startswith("{"):
    return _braces(text)
  if text.startswith("["):  # [groups, devices of each]<=[shape]T(order)
    shape, iota = re.match(
      r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text
    ).groups()
    return _tuples(_iota(iota).reshape(_numbers(shape)))
  sizes, order, names = re.match(
    r"mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? \{([^}]*)\}", text
  ).groups()
  sizes = {k: int(v) for k, v in re.findall(r"'([^']+)'=(\d+)", sizes)}
  place = _iota(order) if order else np.arange(np.prod([*sizes.values()]))
  place = place.reshape([*sizes.values()])
  wanted = re.findall(r"'([^']+)'", names)
  if set(wanted) - set(sizes) or ":" in names:
    raise ValueError(f"cannot read these groups of devices: {text[:120]}")
  axes = [list(sizes).index(name) for name in wanted]
  last = range(-len(axes), 0)
  return _tuples(
    np.moveaxis(place, axes, last).reshape(
      -1, np.prod([sizes[n] for n in wanted])
    )
  )


def _iota(text):
  """Numbers 0, 1, ... in the shape and order of "[4,2]T(1,0)"."""
  shape, order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
  shape = _numbers(shape)
  numbers = np.arange(np.prod(shape)).reshape(shape)
  return numbers.transpose(_numbers(order)) if order else numbers


def _braces(text):
  text = text.partition("}}")[0]
  return tuple(tuple(_numbers(g)) for g in re.findall(r"\{([\d,]+)", text))


def _numbers(text):
  return [int(x) for x in text.split(",")]


def _tuples(array):
  return tuple(map(tuple, array.tolist()))


def size_of(result: str) -> int:
  """Returns the bytes of "bf16[8,128]{1,0}", or of a tuple of such arrays."""
  total = 0
  for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
    lengths = _numbers(shape) if shape else []
    bits = _BITS.get(dtype)
    if bits is None:
      bits = int(re.match(r"[a-z]+(\d+)", dtype)[1])
    total += -(-bits * int(np.prod(lengths, dtype=np.int64)) // 8)
  return total
