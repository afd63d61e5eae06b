"""Adam (1412.6980), with the decoupled weight decay of 1711.05101."""

import jax
import jax.numpy as jnp
import optax

from moe_jax.core.options import number
from moe_jax.training import optimizers


def build(
  b1: number(0, below=1) = 0.9,
  b2: number(0, below=1) = 0.95,
  eps: number(above=0) = 1e-8,
) -> optimizers.Optimizer:
  """Gradients over the root of their mean square, both as moving averages.

  Args:
    b1: decay of the average of gradients.
    b2: decay of the average of their squares.
    eps: added to the root.
  """
  # 1 - b is computed in double precision: float32 would lose bits of it.
  numbers = {"b1": b1, "b2": b2, "eps": eps, "new1": 1 - b1, "new2": 1 - b2}
  return optimizers.Optimizer(direction, numbers)


def direction(n, of_params) -> optax.GradientTransformation:
  """Returns `optax.scale_by_adam` with numbers that are arguments.

  Args:
    n, of_params: see `optimizers.Optimizer`.
  """
  del of_params

  def update(grads, state, params=None):
    del params
    mu = jax.tree.map(lambda g, m: n["new1"] * g + n["b1"] * m, grads, state.mu)
    nu = jax.tree.map(
      lambda g, v: n["new2"] * g**2 + n["b2"] * v, grads, state.nu
    )
    count = optax.safe_increment(state.count)
    mean = optax.tree.bias_correction(mu, n["b1"], count)
    square = optax.tree.bias_correction(nu, n["b2"], count)
    updates = jax.tree.map(
      lambda m, v: m / (jnp.sqrt(v) + n["eps"]), mean, square
    )
    return updates, optax.ScaleByAdamState(count, mu, nu)

  return optax.GradientTransformation(optax.scale_by_adam().init, update)
