"""tokamax's Triton kernels, for any width and for 16- and 32-bit floats.

They need jax-triton beside tokamax; the extra of CUDA installs both. Products of
32-bit floats are rounded to TensorFloat-32, as XLA's are. The gradient of rows
copies all weights transposed; that of weights copies nothing.
"""

import functools
import os
import shutil

from moe_jax.moe.kernels import gpu
from moe_jax.moe.kernels.gpu import mosaic

_VERSION = 3, 9  # The kernels of tokamax 0.0.17 are written for this Triton.
# Variables with Triton's assemblers, for Ampere and for newer GPUs.
_ASSEMBLERS = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")


def refusal(product, device):
  """Returns why it cannot compute a product; see the head of the package.

  Args:
    product, device: as in `gpu.needs`.
  """
  floats = (*gpu.HALVES, "float32")
  why = gpu.needs(product, device, range(8, 100), floats, multiple=1)
  return why or mosaic.missing("triton") or _too_old()


@functools.cache
def _too_old():
  """The reason why tokamax's kernels do not fit this Triton, or None."""
  import triton

  if tuple(map(int, triton.__version__.split(".")[:2])) < _VERSION:
    least = ".".join(map(str, _VERSION))
    return f"Triton {triton.__version__} is older than {least}; install triton>={least}"
  return None


def tilings(product, device):
  """Returns tiles worth trying; see the head of the package.

  Args:
    product, device: as in `gpu.needs`.
  """
  names = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
  tried = (
    *((128, 128, 32, 4, 4), (128, 256, 32, 8, 5), (256, 128, 32, 8, 5)),
    (64, 128, 64, 4, 4),
  )
  return [dict(zip(names, values)) for values in tried]


def run(kind, a, b, sizes_E, tiles):
  """Computes a product; see the head of the package.

  Args:
    kind, a, b, sizes_E: as in `gpu.compute`.
    tiles: one of `tilings`.
  """
  from tokamax._src.ops.ragged_dot import triton as kernel

  _match_assembler()
  op = kernel.TritonRaggedDot(config=kernel.Config(**tiles))
  return mosaic.ragged_dot(op, kind, a, b, sizes_E)


@functools.cache
def _match_assembler():
  """Lets Triton write for the assembler that XLA has, which is often older.

  Triton writes PTX of the version of its own assembler, and XLA then fails with
  "Unsupported .version". Variables that the user has set take precedence.
  """
  from jax._src.lib import cuda_path
  from triton import knobs

  paths = shutil.which("ptxas"), cuda_path and f"{cuda_path}/bin/ptxas"
  found = [knobs.NvidiaTool.from_path(path) for path in paths if path]
  version = lambda tool: tuple(map(int, tool.version.split(".")))  # noqa: E731
  if oldest := min(filter(None, found), key=version, default=None):
    for name in _ASSEMBLERS:
      os.environ.setdefault(name, oldest.path)
