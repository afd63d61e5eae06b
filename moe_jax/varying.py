"""Values that differ from device to device inside a sharded region."""

import jax
from jax import lax


def alike(tree):
  """All leaves varying over the mesh axes that any of them varies over.

  What a loop carries has to be, and what a gradient of our own is written for:
  where this gives one value to many devices, its transpose adds up their
  gradients. Outside of a sharded region it does nothing.
  """
  wanted = frozenset().union(*map(_axes, jax.tree.leaves(tree)))

  def cast(x):
    missing = tuple(wanted - _axes(x))
    return lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(cast, tree)


def _axes(x):
  return jax.typeof(x).manual_axis_type.varying
