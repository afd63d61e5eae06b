"""Checksums of arrays and of JSON."""

import functools
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def types(tree) -> dict[str, str]:
  """Returns {path of an array: its type and shape}.

  Args:
    tree: a tree of arrays, or of `jax.ShapeDtypeStruct`.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
  return {name(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves}


def of_arrays(tree) -> dict[str, list[str]]:
  """Returns {path of an array: [its type and shape, its checksum]}.

  The checksum is the same on every mesh: the sum, modulo 2^32, of a hash of
  each element's bits and its place. A change of one element always changes the
  sum; a change of several goes unnoticed once in 2^32.

  Args:
    tree: a tree of arrays, random keys included.
  """
  sums = jax.device_get(_checksums(jax.tree.map(_plain, tree)))
  return {
    name: [kind, f"{int(x):08x}"]
    for (name, kind), x in zip(types(tree).items(), sums, strict=True)
  }


def of_json(value: Any) -> str:
  """Returns the checksum of a value that JSON can hold."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@jax.jit
def _checksums(tree):
  return [_checksum(x) for x in jax.tree.leaves(tree)]


def _checksum(x):
  if x.dtype == bool:
    x = x.astype(jnp.uint8)
  width = min(x.dtype.itemsize, 4)
  bits = jax.lax.bitcast_convert_type(x, f"uint{8 * width}")
  place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
  for dim in reversed(range(bits.ndim)):
    iota = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim)
    place += iota * np.uint32(stride % 2**32)
    stride *= bits.shape[dim]
  return _mixed(bits.astype(jnp.uint32) ^ _mixed(place)).sum(dtype=jnp.uint32)


def _mixed(h):
  """The finalizer of MurmurHash3, a bijection of 32-bit integers."""
  h ^= h >> 16
  h *= np.uint32(0x85EBCA6B)
  h ^= h >> 13
  h *= np.uint32(0xC2B2AE35)
  return h ^ (h >> 16)


def _plain(x):
  """Random keys as their integers, and numpy's float64 as halves of 32 bits.

  Without jax_enable_x64, jax would round float64 that a run with it has saved.
  """
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    return jax.random.key_data(x)
  if isinstance(x, np.ndarray) and x.itemsize == 8:
    return x.reshape(-1).view(np.uint32).reshape(*x.shape, 2)
  return x
