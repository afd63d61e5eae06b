"""Eight virtual CPU devices and quick compiling, for tests and their commands.

jax reads what is set here when it is imported.
"""

import os
import sys

_DEVICES = "--xla_force_host_platform_device_count"
# Compiling takes most of the time of a test, and what is compiled runs once.
_QUICK = [
  "--xla_backend_optimization_level=0",
  "--xla_llvm_disable_expensive_passes=true",
  "--xla_cpu_parallel_codegen_split_count=1",
]
if sys.version_info < (3, 12):  # jaxlib 0.12 knows no other emitters.
  # The older emitters halve the time that a training step takes to compile.
  _QUICK.append("--xla_cpu_use_fusion_emitters=false")


def begin() -> None:
  """Sets the environment of this process and of commands that it starts."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
  others = os.environ.get("XLA_FLAGS", "").split()
  others = [flag for flag in others if not flag.startswith(_DEVICES)]
  os.environ["XLA_FLAGS"] = " ".join([*others, f"{_DEVICES}=8", *_QUICK])
