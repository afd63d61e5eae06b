"""A loop over experts and over chunks of their rows, for XLA on CPU.

XLA has no grouped product there: `ragged_dot` multiplies all rows by every
expert's matrix. Here an expert's rows are one chunk, of the smallest of a few
static sizes that holds them, and of the largest size are as many more as it
takes. So every product is an ordinary one, few rows are computed in vain, and
loads may change without compiling again. What a chunk writes beyond its own
rows, the next one writes over.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.core import varying
from moe_jax.moe import kernels
from moe_jax.moe.types import Array

# Sizes of chunks, relative to the rows of an expert when loads are equal: close
# to each other near there.
_SIZES = (
  1 / 4,
  3 / 8,
  1 / 2,
  5 / 8,
  3 / 4,
  7 / 8,
  15 / 16,
  1,
  17 / 16,
  9 / 8,
  5 / 4,
  3 / 2,
)
_LARGEST = 512  # Rows; what belongs to a chunk should fit a cache.
_MULTIPLE = 16  # Of rows, which the products are fast for.


def matmul(x_ND, w_EDF, sizes_E):
  """See `grouped_matmul`."""
  return network(_product, {"w": w_EDF}, x_ND, sizes_E)


def _product(linear, params, x):
  return linear(params, "w", x)


def network(expert, params, x_ND: Array, sizes_E: Array) -> Array:
  """See `grouped_network`."""
  params, x_ND, sizes_E = varying.alike((params, x_ND, sizes_E))
  if not len(x_ND):  # No chunk has a size.
    return expert(kernels.linear, _expert(params, 0), x_ND)
  return _network(expert, params, x_ND, sizes_E)


def _split(expert):
  """The network in two: the products of its input, kept for gradients, and all
  that is made of them, in the order in which the network asks for them."""

  def hidden(params, x):
    products = []

    def linear(params, name, value):
      y = kernels.linear(params, name, value)
      if value is x:
        products.append(y)
      return y

    expert(linear, params, x)
    return products

  def output(params, x, products):
    left = iter(products)

    def linear(params, name, value):
      return next(left) if value is x else kernels.linear(params, name, value)

    return expert(linear, params, x)

  return hidden, output


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _network(expert, params, x_ND, sizes_E):
  return _forward(expert, params, x_ND, sizes_E, keep=False)[0]


def _forward(expert, params, x_ND, sizes_E, keep):
  first, second = _split(expert)
  rows, num_experts = x_ND.shape[0], sizes_E.size
  room = rows + _sizes(rows, num_experts)[-1]
  one = _expert(params, 0)
  hidden = jax.eval_shape(first, one, x_ND)
  y_ND = jax.eval_shape(second, one, x_ND, hidden)

  def body(carry, weights, chunk):
    hidden, y_ND = carry
    x_CD = _read(x_ND, chunk)
    products = first(weights, x_CD)
    y_ND = _write(y_ND, second(weights, x_CD, products), chunk)
    return _write(hidden, products, chunk) if keep else hidden, y_ND

  start = _zeros(hidden if keep else None, room), _zeros(y_ND, room)
  start = varying.alike((start, x_ND))[0]
  hidden, y_ND = _loop(body, start, params, sizes_E, rows)
  return _cut(y_ND, sizes_E, rows), hidden


def _forward_keeping(expert, params, x_ND, sizes_E):
  y_ND, hidden = _forward(expert, params, x_ND, sizes_E, keep=True)
  return y_ND, (params, x_ND, sizes_E, hidden)


def _backward(expert, kept, dy_ND):
  first, second = _split(expert)
  params, x_ND, sizes_E, hidden = kept
  rows, num_experts = x_ND.shape[0], sizes_E.size
  room = rows + _sizes(rows, num_experts)[-1]
  uses_x = _uses(second, 1, _expert(params, 0), x_ND, hidden)

  def body(carry, weights, chunk):
    sums, dx_ND = carry
    x_CD, products = _read(x_ND, chunk), _read(hidden, chunk)
    _, to_products = jax.vjp(second, weights, x_CD, products)
    grads, directly_CD, d_products = to_products(_read(dy_ND, chunk))
    _, to_x = jax.vjp(first, weights, x_CD)
    more, dx_CD = to_x(d_products)
    if uses_x:
      dx_CD += directly_CD
    sums = _add(sums, jax.tree.map(jnp.add, grads, more), chunk)
    return sums, _write(dx_ND, dx_CD, chunk)

  # All of it is written, so that it need not be zeros; XLA on CPU fills it.
  wide = lambda w: jnp.promote_types(w.dtype, jnp.float32)  # noqa: E731
  sums = jax.tree.map(lambda w: lax.empty(w.shape, wide(w)), params)
  start = varying.alike(((sums, _zeros(x_ND, room)), x_ND))[0]
  sums, dx_ND = _loop(body, start, params, sizes_E, rows, every=True)
  grads = jax.tree.map(lambda g, w: g.astype(w.dtype), sums, params)
  return grads, _cut(dx_ND, sizes_E, rows), None


_network.defvjp(_forward_keeping, _backward)


def _uses(f, number, *args) -> bool:
  """Whether a function's result depends on its argument of this number."""
  jaxpr = jax.make_jaxpr(f)(*args).jaxpr
  before = len(jax.tree.leaves(args[:number]))
  variable = jaxpr.invars[before]
  return any(variable in e.invars for e in jaxpr.eqns) or (
    variable in jaxpr.outvars
  )


