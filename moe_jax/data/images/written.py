"""Files of images and videos that a model has made."""

import pathlib

import numpy as np

from moe_jax.core.errors import RunError


def write(found, folder: pathlib.Path) -> str:
  """Writes a PNG of all images, a GIF of each video, or an array of latents.

  Args:
    found: [N, F, H, W, C], from -1 to 1 or latents, whose number of channels is
      not 1 or 3.
    folder: a folder that is there.

  Returns:
    A sentence that says where the files are.

  Raises:
    RunError: a number is not finite.
  """
  if not np.isfinite(found).all():
    raise RunError(
      "the samples have numbers that are not finite, so that there is nothing to see;"
      " look at the weights of the run, and at --guidance"
    )
  number, frames, *_, channels = found.shape
  if channels not in (1, 3):
    np.save(folder / "latents.npy", found)
    return (
      f"The latents are in {folder}/latents.npy, for the decoder of their VAE."
    )
  pixels = np.clip((found + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)
  if frames == 1:
    _save(_sheet(pixels[:, 0]), folder / "samples.png")
    return f"The images are in {folder}/samples.png."
  for i, video in enumerate(pixels):
    _save(video, folder / f"{i:03}.gif")
  return f"The videos are in {folder}/000.gif to {number - 1:03}.gif."


def _sheet(pixels):
  """Returns all images [N, H, W, C] as one image, in rows."""
  columns = int(np.ceil(len(pixels) ** 0.5))
  rows = -(-len(pixels) // columns)
  room = np.zeros((rows * columns, *pixels.shape[1:]), np.uint8)
  room[: len(pixels)] = pixels
  _, height, width, channels = room.shape
  sheet = room.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
  return sheet.reshape(1, rows * height, columns * width, channels)


def _save(frames, path):
  """Writes frames [F, H, W, C] as a file."""
  from PIL import Image

  frames = frames[..., 0] if frames.shape[-1] == 1 else frames
  first, *others = map(Image.fromarray, frames)
  if others:
    more = {
      "save_all": True,
      "append_images": others,
      "duration": 125,
      "loop": 0,
    }
    first.save(path, **more)
  else:
    first.save(path)
