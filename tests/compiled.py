"""A model's functions as programs: quicker than the same calls op by op."""

import functools

import jax
from flax import linen as nn

from moe_jax import models


def apply(model, variables, *args, **options):
  """Returns what `model.apply` does, by one program for equal options.

  Args:
    model: any, which equal models are equal to.
    variables, args: arrays, or None.
    options: that are no arrays, such as train=True.
  """
  return _applied(model, tuple(sorted(options.items())))(variables, *args)


@functools.cache
def _applied(model, options):
  return jax.jit(functools.partial(model.apply, **dict(options)))


def init(model, rng):
  """Returns the unboxed variables of `models.init`."""
  return jax.jit(lambda rng: nn.unbox(models.init(model, rng)))(rng)
