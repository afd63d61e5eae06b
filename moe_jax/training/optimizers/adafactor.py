"""Adafactor (1804.04235) without a relative step size."""

import jax
import optax

from moe_jax.training import optimizers


def build() -> optimizers.Optimizer:
  """Second moments are factored over rows and columns of large matrices.

  Updates are clipped to a root mean square of 1 and scaled by that of the
  parameter; the schedule is the learning rate.
  """
  return optimizers.Optimizer(direction)


def direction(numbers, of_params) -> optax.GradientTransformation:
  """The transform of one array, for every layer and expert of every leaf."""
  del numbers
  tree = jax.tree.structure(of_params)
  of_array = optax.chain(
    optax.scale_by_factored_rms(),
    optax.clip_by_block_rms(1.0),
    optax.scale_by_param_block_rms(),
  )

  def lifted(f, trees):
    for role, *args in zip(*map(tree.flatten_up_to, (of_params, *trees))):
      g = f
      for _ in role.batch_axes:
        g = jax.vmap(g)
      yield g(*args)

  def init(params):
    return tree.unflatten(lifted(of_array.init, (params,)))

  def update(updates, state, params):
    pairs = lifted(of_array.update, (updates, state, params))
    return tuple(map(tree.unflatten, zip(*pairs)))

  return optax.GradientTransformation(init, update)
