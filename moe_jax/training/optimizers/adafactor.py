"""Adafactor (1804.04235) without a relative step size."""

import math

import jax
import jax.numpy as jnp
import optax

from moe_jax.core.options import number
from moe_jax.training import optimizers


def build(
  decay: number(above=0, high=1) = 0.8,
  most: number(above=0, high=1) = 1.0,
  clip: number(above=0) = 1.0,
) -> optimizers.Optimizer:
  """Second moments are factored over rows and columns of large matrices.

  In attention, heads and their width count as one axis, as in T5X. Updates are
  clipped in their root mean square and scaled by that of the parameter; the
  schedule is the learning rate.

  Args:
    decay: the moments of step t, from 1 on, keep a share of 1 - t^-decay.
    most: the largest share that they keep (0.99 in GShard and GLaM).
    clip: the largest root mean square of an update before the learning rate
      (ST-MoE, 2202.08906, table 4, tries 0.1 for stability).
  """
  numbers = {"decay": decay, "most": most, "clip": clip}
  return optimizers.Optimizer(direction, numbers)


def direction(numbers, of_params) -> optax.GradientTransformation:
  """Returns the transform of one array, for every layer and expert of a leaf.

  Args:
    numbers, of_params: see `optimizers.Optimizer`.
  """
  tree = jax.tree.structure(of_params)

  def kept(step, decay):
    share = 1 - (step + 1.0) ** -decay
    return jnp.minimum(share, numbers["most"])

  of_array = optax.chain(
    optax.scale_by_factored_rms(
      decay_rate=numbers["decay"], decay_rate_fn=kept
    ),
    optax.clip_by_block_rms(numbers["clip"]),
    optax.scale_by_param_block_rms(),
  )

  def lifted(f, trees):
    for role, *args in zip(*map(tree.flatten_up_to, (of_params, *trees))):
      g = f
      for _ in role.batch_axes:
        g = jax.vmap(g)
      yield g(*args)

  def as_matrices(trees):
    """The axes of a side of a matrix as one, such as heads and their width."""
    return jax.tree.map(
      lambda role, x: x.reshape(_matrix(role, x.shape)), of_params, trees
    )

  def init(params):
    return tree.unflatten(lifted(of_array.init, (as_matrices(params),)))

  def update(updates, state, params):
    pairs = lifted(
      of_array.update, (as_matrices(updates), state, as_matrices(params))
    )
    changes, state = map(tree.unflatten, zip(*pairs))
    return jax.tree.map(lambda u, p: u.reshape(p.shape), changes, params), state

  return optax.GradientTransformation(init, update)


def _matrix(role, shape):
  """A shape in which each side of a matrix is one axis."""
  if role.matrix_axes is None:
    return shape
  sides = (math.prod(shape[i] for i in side) for side in role.matrix_axes)
  return *shape[: len(role.batch_axes)], *sides
