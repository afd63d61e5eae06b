"""A diffusion transformer whose layers are dense or MoE in any pattern.

DiT is 2212.09748, and Wan is 2503.20314.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.core.errors import ConfigError
from moe_jax.models import attention
from moe_jax.models.parts import dense, layers, modulation, norms, stack, video
from moe_jax.models.parts import section as section_lib
from moe_jax.moe.types import Array, Sublayer

_AXES = 3  # Frames, rows, columns.


class Condition(NamedTuple):
  """The class and the text of a video. A model reads those that its data has.

  label_B: int32, the class; below 0: no class is named.
  text_BMT: vectors that a text encoder outside of this package has made.
  mask_BM: bool, False for vectors of padding; None: no padding.
  """

  label_B: Array | None = None
  text_BMT: Array | None = None
  mask_BM: Array | None = None

  @property
  def none(self) -> "Condition":
    """This condition without a class, and with zeros for a text."""
    label_B, text_BMT = self.label_B, self.text_BMT
    if label_B is not None:
      label_B = jnp.full_like(label_B, -1)
    if text_BMT is not None:
      text_BMT = jnp.zeros_like(text_BMT)
    return Condition(label_B, text_BMT, self.mask_BM)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture(stack.Stack):
  """Everything about a diffusion transformer but its parameters. Hashable.

  It is a `stack.Stack` of layers, and has

  video: how it reads videos; an image is a video of one frame.
  shape: F, H, W and channels of a video, and of the prediction.
  more_channels: channels of further inputs (a first frame, in Wan2.2).
  num_classes: of the condition; 0: it has no classes.
  text: (M, T), the number of vectors of a text and their width; None: it has
    none.
  d_model, dtype: see `embedding.Vocabulary`.
  """

  video: video.Video
  shape: tuple[int, int, int, int]
  more_channels: int = 0
  num_classes: int = 0
  text: tuple[int, int] | None = None
  d_model: int
  dtype: str

  def __post_init__(self):
    super().__post_init__()
    length = self.video.tokens(self.shape)
    self.check_features({"position": length, "timestep": (0, 1)})

  @property
  def stacks(self) -> tuple[stack.Stack, ...]:
    """The stacks of layers: this one."""
    return (self,)

  def flops(self, sizes: Mapping, lengths: Mapping) -> int:
    """Returns the operations of a forward pass of a video.

    Args:
      sizes, lengths: as in `counts.flops_per_token`.
    """
    length, (texts, _) = lengths["patches"], self.text or (0, 0)
    once = sizes.get("condition", 0)
    weights = sizes["active"] - once - sizes.get("norm", 0)
    weights = (weights - sizes.get("modulation", 0)) * length + once
    flops = 2 * weights + self.flops_per_pair * length**2
    if texts:
      across = [parts.attention.as_cross() for parts in self.each_layer]
      made = sum(one.cached_per_token for one in across) * self.d_model
      # Keys and values are made of the text's vectors, not of the patches.
      flops += 2 * made * (texts - length)
      flops += sum(one.flops_per_pair for one in across) * length * texts
    return flops


def build(
  section: Mapping,
  *,
  video_shape: tuple[int, int, int, int],
  more_channels: int = 0,
  num_classes: int = 0,
  text: tuple[int, int] | None = None,
  mesh: jax.sharding.Mesh | None = None,
  plugins: tuple[str, ...] = (),
) -> "Diffusion":
  """Returns the model of `config.model`.

  Args:
    section: `config.model`, see `configs/base.py`.
    video_shape: F, H, W and channels of the data.
    more_channels, num_classes, text: see `Architecture`.
    mesh, plugins: as in `models.build`.

  Raises:
    ConfigError: impossible values, naming them and the remedy.
  """
  section_lib.check(section, "video")
  if not section["video"]:
    raise ConfigError(
      'the model diffusion needs model.video, {"patch": (frames, rows, columns)}; give'
      " it, or change model.name"
    )
  own = section_lib.fields(section, Architecture)
  made = dict(section["video"])
  own["video"] = video.Video(**made | {"patch": tuple(made["patch"])})
  own |= {"shape": tuple(video_shape), "more_channels": more_channels}
  own |= {"num_classes": num_classes, "text": text and tuple(text)}
  own |= {"kinds": layers.kinds(section, mesh, plugins), "mesh": mesh}
  own |= {"sequence": "patches", "names": ("prefix", "blocks"), "axes": _AXES}
  arch = Architecture(**own, causal=False).seeing_all()
  if arch.text:
    for parts in arch.each_layer:
      parts.attention.as_cross()  # Raises if this kind has no such attention.
  return Diffusion(arch)


class Diffusion(nn.Module):
  """A module from noisy videos to their velocity or noise, made by `build`."""

  arch: Architecture

  @property
  def sublayers(self) -> dict[str, Sublayer]:
    """The MoE layers by path, see `stack.Stack.sublayers`."""
    return self.arch.sublayers

  @property
  def lengths(self) -> dict[str, int]:
    """{"patches": L}, see `models`."""
    return {"patches": self.arch.video.tokens(self.arch.shape)}

  def example(self, batch: int) -> tuple:
    """Returns the arguments of a call for `batch` rows, see `models`."""
    arch = self.arch
    channels = arch.shape[3] + arch.more_channels
    condition = Condition(
      jnp.zeros(batch, jnp.int32) if arch.num_classes else None,
      jnp.zeros((batch, *arch.text)) if arch.text else None,
    )
    shape = batch, *arch.shape[:3], channels
    return jnp.zeros(shape), jnp.zeros(batch), condition

  @nn.compact
  def __call__(
    self,
    video_BFHWC: Array,
    time_B: Array,
    condition: Condition = Condition(),  # noqa: B008
    mask_B: Array | None = None,
    rng: Array | None = None,
    *,
    first: int | Array = 0,
    train: bool = False,
    collect: str | None = None,
  ) -> tuple[Array, dict]:
    """Predicts the velocity, or the noise, whichever the task trains.

    Args:
      video_BFHWC: noisy videos, with `more_channels` last.
      time_B: from 0, no noise, to 1, noise alone.
      condition: the class and the text of the videos.
      mask_B: bool, False for a row that is no video; None: all are.
      rng: the key of a step, for noise and dropout of the layers; None: none.
      first: index of the first video in the batch of a step.
      train: the capacity and dropout of training.
      collect: "routing" adds the arrays of the choices to aux.

    Returns:
      an array like the video, without `more_channels`, in at least float32.
      aux, see `stack.run`.
    """
    arch = self.arch
    x_BLD = video.vectors(self, arch, video_BFHWC)
    mask_B = jnp.ones(len(x_BLD), bool) if mask_B is None else mask_B
    mask_BL = jnp.broadcast_to(mask_B[:, None], x_BLD.shape[:2])
    context = attention.context.packed(
      mask_BL, jnp.zeros_like(mask_BL, jnp.int32)
    )
    places = tuple(map(jnp.asarray, arch.video.places(arch.shape)))
    context = context._replace(axes_1L=places)
    time_B = time_B.astype(jnp.promote_types(time_B.dtype, jnp.float32))
    e_BD = video.of_timesteps(self, arch, time_B)
    if arch.num_classes:
      e_BD += video.of_classes(self, arch, condition.label_B, arch.num_classes)
    time_BL = jnp.broadcast_to(time_B[:, None], mask_BL.shape)
    features = {"position": context.tokens.position_BL, "timestep": time_BL}
    experts = {
      "mask_BL": mask_BL,
      "features": features,
      "rng": rng,
      "first": first,
    }
    call = stack.Call(context, experts, self._cross(context.tokens, condition))
    call = call._replace(condition_BND=self._of_blocks(e_BD))
    call, drop = stack.dropping(arch, call, rng, first, train)
    x_BLD, aux = stack.run(self, arch, x_BLD, call, train, collect)
    return self._predicted(x_BLD, e_BD), aux

  def _cross(self, tokens, condition):
    """The context of attention to the text; None: there is no text."""
    arch = self.arch
    if not arch.text:
      return None
    text_BMD = video.of_texts(self, arch, condition.text_BMT)
    mask_BM = condition.mask_BM
    mask_BM = jnp.ones(text_BMD.shape[:2], bool) if mask_BM is None else mask_BM
    keys = attention.context.numbered(
      mask_BM, jnp.zeros_like(mask_BM, jnp.int32)
    )
    return attention.context.cross(tokens, keys, text_BMD)

  def _of_blocks(self, e_BD):
    """The vectors that modulate all blocks, [B, 6, D]."""
    arch, number = self.arch, modulation.OF_A_BLOCK
    init = nn.initializers.xavier_uniform()
    x = dense.linear(
      self,
      arch,
      jax.nn.silu(e_BD),
      "modulate",
      number * arch.d_model,
      "condition",
      init,
    )
    return x.reshape(len(x), number, arch.d_model)

  def _predicted(self, x_BLD, e_BD):
    """The output layer, which is modulated too."""
    arch = self.arch
    x_BLD = x_BLD.astype(jnp.promote_types(x_BLD.dtype, jnp.float32))
    x_BLD = norms.Norm("plain", arch.norm_eps, name="final_norm")(x_BLD)
    e_B2D = jnp.stack([e_BD, e_BD], axis=1)
    x_BLD = modulation.Modulation(*modulation.split(self, e_B2D)).entered(x_BLD)
    f, h, w = arch.video.patch
    zeros = nn.initializers.zeros
    width = f * h * w * arch.shape[3]
    x_BLP = dense.linear(self, arch, x_BLD, "head", width, "head", zeros)
    return video.unpatched(arch, x_BLP, arch.shape)
