"""Drawn letters and digits among other shapes: 22,000 colour images with captions.

Each image of 32 x 32 pixels has one of 34 characters in one of twelve fonts, turned by
up to 20 degrees, of some size, place and colour, beside a circle, square or triangle of
another colour, on a darker background that runs from one colour to another, with noise.
The label is the character. The images are drawn, not photographed: models differ on
them, but how much they would differ on photographs is not known from them.
"""

import importlib.metadata
import pathlib
import string

import numpy as np
import tensorflow_datasets as tfds

from moe_jax.data.datasets import _builder

CLASSES = tuple(string.ascii_uppercase + "23456789")
SHAPES = ("circle", "square", "triangle")
COLOURS = {
  "red": (205, 45, 40),
  "green": (40, 150, 60),
  "blue": (45, 75, 205),
  "yellow": (230, 200, 40),
  "purple": (140, 50, 160),
  "white": (240, 240, 240),
  "orange": (240, 140, 40),
}
SIDES = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
NUM_IMAGES = {"train": 20_000, "validation": 2_000}
_FONTS = (
  *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono"),
  *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral"),
  *("STIXGeneralBolIta", "cmr10", "cmss10", "cmtt10"),
)
_SIDE = 32  # Pixels of an image.
_TIMES = 2  # Factor by which an image is drawn larger.
_DARK = 0.3  # Brightness of a background; that of the shapes is 1.


def build() -> type[_builder.Pictures]:
  """Returns the TFDS builder of this dataset."""
  return Glyphs


class Glyphs(_builder.Pictures):
  """Drawn characters, with a caption that says what else is in the image."""

  VERSION = tfds.core.Version("2.0.0")
  SHAPE = (_SIDE, _SIDE, 3)
  CLASSES = CLASSES
  TEXTS = ("caption",)

  @staticmethod
  def sources() -> dict[str, str]:
    """Returns {name: version} of the packages that draw the images."""
    names = "matplotlib", "numpy", "pillow"  # The first has the fonts.
    return {name: importlib.metadata.version(name) for name in names}

  def splits(self):
    """Returns {split: pairs of a number and an example}."""
    return {
      split: enumerate(images(number, count))
      for number, (split, count) in enumerate(NUM_IMAGES.items())
    }


def images(number: int, count: int):
  """Yields the examples of a split, in their order.

  Args:
    number: of the split, the seed of its images.
    count: number of examples.
  """
  import matplotlib

  folder = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf"
  files = [folder / f"{font}.ttf" for font in _FONTS]
  for image in range(count):
    yield draw(np.random.default_rng((number, image)), files)


def draw(rng: np.random.Generator, fonts) -> dict:
  """Returns an example: its image, label and caption.

  Args:
    rng: the source of all random numbers.
    fonts: files of fonts.
  """
  from PIL import Image

  label, shape = int(rng.integers(len(CLASSES))), str(rng.choice(SHAPES))
  names = [str(name) for name in rng.permutation(list(COLOURS))]
  side, size = str(rng.choice(list(SIDES))), _SIDE * _TIMES
  image = _background(rng, size, names[2:4])
  # The character is on one side of the middle, and the shape on the other.
  side_of = np.array(SIDES[side]) * size
  middle = size / 2 + rng.uniform(-0.05, 0.05, 2) * size
  layers = (
    (_shape(rng, shape, size), middle - 0.32 * side_of, names[1]),
    (
      _character(rng, CLASSES[label], fonts, size),
      middle + 0.12 * side_of,
      names[0],
    ),
  )
  for mask, centre, name in layers:
    corner = tuple(int(x) for x in centre - np.array(mask.size) / 2)
    colour = np.clip(np.array(COLOURS[name]) + rng.integers(-20, 21, 3), 0, 255)
    image.paste(tuple(int(x) for x in colour), corner, mask)
  image = image.resize((_SIDE, _SIDE), Image.Resampling.BOX)
  noise = rng.normal(0, rng.uniform(0, 25), (_SIDE, _SIDE, 3))
  pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
  where = f"{side} of" if side in ("left", "right") else side
  first, second = (f"{'an' if n == 'orange' else 'a'} {n}" for n in names[:2])
  caption = f"{first} {CLASSES[label]} {where} {second} {shape}"
  return {"image": pixels, "label": label, "caption": caption}


def _background(rng, size, names):
  """Returns an image that runs from one dark colour to another in some direction."""
  from PIL import Image

  angle = rng.uniform(0, 2 * np.pi)
  y, x = np.mgrid[:size, :size] / size - 0.5
  share = np.clip(x * np.cos(angle) + y * np.sin(angle) + 0.5, 0, 1)[..., None]
  first, second = (_DARK * np.array(COLOURS[name]) for name in names)
  pixels = first * (1 - share) + second * share
  return Image.fromarray(pixels.astype(np.uint8))


def _character(rng, character, fonts, size):
  """Returns the mask of a character, turned."""
  from PIL import Image, ImageDraw, ImageFont

  font = ImageFont.truetype(
    str(fonts[rng.integers(len(fonts))]), int(size * rng.uniform(0.6, 0.8))
  )
  mask = Image.new("L", (size, size))
  ImageDraw.Draw(mask).text(
    (size / 2, size / 2), character, fill=255, font=font, anchor="mm"
  )
  turned = mask.rotate(rng.uniform(-20, 20), Image.Resampling.BICUBIC)
  return turned.crop(turned.getbbox())


def _shape(rng, shape, size):
  """Returns the mask of a shape."""
  from PIL import Image, ImageDraw

  width = int(size * rng.uniform(0.2, 0.3))
  mask = Image.new("L", (width, width))
  draw, box = ImageDraw.Draw(mask), (0, 0, width - 1, width - 1)
  if shape == "circle":
    draw.ellipse(box, fill=255)
  elif shape == "square":
    draw.rectangle(box, fill=255)
  else:
    draw.polygon(
      [(0, width - 1), (width - 1, width - 1), (width / 2, 0)], fill=255
    )
  return mask
