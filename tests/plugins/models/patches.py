"""Images as patches of 2 x 2 pixels, through MoE layers, to classes."""

import flax.linen as nn
import jax.numpy as jnp

from moe_jax.models import layers
from moe_jax.moe.groups import Grouping
from moe_jax.moe.layer import Recipe
from moe_jax.moe.linen import MoE
from moe_jax.moe.types import Sublayer


def build(section, *, mesh=None, plugins=(), num_classes, image_size):
  """The model of `config.model`, of which d_model, num_layers and moe count."""
  del image_size
  recipe, grouping = layers.sparse(
    dict(section["moe"]), "model.moe", mesh, plugins
  )
  sizes = section["d_model"], section["num_layers"], num_classes
  return Patches(recipe, grouping, *sizes, mesh=mesh)


class Patches(nn.Module):
  """[B, 8, 8] pixels to logits of the classes."""

  recipe: Recipe
  grouping: Grouping
  d_model: int
  num_layers: int
  num_classes: int
  mesh: object = None

  @property
  def sublayers(self):
    return {
      f"layer_{i}/moe": Sublayer(self.recipe, self.grouping, (i,), False)
      for i in range(self.num_layers)
    }

  @nn.compact
  def __call__(self, image, rng=None, *, first=0, train=False):
    batch = len(image)
    patches = image.reshape(batch, 4, 2, 4, 2).swapaxes(2, 3)
    x_BLD = nn.Dense(self.d_model, name="patches")(
      patches.reshape(batch, 16, 4)
    )
    place = self.param("place", nn.initializers.normal(0.1), (16, self.d_model))
    x_BLD += place[None]
    aux = {}
    for i in range(self.num_layers):
      x_BLD, aux[f"layer_{i}"] = Layer(
        self.recipe, self.grouping, self.mesh, name=f"layer_{i}"
      )(x_BLD, rng, first, i, train)
    x_BD = nn.LayerNorm(name="norm")(x_BLD).mean(1)
    return nn.Dense(self.num_classes, name="head")(x_BD).astype(
      jnp.float32
    ), aux


class Layer(nn.Module):
  """x + moe(norm(x))."""

  recipe: Recipe
  grouping: Grouping
  mesh: object = None

  @nn.compact
  def __call__(self, x_BLD, rng, first, index, train):
    h_BLD = nn.LayerNorm(name="norm")(x_BLD)
    y_BLD, stats, _ = MoE(self.recipe, self.grouping, self.mesh, name="moe")(
      h_BLD, rng=rng, first=first, layer_index=index, train=train
    )
    return x_BLD + y_BLD, {"moe": {"stats": stats}}
