"""A loop over experts and over chunks of their rows, for XLA on CPU.

XLA has no grouped product there: `ragged_dot` multiplies all rows by every
expert's matrix. Here the rows of an expert are split into chunks of a few static
sizes: as many of the largest size as they fill, and one of the smallest size
that holds the rest. So every product is an ordinary one, few rows are computed
in vain, and loads may change without compiling again. Rows that a chunk writes
beyond its own are overwritten by the next chunk.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.core import parallel
from moe_jax.moe import kernels
from moe_jax.moe.types import Array

# Sizes of chunks, in sixteenths of the rows of an expert when loads are equal;
# near equal loads they lie close to each other.
_SIZES = (4, 6, 8, 10, 12, 14, 15, 16, 17, 18, 20, 24)
_LARGEST = 512  # Rows; the arrays of a chunk should fit into a cache.
_MULTIPLE = 16  # Products are fast for multiples of this many rows.


def network(expert, params, x_ND: Array, sizes_E: Array) -> Array:
  """Runs each expert's network on its own rows, see `kernels.grouped_network`.

  Args:
    expert, params, x_ND, sizes_E: as there; `sizes_E` is tokens_per_expert_E.
  """
  params, x_ND, sizes_E = parallel.alike((params, x_ND, sizes_E))
  if not _rows(x_ND):  # Without rows there is no size of a chunk.
    return expert(kernels.linear, _expert(params, 0), x_ND)
  return _network(expert, params, x_ND, sizes_E)


def work(tokens_per_expert, rows, widths, dtype):
  """Returns the work of whole chunks, see `kernels.estimate`.

  Args:
    tokens_per_expert, rows, widths, dtype: as in `kernels.estimate`.
  """
  del widths, dtype
  sizes = _sizes(rows, len(tokens_per_expert))
  most, total = sizes[-1], 0
  for live in map(int, tokens_per_expert):
    more = max(live - 1, 0) // most
    rest = live - more * most
    total += more * most + (rest and min(s for s in sizes if s >= rest))
  return dict.fromkeys(("forward", "rows", "weights"), kernels.Work(total))


def _products(expert, params, x, known=None):
  """(the network's result, the products of x that it asked for, in order).

  Args:
    expert, params, x: see `network`.
    known: the products, which then are not computed again; None: unknown.
  """
  products = []
  tokens = jax.tree.leaves(x)[0]

  def linear(params, name, value):
    if value is not tokens:
      return kernels.linear(params, name, value)
    if known is None:
      y = kernels.linear(params, name, value)
    else:
      own = {k: params[k] for k in (name, f"{name}_bias") if k in params}
      y = _known(name, own, value, known[len(products)])
    products.append(y)
    return y

  return expert(linear, params, x), products


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _known(name, params, x, y):
  """y, which is `kernels.linear(params, name, x)`, with its gradient."""
  del name, params, x
  return y


def _known_backward(name, kept, dy):
  _, pull = jax.vjp(lambda *args: kernels.linear(args[0], name, args[1]), *kept)
  return *pull(dy), None


_known.defvjp(lambda name, params, x, y: (y, (params, x)), _known_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _network(expert, params, x_ND, sizes_E):
  return _forward(expert, params, x_ND, sizes_E, keep=False)[0]


def _forward(expert, params, x_ND, sizes_E, keep=True):
  """The result, and the arrays for the backward pass, if `keep`."""
  rows = _rows(x_ND)
  room = rows + _sizes(rows, sizes_E.size)[-1]
  compute = functools.partial(_products, expert)
  y_ND, products = jax.eval_shape(compute, _expert(params, 0), x_ND)

  def body(carry, weights, chunk):
    products, y_ND = carry
    y_CD, new = compute(weights, _read(x_ND, chunk))
    y_ND = _write(y_ND, y_CD, chunk)
    return _write(products, new, chunk) if keep else products, y_ND

  start = _zeros(products if keep else None, room), _zeros(y_ND, room)
  start = parallel.alike((start, x_ND))[0]
  products, y_ND = _loop(body, start, params, sizes_E, rows)
  return _cut(y_ND, sizes_E, rows), (params, x_ND, sizes_E, products)


def _backward(expert, kept, dy_ND):
  params, x_ND, sizes_E, products = kept
  rows = _rows(x_ND)
  room = rows + _sizes(rows, sizes_E.size)[-1]

  def body(carry, weights, chunk):
    sums, dx_ND = carry
    x_CD, known = _read(x_ND, chunk), _read(products, chunk)
    _, pull = jax.vjp(
      lambda w, x: _products(expert, w, x, known)[0], weights, x_CD
    )
    grads, dx_CD = pull(_read(dy_ND, chunk))
    return _add(sums, grads, chunk), _write(dx_ND, dx_CD, chunk)

  # Every element is written later, so that these need not be zeros.
  wide = lambda w: jnp.promote_types(w.dtype, jnp.float32)  # noqa: E731
  sums = jax.tree.map(lambda w: lax.empty(w.shape, wide(w)), params)
  start = parallel.alike(((sums, _zeros(x_ND, room)), x_ND))[0]
  sums, dx_ND = _loop(body, start, params, sizes_E, rows, every=True)
  grads = jax.tree.map(lambda g, w: g.astype(w.dtype), sums, params)
  cut = functools.partial(_cut, sizes_E=sizes_E, rows=rows)
  return grads, jax.tree.map(cut, dx_ND), None


_network.defvjp(_forward, _backward)


class _Chunk(NamedTuple):
  """Some rows of an expert.

  expert: its index.
  first: the first row.
  live: how many rows belong to the chunk.
  size: how many rows are computed.
  begins: whether this is the expert's first chunk.
  """

  expert: Array
  first: Array
  live: Array
  size: int
  begins: bool  # Whether this is the expert's first chunk.


def _loop(body, carry, params, sizes_E, rows, every=False):
  """The carry after body(carry, weights of the expert, chunk) of all chunks.

  every: also run a chunk without live rows for experts that have no rows.
  """
  starts_E = jnp.cumsum(sizes_E) - sizes_E
  sizes = _sizes(rows, sizes_E.size)
  most = sizes[-1]

  def expert(e, carry):
    weights = _expert(params, e)
    # The number of whole chunks after the first.
    more = jnp.maximum(sizes_E[e] - 1, 0) // most
    live = sizes_E[e] - more * most
    smaller = -1 if every else 0
    for size in sizes:

      def only(i, carry, size=size):
        # i is 0. Without it XLA would move this work out of the loop, and do it
        # for every size.
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
  """The chunk sizes to compile, ascending, for `rows` rows of all experts."""
  mean = rows / num_experts
  mean /= -(-mean // _LARGEST)
  parts = (int(part * mean / 16) for part in _SIZES)
  whole = (_MULTIPLE * -(-part // _MULTIPLE) for part in parts)
  return sorted({min(rows, max(size, _MULTIPLE)) for size in whole})


def _rows(x_ND):
  return jax.tree.leaves(x_ND)[0].shape[0]


def _expert(params, e):
  return jax.tree.map(lambda w: w[e], params)


def _zeros(shapes, rows):
  return jax.tree.map(
    lambda s: jnp.zeros((rows, *s.shape[1:]), s.dtype), shapes
  )


def _read(tree, chunk):
  """The rows of a chunk, with zeros in rows that do not belong to it."""
  row = jnp.arange(chunk.size)

  def window(x):
    x = x.at[chunk.first + row].get(mode="fill", fill_value=0)
    return jnp.where((row < chunk.live)[:, None], x, 0)

  return jax.tree.map(window, tree)


def _write(tree, window, chunk):
  update = functools.partial(
    lax.dynamic_update_slice_in_dim, start_index=chunk.first, axis=0
  )
  return jax.tree.map(update, tree, window)


def _add(sums, grads, chunk):
  """Adds to the sums of an expert, or sets them with its first chunk."""

  def added(total, new):
    new = new.astype(total.dtype)
    if not chunk.begins:
      new += total[chunk.expert]
    return lax.dynamic_update_index_in_dim(total, new, chunk.expert, 0)

  return jax.tree.map(added, sums, grads)


def _cut(x_ND, sizes_E, rows):
  """The rows, with zeros where the last chunk wrote beyond its own rows."""
  room = x_ND.shape[0] - rows
  nothing = jnp.zeros((room, *x_ND.shape[1:]), x_ND.dtype)
  x_ND = lax.dynamic_update_slice_in_dim(x_ND, nothing, sizes_E.sum(), 0)
  return x_ND[:rows]
