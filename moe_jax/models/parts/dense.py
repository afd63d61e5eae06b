"""The dense network of a layer, and a matrix and a bias outside of layers."""

import flax.linen as nn
import jax

from moe_jax.core import parallel, roles
from moe_jax.models.parts import dropout
from moe_jax.moe import experts, kernels
from moe_jax.moe.types import Array, Mlp


def linear(
  module: nn.Module,
  arch,
  x: Array,
  name,
  width,
  part,
  init,
  bias=nn.initializers.zeros,
) -> Array:
  """Returns x W + b, where W is the parameter `name` and b is `name`_bias.

  Args:
    module: linen module that has the parameters.
    arch: of the model, with a field mesh.
    x: [..., inputs].
    name: of W.
    width: number of outputs.
    part: of the model, see `roles.Declared`.
    init, bias: initializers of W and of b.
  """
  axes = (None, "embed") if part == "patches" else ("embed", None)
  shape, names = (x.shape[-1], width), (name, f"{name}_bias")
  made = []
  for i, one in enumerate((init, bias)):
    declared = roles.declared(one, axes[i:], part)
    w = module.param(names[i], declared, shape[i:]).astype(x.dtype)
    made.append(parallel.gathered(w, axes[i:], arch.mesh))
  w, b = made
  return kernels.product(x, w) + b.reshape((1,) * (x.ndim - 1) + b.shape)


class Dense(nn.Module):
  """An ordinary feed-forward network, with dropout of its hidden units."""

  mlp: Mlp
  mesh: jax.sharding.Mesh | None = None
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x_BLD, rng_B=None):
    """Returns the output of the network, y_BLD.

    Args:
      x_BLD: vectors of the tokens.
      rng_B: keys of the rows, for dropout; None: no dropout.
    """

    def init(rng, name):
      return self.mlp.init(rng, x_BLD.shape[-1])[name]

    axes = self.mlp.axes
    params = {
      name: self.param(name, roles.declared(init, axes[name], "dense"), name)
      for name in axes
    }
    params = {
      name: parallel.gathered(w.astype(x_BLD.dtype), axes[name], self.mesh)
      for name, w in params.items()
    }
    if rng_B is None or not self.dropout:
      return self.mlp.apply(params, x_BLD)

    def linear(params, name, x):
      x = dropout.drop(x, self.dropout, rng_B) if name == "down" else x
      return kernels.linear(params, name, x)

    return experts.network(self.mlp.activation, linear, params, x_BLD)
