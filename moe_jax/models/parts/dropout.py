"""Dropout (1207.0580) whose draws do not depend on the mesh or micro-batch."""

import jax
import jax.numpy as jnp

from moe_jax.moe.types import Array

# Folded into keys; no group of tokens has this index, see `layer.group_keys`.
_DROPOUT = 2**31 - 1
# The places where numbers drop out: outputs of sublayers, weights of attention,
# hidden units of dense networks, and a stack's embeddings and last norm.
PLACES = ("attention", "attention_weights", "cross", "cross_weights", "moe")
PLACES += ("mlp", "hidden", "embedding", "norm")


def of_rows(rng: Array, batch: int, first: int | Array = 0) -> Array:
  """Returns a key for each row of a batch.

  Args:
    rng: the key of a step.
    batch: B, rows.
    first: index of the first row in the whole batch of the step.
  """
  rng = jax.random.fold_in(rng, _DROPOUT)
  return jax.vmap(jax.random.fold_in, (None, 0))(rng, first + jnp.arange(batch))


def keys(rng_B: Array | None, layer_index, place: str) -> Array | None:
  """Returns a key for each row, at a place of a layer; None for no dropout.

  Args:
    rng_B: from `of_rows`.
    layer_index: number of the layer in the model.
    place: one of `PLACES`.
  """
  if rng_B is None:
    return None
  number = layer_index * len(PLACES) + PLACES.index(place)
  return jax.vmap(jax.random.fold_in, (0, None))(rng_B, number)


def drop(x: Array, rate: float, rng_B: Array | None) -> Array:
  """Returns x with a share of its numbers 0, and the rest times 1 / (1 - rate).

  Args:
    x: [B, ...].
    rate: chance that a number is 0, in [0, 1).
    rng_B: a key for each row; None: x stays unchanged.
  """
  if rng_B is None or not rate:
    return x

  def kept(rng):
    return jax.random.bernoulli(rng, 1 - rate, x.shape[1:])

  return jnp.where(jax.vmap(kept)(rng_B), x / (1 - rate), 0)
