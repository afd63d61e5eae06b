"""The Pallas kernels for Hopper that ship with jax; no product copies anything.

The gradient of rows reads the weights transposed from shared memory, and so does
that of weights with the rows. A tile finds its expert by comparing with each of
them, so y and dx are for few experts.
"""

from moe_jax.moe.kernels import gpu

_MOST_EXPERTS = 64


def refusal(product, device):
  if product.kind != "dw" and product.num_experts > _MOST_EXPERTS:
    return f"it is for {_MOST_EXPERTS} experts of a device at most"
  return gpu.needs(product, device, range(9, 10))


def tilings(product, device):
  columns = {"y": product.f, "dx": product.d, "dw": product.f}[product.kind]
  wide = 128 if columns % 128 == 0 else 64
  tall = 128 if product.kind != "dw" or product.d % 128 == 0 else 64
  names = ("block_m", "block_n", "block_k", "max_concurrent_steps")
  tried = ((tall, wide, 64, 4), (tall, wide, 64, 6), (64, wide, 64, 4))
  tiles = [dict(zip(names, values)) for values in tried]
  return [t | {"grid_block_n": 4} for t in tiles]


def run(kind, a, b, sizes_E, tiles):
  from jax.experimental.pallas.ops.gpu import (
    ragged_dot_mgpu,
    transposed_ragged_dot_mgpu,
  )

  rows = len(a)
  a = gpu.whole_tiles(a)
  if kind == "dw":
    b = gpu.whole_tiles(b)
    return transposed_ragged_dot_mgpu.transposed_ragged_dot(
      a, b, group_sizes=sizes_E, **tiles
    )
  y = ragged_dot_mgpu.ragged_dot(
    a, b, group_sizes=sizes_E, transpose_rhs=kind == "dx", **tiles
  )
  return y[:rows]
