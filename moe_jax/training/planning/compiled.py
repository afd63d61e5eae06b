"""A program compiled for a topology: its memory, products and collectives."""

import math
import re
import time
from typing import NamedTuple

import jax

from moe_jax.core.errors import ConfigError, first_line
from moe_jax.training.planning import hlo, products

# The bytes needed, and the bytes that there are, in the compiler's refusals.
_NEEDED = (
  re.compile(r"memory space hbm. Used ([\d.]+)([KMGT]) of"),
  re.compile(r"on HBM, .* temporaries \(([\d.]+)([KMGT])\)"),
)
_UNITS = {unit: 1024**i for i, unit in enumerate("KMGT", start=1)}


class Compiled(NamedTuple):
  """A compiled program, or a refused one, whose last three fields are None.

  memory: {kind: bytes on a device}.
  fits: whether the compiler took it.
  products: of a TPU; None: unknown.
  moved: see `hlo.by_axes`.
  seconds: time that compiling took.
  """

  memory: dict[str, int]
  fits: bool
  products: list[products.Product] | None
  moved: dict | None
  seconds: float


def compile(lowered, arguments: dict, mesh, limit: int | None) -> Compiled:
  """Compiles a program, or finds by how much its memory is too large.

  Args:
    lowered: a lowered function.
    arguments: {kind: bytes on a device} of its arguments.
    mesh: that it is lowered for.
    limit: bytes that a device has; None: unknown.
  """
  started = time.monotonic()
  try:
    program = lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    memory = arguments | {"temporaries": _needed(e, sum(arguments.values()))}
    seconds = time.monotonic() - started
    return Compiled(memory, False, None, None, seconds)
  seconds = time.monotonic() - started
  memory = arguments | _memory(program, arguments)
  fits = limit is None or sum(memory.values()) <= limit
  text = program.as_text()
  of_tpu = mesh.devices.flat[0].platform == "tpu"
  found = products.products(text) if of_tpu else None
  sent = hlo.by_axes(hlo.collectives(text), mesh)
  return Compiled(memory, fits, found, sent, seconds)


def bytes_on_a_device(tree) -> int:
  """Returns the bytes of arrays on a device, by their shapes and shardings."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def _memory(program, arguments):
  """{kind: bytes} besides the arguments, most of which the results overwrite."""
  found = program.memory_analysis()
  results = found.output_size_in_bytes - found.alias_size_in_bytes
  padding = found.argument_size_in_bytes - sum(arguments.values())
  return {
    "temporaries": found.temp_size_in_bytes + max(0, results) + max(0, padding),
    "code": found.generated_code_size_in_bytes,
  }


def _needed(error, given):
  """Bytes of temporaries that a compiler did not find.

  Raises:
    ConfigError: it refused for another reason.
  """
  text = str(error)
  for place, pattern in enumerate(_NEEDED):
    match = pattern.search(text)
    if match:
      needed = int(float(match[1]) * _UNITS[match[2]])
      return needed if place else max(0, needed - given)
  raise ConfigError(f"the compiler refuses this program: {first_line(error)}")
