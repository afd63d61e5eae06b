"""The table of accelerators: rates and memory of a device.

Numbers of TPUs are those of the pages
cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,
tpu7x}; `memory` is what libtpu's compiler lets a program use. Numbers of GPUs
are those of NVIDIA's data sheets, for products without sparsity. A chip of
tpu7x is two devices, which have half of its numbers each. "cpu" stands for
virtual devices on this machine.
"""

from typing import NamedTuple

from moe_jax.core.errors import ConfigError, did_you_mean

_GIB = 2**30
_SQUARES, _CUBES = "2x2, 4x4, 16x16", "2x2x1, 4x4x4, 8x8x8"


class Chip(NamedTuple):
  """The memory and the highest rates of one device.

  name: as in a topology, "v5p".
  platform: "tpu", "gpu" or "cpu".
  kind: jax's name for the device.
  flops: floating-point operations a second, of products in bfloat16.
  memory: bytes that a program may use; None: unknown, and then all rates are
    unknown and 0.
  memory_rate: bytes a second, read from or written to memory.
  links: bytes a second that a device can send over all its links together.
  axis: bytes a second that it can send along one dimension of the torus. For a
    GPU: over the network between machines.
  dimensions: of a topology's shape; a GPU's are hosts and GPUs of a host.
  most: chips of the largest topology; None: unknown.
  example: shapes that exist.
  """

  name: str
  platform: str
  kind: str
  flops: float
  memory: int | None
  memory_rate: float
  links: float
  axis: float
  dimensions: int
  most: int | None
  example: str


def _tpu(name, kind, tera, gib, memory_rate, links, dimensions, most, example):
  gib, links = int(gib * _GIB), links * 1e9
  rates = tera * 1e12, gib, memory_rate * 1e9, links, links / dimensions
  return Chip(name, "tpu", kind, *rates, dimensions, most, example)


CHIPS = {
  chip.name: chip
  for chip in (
    _tpu("v4", "TPU v4", 275, 30.75, 1228, 300, 3, 4096, _CUBES),
    _tpu("v5e", "TPU v5 lite", 197, 15.75, 819, 200, 2, 256, _SQUARES),
    _tpu("v5p", "TPU v5", 459, 95.74, 2765, 600, 3, 8960, _CUBES),
    _tpu("v6e", "TPU v6 lite", 918, 31.25, 1638, 400, 2, 256, _SQUARES),
    _tpu("tpu7x", "TPU7x", 1153.5, 94.75, 3690, 300, 3, 9216, _CUBES),
    Chip(
      *("h100", "gpu", "NVIDIA H100 80GB HBM3", 989e12, 80 * 10**9),
      *(3.35e12, 450e9, 50e9, 2, None, "8, 4x8"),
    ),
    Chip(
      *("h200", "gpu", "NVIDIA H200", 989e12, 141 * 10**9),
      *(4.8e12, 450e9, 50e9, 2, None, "8, 4x8"),
    ),
    Chip("cpu", "cpu", "cpu", 0, None, 0, 0, 0, 1, None, "4, 8"),
  )
}


# Further names of jax for some kinds of devices.
_ALSO = {
  "TPU v5p": "TPU v5",
  "TPU v5e": "TPU v5 lite",
  "TPU v6e": "TPU v6 lite",
}


def of_device(kind: str) -> Chip | None:
  """Returns the chip of a `device.device_kind`; None: not in the table."""
  kind = _ALSO.get(kind, kind)
  return next((chip for chip in CHIPS.values() if chip.kind == kind), None)


def find(name: str) -> Chip:
  """Returns the chip of this name.

  Raises:
    ConfigError: there is no such chip.
  """
  if name not in CHIPS:
    raise ConfigError(
      f'--topology: there is no chip "{name}"{did_you_mean(name, CHIPS)}'
    )
  return CHIPS[name]
