"""Images as patches of 2 x 2 pixels, through MoE layers, to classes."""

import flax.linen as nn
import jax.numpy as jnp

from moe_jax.models.parts import layers
from moe_jax.moe.linen import MoE
from moe_jax.moe.types import Sublayer


def build(section, *, mesh=None, plugins=(), num_classes, image_size):
  """The model of `config.model`: its width, and kinds "moe" and "moe@VARIANT"."""
  del image_size
  pattern = section["pattern"]
  kinds = {k: layers.make(k, section, mesh, plugins) for k in set(pattern)}
  return Patches(
    tuple(
      kinds[pattern[i % len(pattern)]] for i in range(section["num_layers"])
    ),
    section["d_model"],
    num_classes,
    mesh,
  )


class Patches(nn.Module):
  """[B, 8, 8] pixels to logits of the classes."""

  kinds: tuple[layers.Layer, ...]
  d_model: int
  num_classes: int
  mesh: object = None

  @property
  def sublayers(self):
    return {
      f"layer_{i}/moe": Sublayer(kind.recipe, kind.grouping, (i,), False)
      for i, kind in enumerate(self.kinds)
    }

  def example(self, batch):
    return (jnp.zeros((batch, 8, 8)),)

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
    for i, kind in enumerate(self.kinds):
      x_BLD, aux[f"layer_{i}"] = Block(kind, self.mesh, name=f"layer_{i}")(
        x_BLD, rng, first, i, train
      )
    x_BD = nn.LayerNorm(name="norm")(x_BLD).mean(1)
    logits = nn.Dense(self.num_classes, name="head")(x_BD)
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), aux


class Block(nn.Module):
  """x + moe(norm(x))."""

  kind: layers.Layer
  mesh: object = None

  @nn.compact
  def __call__(self, x_BLD, rng, first, index, train):
    h_BLD = nn.LayerNorm(name="norm")(x_BLD)
    moe = MoE(self.kind.recipe, self.kind.grouping, self.mesh, name="moe")
    batch, length, _ = h_BLD.shape
    position_BL = jnp.tile(jnp.arange(length)[None], (batch, 1))
    y_BLD, stats, _ = moe(
      h_BLD,
      features={"position": position_BL, "token_id": position_BL},
      rng=rng,
      first=first,
      layer_index=index,
      train=train,
    )
    return x_BLD + y_BLD, {"moe": {"stats": stats}}
