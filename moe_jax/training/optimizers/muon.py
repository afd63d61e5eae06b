"""Muon (2502.16982) for matrices inside the model, AdamW for the others."""

import math

import jax
import optax
from optax import contrib

from moe_jax.core.options import number
from moe_jax.training import optimizers
from moe_jax.training.optimizers import adamw


def build(
  momentum: number(0, below=1) = 0.95,
  b1: number(0, below=1) = 0.9,
  b2: number(0, below=1) = 0.95,
  eps: number(above=0) = 1e-8,
) -> optimizers.Optimizer:
  """Orthogonal directions for matrices, scaled to the size of AdamW's.

  AdamW updates embedding, output layer, scales and biases.

  Args:
    momentum: decay of the average of gradients.
    b1, b2: see `adamw`.
    eps: for both, see `adamw`.
  """
  numbers = {"momentum": momentum, **adamw.build(b1, b2, eps).numbers}
  return optimizers.Optimizer(direction, numbers)


def direction(numbers, of_params) -> optax.GradientTransformation:
  """Returns Muon for hidden matrices, and AdamW for all other leaves.

  Args:
    numbers, of_params: see `optimizers.Optimizer`.
  """
  axes_of_params = jax.tree.map(_axes, of_params)

  def like_adam(updates, params=None):
    del params
    is_leaf = lambda x: isinstance(x, contrib.MuonDimensionNumbers)  # noqa: E731
    return jax.tree.map(_scaled, axes_of_params, updates, is_leaf=is_leaf)

  orthogonal = contrib.scale_by_muon(
    beta=numbers["momentum"],
    eps=numbers["eps"],
    weight_dimension_numbers=axes_of_params,
  )
  return optax.partition(
    {
      "muon": optax.chain(orthogonal, optax.stateless(like_adam)),
      "adamw": adamw.direction(numbers, of_params),
    },
    jax.tree.map(lambda r: "muon" if r.is_hidden else "adamw", of_params),
  )


def _axes(role):
  """The axes of a matrix for optax; masked for other arrays."""
  if not role.is_hidden:
    return optax.MaskedNode()
  return contrib.MuonDimensionNumbers(*role.matrix_axes)


def _scaled(axes, u):
  """An orthogonal matrix with the root mean square of Adam's updates."""
  sides = ([u.shape[i] for i in side] for side in axes)
  return 0.2 * math.sqrt(max(map(math.prod, sides))) * u
