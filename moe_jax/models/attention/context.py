"""Positions of the tokens of a call, and the places that they may attend to.

A token's own position is the number of real tokens before it in its document.
Chunks, temperatures and routers count by it, because for them an absolute
number matters. Rotary angles and windows depend on differences only: without a
cache they take the place in the row, which costs nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.models.attention.options import Options
from moe_jax.moe.types import Array


class Tokens(NamedTuple):
  """Tokens [B, L] of a call, or those [B, M] of a cache.

  mask_BL: bool, False for padding, which stands before or after the tokens of a
    document; between them only with a cache.
  document_BL: int32, number of the token's document in its row.
  position_BL: int32, own position: the number of real tokens before it in its
    document.
  relative_BL: int32, or [1, L]: numbers whose differences within a document are
    those of the positions.
  """

  mask_BL: Array
  document_BL: Array
  position_BL: Array
  relative_BL: Array


class Context(NamedTuple):
  """The tokens and positions that all layers of a call share.

  tokens: of the call.
  first: place of the call's first token among the M of a cache; None: no cache.
  keys: the tokens at all places of the cache, those of this call included; a
    place that is not taken yet is padding. In attention to another sequence,
    its tokens, see `cross`.
  memory_BMD: vectors of the other sequence; None: its keys and values are
    cached.
  axes_1L: place of every token along each axis of a grid, for rotary positions
    of several axes; None: there is one axis.
  bias: position bias that layers share, see `positions.bias`; None: there is
    none.
  rng_B: keys for the dropout of weights; None: no dropout.
  """

  tokens: Tokens
  first: Array | None = None
  keys: Tokens | None = None
  memory_BMD: Array | None = None
  axes_1L: tuple[Array, ...] | None = None
  bias: Array | None = None
  rng_B: Array | None = None

  @property
  def is_cross(self) -> bool:
    """Whether keys are those of another sequence."""
    return self.first is None and self.keys is not None

  def real(self, x_BLD: Array) -> Array:
    """Returns x with zeros for padding: a weight of zero times NaN is NaN."""
    return jnp.where(self.tokens.mask_BL[..., None], x_BLD, 0)


def make(module, tokens_BL, mask_BL, end_of_document, cache_length):
  """Returns the Context of a call.

  Args:
    module: the linen module that keeps the variables of the cache.
    tokens_BL: int32.
    mask_BL: bool, False for padding.
    end_of_document: the token that ends a document, and is its last; None:
      every row is one document.
    cache_length: M; None: no cache.
  """
  # -1 is no token: it ends nothing.
  ends_BL = tokens_BL == (-1 if end_of_document is None else end_of_document)
  length = mask_BL.shape[1]
  if cache_length is None:
    place_1L = jnp.arange(length)[None, :]
    return Context(located(mask_BL, ends_BL)._replace(relative_BL=place_1L))
  taken = module.variable("cache", "taken", jnp.zeros, (), jnp.int32)
  first, taken.value = taken.value, taken.value + length
  mask_BM = store(module, "mask", mask_BL, first, cache_length)
  ends_BM = store(module, "ends", ends_BL, first, cache_length)
  keys = located(mask_BM, ends_BM)
  tokens = jax.tree.map(
    lambda x: jax.lax.dynamic_slice_in_dim(x, first, length, axis=1), keys
  )
  return Context(tokens, first, keys)


def packed(mask_BL: Array, document_BL: Array) -> Context:
  """Returns the Context of whole rows whose documents are numbered.

  Args:
    mask_BL: bool, False for padding.
    document_BL: int32, tokens of a document follow each other.
  """
  tokens = numbered(mask_BL, document_BL)
  place_1L = jnp.arange(mask_BL.shape[1])[None, :]
  return Context(tokens._replace(relative_BL=place_1L))


def cross(queries: Tokens, keys: Tokens, memory_BMD: Array | None) -> Context:
  """Returns the Context of attention from one sequence to another.

  A token sees the tokens of the document that has its own document's number.

  Args:
    queries, keys: tokens of the two sequences.
    memory_BMD: see `Context`.
  """
  return Context(queries, keys=keys, memory_BMD=memory_BMD)


def located(mask_BL: Array, ends_BL: Array) -> Tokens:
  """Returns whole rows as `Tokens`, from the ends of their documents.

  Args:
    mask_BL: bool, False for padding.
    ends_BL: bool, True for the last token of a document.
  """
  document_BL = jnp.cumsum(ends_BL, axis=1, dtype=jnp.int32) - ends_BL
  return numbered(mask_BL, document_BL)


def numbered(mask_BL: Array, document_BL: Array) -> Tokens:
  """Returns whole rows as `Tokens`, from the numbers of their documents.

  Args:
    mask_BL, document_BL: as in `packed`.
  """
  before_BL = jnp.cumsum(mask_BL, axis=1, dtype=jnp.int32) - mask_BL
  begins_BL = document_BL[:, 1:] != document_BL[:, :-1]
  begins_BL = jnp.pad(begins_BL, ((0, 0), (1, 0)))
  before_BL -= jax.lax.cummax(jnp.where(begins_BL, before_BL, 0), axis=1)
  return Tokens(mask_BL, document_BL, before_BL, before_BL)


def store(module, name: str, part_BL: Array, first, places: int) -> Array:
  """Writes an array into the cache, and returns all that is there, [B, M, ...].

  Args:
    module: the linen module that has the cache.
    name: of the array in the cache.
    part_BL: [B, L, ...], new values.
    first: the place of the first new value.
    places: M.
  """
  shape = (len(part_BL), places, *part_BL.shape[2:])
  variable = module.variable("cache", name, jnp.zeros, shape, part_BL.dtype)
  variable.value = jax.lax.dynamic_update_slice_in_dim(
    variable.value, part_BL, first, axis=1
  )
  return variable.value


def visible(options: Options, context: Context) -> Array:
  """Returns whether a token of this call may look at a place, bool [B, L, M].

  It sees itself and the real tokens before it, or all if options are not
  causal, of the same document, window and chunk. A padded token still sees
  itself, so that no softmax is empty. In another sequence it sees its whole
  document.

  Args:
    options: of attention.
    context: of the call.
  """
  queries, keys = context.tokens, context.keys or context.tokens
  place_L = place_M = jnp.arange(keys.mask_BL.shape[1])
  if context.first is not None:
    place_L = context.first + jnp.arange(queries.mask_BL.shape[1])

  def pairs(name):
    return getattr(queries, name)[:, :, None], getattr(keys, name)[:, None, :]

  query, key = pairs("document_BL")
  sees_BLM = (query == key) & keys.mask_BL[:, None, :]
  if context.is_cross:
    return sees_BLM
  if options.window is not None:
    query, key = pairs("relative_BL")
    sees_BLM &= query - key < options.window
    if not options.causal:
      sees_BLM &= key - query < options.window
  if options.chunk is not None:
    query, key = pairs("position_BL")
    sees_BLM &= query // options.chunk == key // options.chunk
  back_1LM = (place_L[:, None] - place_M[None, :])[None]
  sees_BLM |= back_1LM == 0
  return (back_1LM >= 0) & sees_BLM if options.causal else sees_BLM
