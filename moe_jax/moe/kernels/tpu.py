"""The Pallas kernel megablox, which ships with jax, with tiles by product.

It splits rows, contraction and columns into tiles. A tile of rows that holds
the rows of several experts is multiplied once for each of them. Tiles are
chosen from the shape: among those that fit the chip's VMEM by the model of
`vmem`, the fastest by the model of `_cost`.
"""

import functools
import importlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from jax.experimental.pallas import tpu as pltpu

from moe_jax.moe import kernels
from moe_jax.moe.kernels import reference

# The module, which a function of the same name hides in its package.
megablox = importlib.import_module(
  "jax.experimental.pallas.ops.tpu.megablox.gmm"
)

CHECKED = False  # The kernel does not declare its result's mesh axes.
_LANES = 128
_ROW_TILES = (128, 256, 512, 1024)
_MIB = 2**20
# Operations that a chip does while it reads a byte (166 on v5p, 240 on v5e, 560
# on v6e), and during the 0.35 us that a step of a kernel's grid costs.
_PER_BYTE, _PER_STEP = 256, 1.5e8


class Chip(NamedTuple):
  """The numbers of a TPU that tiles depend on.

  vmem: bytes that XLA lets one kernel use.
  cores: number of cores that share its columns.
  depth: products that a matrix unit adds up at once.
  """

  vmem: int = 16 * _MIB
  cores: int = 2
  depth: int = 128


class Product(NamedTuple):
  """[m, k] times [k, n] for the rows m of each group; see `over_rows`.

  itemsize: bytes of a number.
  over_rows: whether it is [k, m] times [m, n] instead.
  """

  m: int
  k: int
  n: int
  groups: int
  itemsize: int
  over_rows: bool = False


class Tiles(NamedTuple):
  """The sizes of a tile along the axes of a `Product`."""

  m: int
  k: int
  n: int


def matmul(x_ND, w_EDF, tokens_per_expert_E):
  """Returns y_NF, where y[n] is x[n] times the matrix of row n's expert.

  Args:
    x_ND, w_EDF: rows sorted by expert, and a matrix of each expert.
    tokens_per_expert_E: rows of each expert.
  """
  if x_ND.dtype not in (jnp.bfloat16, jnp.float32):
    _say_once(x_ND.dtype.name)
    return reference.matmul(x_ND, w_EDF, tokens_per_expert_E)
  # The kernel visits whole row tiles only, and is wrong for partial ones.
  rows = len(x_ND)
  x_MD = jnp.pad(x_ND, ((0, _padded(rows) - rows), (0, 0)))
  return _matmul(x_MD, w_EDF, tokens_per_expert_E)[:rows]


def _padded(rows):
  return _LANES * _up(max(rows, 1), _LANES)


@functools.cache
def _say_once(dtype):
  logging.warning(
    "The TPU kernel for grouped products takes bfloat16 and float32, not %s:"
    ' the slower grouped_matmul = "reference" is used instead',
    dtype,
  )


@jax.custom_vjp
def _matmul(x_MD, w_EDF, sizes_E):
  tiling = _tiling(x_MD, *w_EDF.shape)
  return megablox.gmm(x_MD, w_EDF, sizes_E, x_MD.dtype, tiling)


def _forward(x_MD, w_EDF, sizes_E):
  return _matmul(x_MD, w_EDF, sizes_E), (x_MD, w_EDF, sizes_E)


def _backward(kept, dy_MF):
  x_MD, w_EDF, sizes_E = kept
  num_experts, d, f = w_EDF.shape
  tiling = _tiling(dy_MF, num_experts, f, d)
  dx_MD = megablox.gmm(
    dy_MF, w_EDF, sizes_E, x_MD.dtype, tiling, transpose_rhs=True
  )
  tiling = _tiling(x_MD, num_experts, d, f, over_rows=True)
  # The kernel transposes x again: XLA cancels both transpositions.
  dw_EDF = megablox.tgmm(x_MD.T, dy_MF, sizes_E, w_EDF.dtype, tiling)
  return dx_MD, dw_EDF, None


_matmul.defvjp(_forward, _backward)


def _tiling(x_MK, groups, k, n, over_rows=False):
  product = Product(len(x_MK), k, n, groups, x_MK.dtype.itemsize, over_rows)
  return tiles(product, chip())


