"""Pictures of a model's work: the experts of patches, and denoised videos.

All are arrays of bytes [height, width, 3], for the hook `pictures`.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import models
from moe_jax.data.images import videos
from moe_jax.models.diffusion import Condition
from moe_jax.models.generation import flow
from moe_jax.moe.types import Mixture, TokenChoice

NUMBER = 8  # Images, or videos, in a row.
_LEAST = 64  # Pixels of a side of an image in a picture.


def experts(images, scale, model, variables: Mapping) -> dict[str, np.ndarray]:
  """Returns {"experts": picture}: images, and the best expert of each patch.

  Below the images a row is a MoE layer, and a colour is an expert: the first
  expert that the patch chose, or where experts or slots choose, the expert with
  the largest weight in the patch. A black patch has no expert.

  Args:
    images: `prepared.Images`.
    scale: uint8 images -> the model's images.
    model, variables: a `vision.Vision` and its weights.
  """
  pixels, arch = images.arrays["validation"][0][:NUMBER], model.arch
  grid = arch.image.grid(arch.shape)
  batch = np.resize(
    pixels, (models.whole_batch(model, NUMBER), *pixels.shape[1:])
  )
  aux = _compiled(model)(variables, scale(batch))[1]
  patches = slice(-grid[0] * grid[1], None)  # The class token is left out.
  rows = _best_experts(model, aux, len(batch), patches, grid)
  return {"experts": _sheet([[_coloured(x) for x in pixels], *rows])}


def _best_experts(model, aux, number, patches, grid):
  """A row of maps for each MoE layer."""
  rows = []
  for path, parts in models.sublayers(model).items():
    tokens = parts.grouping.tokens(model.lengths[parts.sequence])
    best = np.asarray(_best(models.at(aux, path)["choice"], tokens))
    best = best.reshape(len(parts.numbers), number, -1)
    colours = _palette(parts.recipe.pool)
    rows += [
      [colours[one].reshape(*grid, 3) for one in layer]
      for layer in best[:, :NUMBER, patches]
    ]
  return rows


def _best(choice, tokens):
  """The best expert of each token [..., T], or -1 if it has no expert."""
  if isinstance(choice, TokenChoice):
    return jnp.where(choice.valid_TK, choice.expert_TK, -1)[..., 0]
  if isinstance(choice, Mixture):
    weight_TE = choice.combine_TEC.sum(-1)
  else:
    weight_EC = jnp.where(choice.valid_EC, choice.weight_EC, 0)
    own_ECT = jax.nn.one_hot(choice.token_EC, tokens)
    weight_TE = jnp.einsum("...EC,...ECT->...TE", weight_EC, own_ECT)
  return jnp.where(weight_TE.any(-1), weight_TE.argmax(-1), -1)


def denoised(
  found: videos.Videos, ends, options: Mapping, model, variables: Mapping
) -> dict[str, np.ndarray]:
  """Returns {"denoised": picture, "samples": picture} of the first frames.

  "denoised" has videos, these with noise, and the model's prediction of them in
  one step, at timesteps that rise from left to right. Below them are the best
  experts of their patches, as in `experts`. "samples" is there where one
  network is for all timesteps.

  Args:
    found: with arrays.
    ends: lowest and highest timestep of the model.
    options: predict and shift of `denoise.build`.
    model, variables: a `diffusion.Diffusion` and its weights.
  """
  arrays = {k: x[:NUMBER] for k, x in found.arrays["validation"].items()}
  if found.shape[3] not in (1, 3):
    return {}  # Latents cannot be shown as pixels.
  number = models.whole_batch(model, NUMBER)
  arrays = {k: np.resize(x, (number, *x.shape[1:])) for k, x in arrays.items()}
  x = np.asarray(videos.numbers(arrays["video"]))
  noise = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
  time = np.linspace(*ends, NUMBER + 2, dtype=np.float32)[1:-1]
  time = np.resize(time, number)
  share = time.reshape(-1, 1, 1, 1, 1)
  noisy = (1 - share) * x + share * noise
  label = arrays.get("label")
  label = None if label is None else label.astype(np.int32)
  condition = Condition(label, arrays.get("text"), arrays.get("text_mask"))
  more = arrays.get("more")
  more = None if more is None else np.asarray(videos.numbers(more))
  given = noisy if more is None else np.concatenate([noisy, more], axis=-1)
  apply = _compiled(model)
  predicted, aux = apply(variables, given, time, condition)
  clean = noisy - share * predicted  # x = x_t - t v, as v = noise - x.
  if options["predict"] == "noise":
    clean = (noisy - share * predicted) / np.maximum(1 - share, 1e-3)
  rows = [
    [_bytes(one[0]) for one in row[:NUMBER]]
    for row in (x, noisy, np.asarray(clean))
  ]
  grid = model.arch.video.grid(model.arch.shape)[1:]
  patches = slice(grid[0] * grid[1])  # The patches of the first frames.
  rows += _best_experts(model, aux, number, patches, grid)
  made = {"denoised": _sheet(rows)}
  if tuple(ends) == (0.0, 1.0):
    one = (flow.Network("all", 0.0, lambda: variables),)
    how = flow.Sampling(24, options["shift"], options["predict"])
    samples = flow.sample(model, one, noise, condition, how, more)
    samples = np.asarray(samples)[:NUMBER]
    made["samples"] = _sheet([[_bytes(one[0]) for one in samples]])
  return made


@functools.lru_cache(maxsize=8)  # The hook calls many times in a run.
def _compiled(model):
  return jax.jit(functools.partial(model.apply, collect="routing"))


def _bytes(x):
  """Bytes with three channels of numbers from -1 to 1."""
  return _coloured(np.clip((x + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8))


def _coloured(pixels):
  return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def _palette(number: int) -> np.ndarray:
  """Colours [number + 1, 3] of experts; the last one is that of no expert."""
  from matplotlib import colors

  hue = np.arange(number) * 0.6180339887498949 % 1
  bright = np.where(np.arange(number) % 2, 0.65, 0.95)
  found = colors.hsv_to_rgb(
    np.stack([hue, np.full(number, 0.75), bright], axis=1)
  )
  return np.append(
    (255 * found).astype(np.uint8), np.zeros((1, 3), np.uint8), axis=0
  )


def _sheet(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
  """A picture of rows of pictures, enlarged to one size, with lines between.

  The first picture decides the ratio of height to width.
  """
  height, width = rows[0][0].shape[:2]
  sides = [_LEAST * n / max(height, width) for n in (height, width)]
  most = max(x.shape[0] / sides[0] for row in rows for x in row)
  sides = [round(max(1, most) * n) for n in sides]
  made = []
  for row in rows:
    tiles = []
    for x in row:
      places = (np.arange(n) * m // n for n, m in zip(sides, x.shape[:2]))
      tiles.append(np.pad(x[np.ix_(*places)], ((1, 1), (1, 1), (0, 0))))
    made.append(np.concatenate(tiles, axis=1))
  return np.concatenate(made)