class _Chunk(NamedTuple):
  """expert; its first row; how many rows are its own; how many it has."""

  expert: Array
  first: Array
  live: Array
  size: int
  begins: bool  # Whether it is the first one of its expert.


def _loop(body, carry, params, sizes_E, rows, every=False):
  """carry after body(carry, weights of the expert, chunk) of every chunk.

  every: experts without rows have a chunk too, of which no row is live.
  """
  starts_E = jnp.cumsum(sizes_E) - sizes_E
  sizes = _sizes(rows, sizes_E.size)
  most = sizes[-1]

  def expert(e, carry):
    weights = _expert(params, e)
    # Whole chunks after the first one.
    more = jnp.maximum(sizes_E[e] - 1, 0) // most
    live = sizes_E[e] - more * most
    smaller = -1 if every else 0
    for size in sizes:

      def only(i, carry, size=size):
        # i is 0, but what did not depend on it would be taken out of the loop
        # by XLA, and be done for every size.
        first = starts_E[e] + i * size
        return body(carry, weights, _Chunk(e, first, live, size, True))

      fits = (smaller < live) & (live <= size)
      carry = lax.fori_loop(0, fits.astype(jnp.int32), only, carry)
      smaller = size

    def whole(i, carry):
      first = starts_E[e] + live + i * most
      return body(carry, weights, _Chunk(e, first, most, most, False))

    return lax.fori_loop(0, more, whole, carry) if most < rows else carry

  return lax.fori_loop(0, sizes_E.size, expert, carry)


def _sizes(rows, num_experts):
  """Of chunks, ascending, for so many rows in all."""
  mean = rows / num_experts
  mean /= -(-mean // _LARGEST)
  whole = (_MULTIPLE * -(-int(part * mean) // _MULTIPLE) for part in _SIZES)
  return sorted({min(rows, max(size, _MULTIPLE)) for size in whole})


def _expert(params, e):
  return jax.tree.map(lambda w: w[e], params)


def _zeros(shapes, rows):
  return jax.tree.map(
    lambda s: jnp.zeros((rows, *s.shape[1:]), s.dtype), shapes
  )


def _read(tree, chunk):
  """The rows of a chunk, zero where they are not its own."""
  row = jnp.arange(chunk.size)

  def one(x):
    x = x.at[chunk.first + row].get(mode="fill", fill_value=0)
    return jnp.where((row < chunk.live)[:, None], x, 0)

  return jax.tree.map(one, tree)


def _write(tree, window, chunk):
  return jax.tree.map(
    lambda x, new: lax.dynamic_update_slice_in_dim(x, new, chunk.first, 0),
    tree,
    window,
  )


def _add(sums, grads, chunk):
  """Adds to the sums of an expert, or sets them with its first chunk."""

  def one(total, new):
    new = new.astype(total.dtype)
    if not chunk.begins:
      new += total[chunk.expert]
    return lax.dynamic_update_index_in_dim(total, new, chunk.expert, 0)

  return jax.tree.map(one, sums, grads)


def _cut(x_ND, sizes_E, rows):
  """Without what the last chunk wrote beyond its own rows."""
  room = x_ND.shape[0] - rows
  nothing = jnp.zeros((room, *x_ND.shape[1:]), x_ND.dtype)
  x_ND = lax.dynamic_update_slice_in_dim(x_ND, nothing, sizes_E.sum(), 0)
  return x_ND[:rows]
