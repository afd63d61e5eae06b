"""A vision transformer whose layers are dense or MoE in any pattern.

ViT is 2010.11929, V-MoE is 2106.05974, and Soft MoE is 2308.00951.
"""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.core.errors import ConfigError
from moe_jax.models import attention
from moe_jax.models.parts import image, layers, norms, stack
from moe_jax.models.parts import section as section_lib
from moe_jax.moe.types import Array, Sublayer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture(stack.Stack):
  """Everything about a vision transformer but its parameters. Hashable.

  It is a `stack.Stack` of layers, and has

  image: how it reads images.
  shape: H, W and channels of an image.
  num_classes: of the output.
  d_model, dtype: see `embedding.Vocabulary`.
  """

  image: image.Image
  shape: tuple[int, int, int]
  num_classes: int
  d_model: int
  dtype: str

  def __post_init__(self):
    super().__post_init__()
    self.check_features({"position": self.image.tokens(self.shape)})

  @property
  def stacks(self) -> tuple[stack.Stack, ...]:
    """The stacks of layers: this one."""
    return (self,)

  def flops(self, sizes: Mapping, lengths: Mapping) -> int:
    """Returns the operations of a forward pass of an image.

    Args:
      sizes, lengths: as in `counts.flops_per_token`.
    """
    of_patches, of_head = sizes["patches"], sizes["head"]
    of_layers = sizes["active"] - of_patches - of_head
    of_layers -= sizes.get("norm", 0) + sizes.get("embedding", 0)
    length, (rows, columns) = lengths["patches"], self.image.grid(self.shape)
    weights = of_patches * rows * columns + of_layers * length + of_head
    return 2 * weights + self.flops_per_pair * length**2


def build(
  section: Mapping,
  *,
  image_shape: tuple[int, int, int],
  num_classes: int,
  mesh: jax.sharding.Mesh | None = None,
  plugins: tuple[str, ...] = (),
) -> "Vision":
  """Returns the model of `config.model`.

  Args:
    section: `config.model`, see `configs/base.py`.
    image_shape: H, W and channels of the data's images.
    num_classes: of the data.
    mesh, plugins: as in `models.build`.

  Raises:
    ConfigError: impossible values, naming them and the remedy.
  """
  section_lib.check(section, "image")
  if not section["image"]:
    raise ConfigError(
      'the model vision needs model.image, {"patch": pixels on a side}; give it, or'
      " change model.name"
    )
  own = section_lib.fields(section, Architecture)
  own |= {"image": image.Image(**section["image"]), "shape": tuple(image_shape)}
  own |= {"num_classes": num_classes, "mesh": mesh, "causal": False}
  own |= {"kinds": layers.kinds(section, mesh, plugins), "sequence": "patches"}
  own |= {"names": ("prefix", "encoder")}
  return Vision(Architecture(**own).seeing_all())


class Vision(nn.Module):
  """A module from images to logits of classes, made by `build`."""

  arch: Architecture

  @property
  def sublayers(self) -> dict[str, Sublayer]:
    """The MoE layers by path, see `stack.Stack.sublayers`."""
    return self.arch.sublayers

  @property
  def lengths(self) -> dict[str, int]:
    """{"patches": L}, see `models`."""
    return {"patches": self.arch.image.tokens(self.arch.shape)}

  def adapted(self, params: Mapping, path: str) -> dict:
    """Returns weights of a model of other images, changed for this one.

    Args:
      params, path: as in `image.adapted`.
    """
    return image.adapted(params, self.arch, path)

  def example(self, batch: int) -> tuple:
    """Returns the arguments of a call for `batch` rows, see `models`."""
    return (jnp.zeros((batch, *self.arch.shape)),)

  @nn.compact
  def __call__(
    self,
    image_BHWC: Array,
    mask_B: Array | None = None,
    rng: Array | None = None,
    *,
    first: int | Array = 0,
    train: bool = False,
    collect: str | None = None,
    classify: bool = True,
  ) -> tuple[Array, dict]:
    """Returns the logits of the classes, and aux.

    Args:
      image_BHWC: numbers, whose mean is about 0.
      mask_B: bool, False for a row that is no image; None: all are.
      rng: the key of a step, for noise and dropout; None: there is none.
      first: index of the first image in the batch of a step.
      train: the capacity and dropout of training.
      collect: "routing" adds the arrays of the choices to aux.
      classify: False: return the pooled vectors in place of their logits.

    Returns:
      logits [B, classes] in at least float32.
      aux, see `stack.run`.
    """
    arch = self.arch
    x_BLD = image.vectors(self, arch, image_BHWC)
    mask_B = jnp.ones(len(x_BLD), bool) if mask_B is None else mask_B
    mask_BL = jnp.broadcast_to(mask_B[:, None], x_BLD.shape[:2])
    context = attention.context.packed(
      mask_BL, jnp.zeros_like(mask_BL, jnp.int32)
    )
    features = {"position": context.tokens.position_BL}
    experts = {"mask_BL": mask_BL, "features": features}
    call = stack.Call(context, {**experts, "rng": rng, "first": first})
    call, drop = stack.dropping(arch, call, rng, first, train)
    x_BLD = drop(x_BLD, "embedding")
    x_BLD, aux = stack.run(self, arch, x_BLD, call, train, collect)
    x_BLD = norms.Norm(arch.norm, arch.norm_eps, name="final_norm")(x_BLD)
    x_BD = image.pooled(self, arch, x_BLD)
    logits = image.logits(self, arch, x_BD, arch.num_classes)
    return logits if classify else x_BD, aux
