"""The Pallas kernels for Hopper that ship with jax; no product copies anything.

The gradient of rows reads the weights transposed from shared memory, and that
of weights reads the rows so. A tile finds its expert by comparing with each
expert, so y and dx are for few experts.
"""

from moe_jax.moe.kernels import gpu

_MOST_EXPERTS = 64


def refusal(product, device):
  """Returns why it cannot compute a product; see the head of the package.

  Args:
    product, device: as in `gpu.needs`.
  """
  if product.kind != "dw" and product.num_experts > _MOST_EXPERTS:
    return f"it is for {_MOST_EXPERTS} experts of a device at most"
  return gpu.needs(product, device, range(9, 10))


def tilings(product, device):
  """Returns tiles worth trying; see the head of the package.

  Args:
    product, device: as in `gpu.needs`.
  """
  names = ("block_m", "block_n", "block_k", "max_concurrent_steps")
  tried = ((128, 128, 64, 4), (128, 128, 64, 6), (64, 128, 64, 4))
  return [dict(zip(names, t)) | {"grid_block_n": 4} for t in tried]


def run(kind, a, b, sizes_E, tiles):
  """Computes a product; see the head of the package.

  Args:
    kind, a, b, sizes_E: as in `gpu.compute`.
    tiles: one of `tilings`.
  """
  from jax.experimental.pallas.ops.gpu import (
    ragged_dot_mgpu,
    transposed_ragged_dot_mgpu,
  )

  rows = len(a)
  a = gpu.whole_tiles(a)
  if kind == "dw":
    b = gpu.whole_tiles(b)
    tiles = dividing(tiles, block_m=a.shape[1], block_n=b.shape[1])
    return transposed_ragged_dot_mgpu.transposed_ragged_dot(
      a, b, group_sizes=sizes_E, **tiles
    )
  tiles = dividing(tiles, block_n=b.shape[2 if kind == "y" else 1])
  y = ragged_dot_mgpu.ragged_dot(
    a, b, group_sizes=sizes_E, transpose_rhs=kind == "dx", **tiles
  )
  return y[:rows]


def dividing(tiles, **widths):
  """Returns tiles, cut to 64 where they do not divide the width that they tile.

  Args:
    tiles, **widths: {tile: its size}, and {tile: the width that it tiles}.
  """
  cut = {
    k: tiles[k] if width % tiles[k] == 0 else 64 for k, width in widths.items()
  }
  return tiles | cut
