"""Devices that are not there, described by a topology such as "v5p:8x8x8"."""

import importlib.util
import math
import os
import re

from moe_jax.core.errors import ConfigError, first_line
from moe_jax.training.planning import chips

# A description of an NVIDIA GPU (compute capability 9.0) for the CUDA compiler.
_HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 }}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {rate}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
}}
platform_name: "CUDA"
"""

# {platform: (modules, any of which has its compiler; an extra that has one)}.
_COMPILERS = {
  "tpu": (("libtpu",), "aot"),
  "gpu": (("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"), "cuda12"),
}


def parse(text: str) -> tuple[chips.Chip, tuple[int, ...]]:
  """Returns (chip, its shape) of CHIP:SHAPE.

  Raises:
    ConfigError: it is not of this form, or there is no such chip or shape.
  """
  name, _, shape = text.partition(":")
  chip = chips.find(name)
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
    why = (
      f'"{shape}" is no shape' if shape else f"no shape stands after {name}:"
    )
    raise _no_topology(chip, text, why)
  lengths = tuple(map(int, shape.split("x")))
  most, least = chip.dimensions, chip.dimensions
  if chip.platform == "gpu":
    least = 1  # The GPUs of one host.
  if not least <= len(lengths) <= most:
    number = f"{most}" if least == most else f"{least} or {most}"
    why = f"a shape of {name} has {number} dimensions, not {len(lengths)}"
    raise _no_topology(chip, text, why)
  if chip.most and math.prod(lengths) > chip.most:
    raise _no_topology(chip, text, f"the largest has {chip.most} chips")
  return chip, lengths


def _no_topology(chip, text, why):
  examples = ", ".join(f"{chip.name}:{x}" for x in chip.example.split(", "))
  return ConfigError(
    f'--topology: there is no topology "{text}" ({why}); there are {examples}, ...'
  )


def ring(topology: str) -> int:
  """Returns the devices along the longest dimension, or GPUs of a host.

  Args:
    topology: CHIP:SHAPE.
  """
  chip, shape = parse(topology)
  return shape[-1] if chip.platform == "gpu" else max(shape)


def prepare(chip: chips.Chip, shape: tuple[int, ...]) -> None:
  """Sets up this process to compile for a topology, before jax is imported.

  Args:
    chip, shape: from `parse`.

  Raises:
    ConfigError: its compiler is not installed.
  """
  os.environ["JAX_PLATFORMS"] = "cpu"
  if chip.platform == "cpu":
    flags = f"--xla_force_host_platform_device_count={math.prod(shape)}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    return
  if chip.platform == "tpu":
    # libtpu then looks for no TPU, and takes no lock from a run that uses one.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ["TPU_ACCELERATOR_TYPE"] = (
      "v5p-8"  # libtpu asks for some value, and does not use it.
    )
    os.environ.setdefault("TPU_LOG_DIR", "disabled")
  modules, extra = _COMPILERS[chip.platform]
  if not any(map(_installed, modules)):
    raise ConfigError(
      f"to compile for {chip.name} its compiler, {modules[0]}, is needed; install"
      f" it with pip install 'moe_jax[{extra}]' (Linux x86-64 only)"
    )


def _installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ImportError:
    return False


def devices(chip: chips.Chip, shape: tuple[int, ...]) -> list:
  """Returns the devices of a topology.

  Args:
    chip, shape: from `parse`.

  Raises:
    ConfigError: there is no such topology.
  """
  from jax.experimental import topologies

  name = f"{chip.name}:{'x'.join(map(str, shape))}"
  try:
    if chip.platform == "cpu":
      return _virtual(math.prod(shape))
    if chip.platform == "tpu":
      # A run on v4 has one device a chip.
      cores = {"chip_config_name": "megacore"} if chip.name == "v4" else {}
      found = topologies.get_topology_desc(
        platform="tpu", topology_name=name, **cores
      )
    else:
      found = _gpus(chip, shape)
  except Exception as e:  # jax's plugins raise many kinds of errors.
    raise _no_topology(chip, name, first_line(e)) from None
  return found.devices


def _virtual(count):
  import jax

  found = jax.devices("cpu")
  if len(found) < count:
    raise ValueError(f"there are {len(found)} such devices in this process")
  return found[:count]


def _gpus(chip, shape):
  from jax.experimental import topologies

  hosts, gpus = (1, *shape)[-2:]
  config = _HOPPER.format(rate=int(chip.memory_rate), memory=chip.memory)
  return topologies.get_topology_desc(
    platform="cuda",
    topology_name="",
    target_config=config,
    topology=f"1x{hosts}x{gpus}",
  )


def sizes(text: str, axes: tuple[str, ...], count: int) -> tuple[int, ...]:
  """Returns the lengths of a mesh, from "data:8,expert:8"; other axes have 1.

  Args:
    text: AXIS:LENGTH, separated by commas; one length may be -1, for all
      devices that are left.
    axes: of a mesh.
    count: devices.

  Raises:
    ConfigError: another form, or a mesh with another number of devices.
  """
  lengths, given = dict.fromkeys(axes, 1), set()
  for part in text.split(","):
    name, _, length = part.partition(":")
    known = name in lengths and name not in given
    given.add(name)
    if not known or not re.fullmatch(r"-1|[1-9]\d*", length):
      raise ConfigError(
        f'--mesh: "{part}" is not AXIS:LENGTH with one of {", ".join(axes)},'
        " each at most once;"
        " give a mesh such as data:1,fsdp:8,expert:8,tensor:1"
      )
    lengths[name] = int(length)
  if list(lengths.values()).count(-1) > 1:
    raise ConfigError(f"--mesh={text}: only one length may be -1")
  known = math.prod(n for n in lengths.values() if n > 0)
  unknown = [name for name, n in lengths.items() if n < 0]
  if unknown and count % known:
    raise ConfigError(
      f"--mesh={text}: the {count} devices of the topology do not divide by {known}"
    )
  if unknown:
    lengths[unknown[0]] = count // known
  elif known != count:
    raise ConfigError(
      f"--mesh={text} is of {known} devices, and the topology has {count};"
      " change one of them, or give -1 as the length of one axis"
    )
  return tuple(lengths.values())
