"""tokamax's Triton kernels, for any width and for 16- and 32-bit floats.

They need jax-triton beside tokamax; the extra of CUDA installs both. Products of
32-bit floats are rounded to TensorFloat-32, as XLA's are. The gradient of rows
copies all weights transposed; that of weights copies nothing.
"""

from moe_jax.moe.kernels import gpu
from moe_jax.moe.kernels.gpu import mosaic


def refusal(product, device):
  floats = (*gpu.HALVES, "float32")
  why = gpu.needs(product, device, range(8, 100), floats, multiple=1)
  return why or mosaic.missing("triton")


def tilings(product, device):
  names = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
  tried = (
    *((128, 128, 32, 4, 4), (128, 256, 32, 8, 5), (256, 128, 32, 8, 5)),
    (64, 128, 64, 4, 4),
  )
  return [dict(zip(names, values)) for values in tried]


def run(kind, a, b, sizes_E, tiles):
  from tokamax._src.ops.ragged_dot import triton as kernel

  op = kernel.TritonRaggedDot(config=kernel.Config(**tiles))
  return mosaic.ragged_dot(op, kind, a, b, sizes_E)
