"""tokamax's Pallas kernels for tensor cores, which the extra of CUDA installs.

They run from Ampere on; the gradient of weights on Hopper only. tokamax's own
gradient of rows copies all weights transposed, and that of weights copies the
rows transposed: its kernels do so, and calling them one by one does not avoid
it.
"""

import functools
import importlib
import threading

import jax

from moe_jax.moe.kernels import gpu

# Modules of tokamax import each other: two threads that begin with different ones
# would wait for each other.
_IMPORTING = threading.Lock()


def refusal(product, device):
  """Returns why it cannot compute a product; see the head of the package.

  Args:
    product, device: as in `gpu.needs`.
  """
  generations = range(9, 10) if product.kind == "dw" else range(8, 100)
  return gpu.needs(product, device, generations) or missing("pallas_mosaic_gpu")


def tilings(product, device):
  """Returns tiles worth trying; see the head of the package.

  Args:
    product, device: as in `gpu.needs`.
  """
  if gpu.generation(device) != 9:
    return [{}]  # tokamax chooses the tiles itself.
  names = ("block_m", "num_stages", "persistent")
  names += ("grid_minor_dim", "grid_tile_width")
  tried = (
    *((128, 4, True, 1, 8), (128, 4, True, 0, 1), (128, 2, False, 0, 1)),
    (64, 4, True, 1, 8),
  )
  fixed = {"block_n": 64, "block_k": 128}
  return [fixed | dict(zip(names, values)) for values in tried]


def run(kind, a, b, sizes_E, tiles):
  """Computes a product; see the head of the package.

  Args:
    kind, a, b, sizes_E: as in `gpu.compute`.
    tiles: one of `tilings`.
  """
  from tokamax._src.ops.ragged_dot import pallas_mosaic_gpu as kernel

  rows = len(a)
  a = gpu.whole_tiles(a)
  b = gpu.whole_tiles(b) if kind == "dw" else b
  config = kernel.Config(split_k=1, **tiles) if tiles else None
  op = kernel.PallasMosaicGpuRaggedDot(config=config)
  y = ragged_dot(op, kind, a, b, sizes_E)
  return y if kind == "dw" else y[:rows]


def ragged_dot(op, kind, a, b, sizes_E):
  """Computes a product by an operation of tokamax, in a's dtype.

  Args:
    op: the operation.
    kind, a, b, sizes_E: as in `gpu.compute`.
  """
  from tokamax._src.ops.ragged_dot import base

  numbers = {
    "y": base.DEFAULT_RAGGED_DOT_DIM_NUMS,
    "dx": base.TRANS_RHS_RAGGED_DOT_DIM_NUMS,
    "dw": base.RAGGED_CONTRACTING_DOT_DIM_NUMS,
  }
  # `refusal` has checked the device already.
  return op.replace(bypass_device_check=True)(
    a,
    b,
    group_sizes=sizes_E,
    ragged_dot_dimension_numbers=numbers[kind],
    precision=jax.lax.Precision.DEFAULT,
    preferred_element_type=a.dtype,
  )


@functools.cache
def missing(module):
  """Returns why a module of tokamax's kernels is not there; None if it is."""
  try:
    with _IMPORTING:
      importlib.import_module(f"tokamax._src.ops.ragged_dot.{module}")
  except (ImportError, AttributeError) as e:
    return (
      f"{e}; the extras cuda12 and cuda13 install it on Python 3.12 or later"
    )