def work(tokens_per_expert, rows, widths, dtype):
  """Returns the work of the kernel, see `kernels.estimate`.

  Args:
    tokens_per_expert, rows, widths, dtype: as in `kernels.estimate`.
  """
  d, f = widths
  groups, size = len(tokens_per_expert), jnp.dtype(dtype).itemsize
  forward = Product(_padded(rows), d, f, groups, size)
  products = {
    "forward": forward,
    "rows": forward._replace(k=f, n=d),
    "weights": forward._replace(over_rows=True),
  }

  def cost(product):
    t = tiles(product, chip())
    seen = visited(t.m, tokens_per_expert)
    return kernels.Work(seen, t, vmem(product, t), traffic(product, t))

  return {name: cost(product) for name, product in products.items()}


def chip() -> Chip:
  """Returns the chip of `jax.set_mesh`, or of jax's first device, or a v5p."""
  try:
    info = pltpu.get_tpu_info()
  except ValueError:  # The platform is no TPU, as in the interpreter.
    return Chip()
  vmem = (32 if info.generation >= 6 else 16) * _MIB
  return Chip(vmem, info.num_cores, info.mxu_column_size)


@functools.cache
def tiles(product: Product, chip: Chip) -> Tiles:
  """Returns the fastest tiles by `_cost` among those that fit `vmem`.

  Args:
    product, chip: the product, and the chip that computes it.
  """
  # If equal loads are whole tiles, each expert should begin at a tile.
  balanced = product.m / product.groups
  rows = product.m if balanced % _LANES else balanced
  fitting = (
    Tiles(m, k, n)
    for m in _ROW_TILES
    for k in _splits(product.k)
    for n in _splits(product.n)
    if rows % m == 0
  )
  fitting = [t for t in fitting if vmem(product, t) <= chip.vmem]
  return min(fitting, key=lambda t: _cost(product, t, chip))


def _splits(size):
  """Tile sizes for an axis: whole, or in equal parts of whole lanes."""
  parts = range(1, _up(size, _LANES) + 1)
  whole = [_LANES * _up(size, _LANES * p) for p in parts]
  if size % _LANES == 0:
    whole = [tile for tile in whole if size % tile == 0]
  return {size, *whole[1:]}


def vmem(product: Product, t: Tiles) -> int:
  """Returns bytes of VMEM of a product: enough, by up to a third.

  Both operands and the result have two buffers each. Sums are float32, and so
  are the values in flight, whose share is the one that the compiler reports.

  Args:
    product, t: the product and its tiles.
  """
  if product.over_rows:
    left, right, out = t.m * t.k, t.m * t.n, t.k * t.n
    flight = 4 * out + 2 * (left + right)
  else:
    left, right, out = t.m * t.k, t.k * t.n, t.m * t.n
    masked = product.k % t.k > 0
    flight = 8 * out + left + 4 * masked * (left + right)
  return 2 * product.itemsize * (left + right + out) + flight + _MIB // 8


def traffic(product: Product, t: Tiles) -> float:
  """Returns the bytes of memory that a product reads and writes.

  A block is read again unless the step before it read the same one.

  Args:
    product, t: the product and its tiles.
  """
  m, k, n, groups = product[:4]
  rows = _visits(product, t) * t.m
  if product.over_rows:
    moved = rows * (k * _up(n, t.n) + n * _up(k, t.k)) + groups * k * n
  else:
    times = groups if t.k >= k else _visits(product, t)
    moved = rows * k * _up(n, t.n) + times * k * n + m * n
  return moved * product.itemsize


def _cost(product, t, chip):
  """The time of a product, in operations of the chip."""
  columns, depth = _up(product.n, t.n), _up(product.k, t.k)
  steps = _visits(product, t) * depth * columns
  steps *= _up(columns, chip.cores) * chip.cores / columns  # Some cores idle.
  rows = max(t.m, chip.depth) if product.over_rows else t.m
  operations = steps * (2 * rows * t.k * t.n + _PER_STEP)
  return operations + _PER_BYTE * traffic(product, t)


def _visits(product, t):
  """The number of row tiles, if all experts but the first begin within one."""
  return product.m / t.m + product.groups - 1


def visited(row_tile: int, tokens_per_expert) -> int:
  """Returns the rows that are multiplied: whole tiles, once for each expert.

  Args:
    row_tile: rows of a tile.
    tokens_per_expert: rows of each expert.
  """
  total = begin = 0
  for size in map(int, tokens_per_expert):
    end = begin + size
    if size:
      total += _up(end, row_tile) - begin // row_tile
    begin = end
  return total * row_tile


def _up(size, tile):
  return -(-size // tile)
