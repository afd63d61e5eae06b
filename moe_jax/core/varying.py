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
  return jax.tree.map(lambda x: over(x, wanted), tree)


def over(x, axes):
  """x varying over these mesh axes too; its transpose adds up over them."""
  missing = tuple(sorted(frozenset(axes) - _axes(x)))
  return lax.pcast(x, missing, to="varying") if missing else x


def _axes(x):
  return jax.typeof(x).manual_axis_type.varying
