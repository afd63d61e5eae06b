"""The drawn images of `glyphs` as codes, each before its caption: two modalities.

A document is an image of 12 x 12 pixels, row by row, and then its caption. A pixel is one
byte from 128 on, two bits of red, three of green and two of blue (image GPT has 512 colours,
Chen et al., 2020), and a caption is ASCII. So with `data.tokenizer = "bytes"` the
tokens below 128 are text, and those from 128 to 255 are image.
"""

import numpy as np

from moe_jax.data.datasets import _builder, glyphs

SIDE = 12  # Pixels of an image.
FIRST = 128  # The first code of a pixel.
_BITS = (2, 3, 2)  # Bits of red, green and blue.


def build() -> type[_builder.Texts]:
  """Returns the TFDS builder of this dataset."""
  return CaptionedGlyphs


class CaptionedGlyphs(_builder.Texts):
  """Codes of images, each before its caption."""

  DOMAINS = ("captioned",)

  @staticmethod
  def sources() -> dict[str, str]:
    """Returns {name: version} of the packages that draw the images."""
    return glyphs.Glyphs.sources() | {"glyphs": str(glyphs.Glyphs.VERSION)}

  def splits(self):
    """Returns {split: pairs of a number and an example}."""
    return {
      split: enumerate(map(_document, glyphs.images(number, count)))
      for number, (split, count) in enumerate(glyphs.NUM_IMAGES.items())
    }


def _document(example):
  codes, caption = codes_of(example["image"]), example["caption"]
  text = codes.tobytes() + caption.encode("ascii")
  return {"text": text, "domain": "captioned"}


def codes_of(image: np.ndarray) -> np.ndarray:
  """Returns the codes of an image [H, W, 3] made smaller, uint8 [SIDE^2]."""
  from PIL import Image

  smaller = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX)
  code = np.zeros((SIDE, SIDE), np.uint8)
  for channel, bits in zip(np.moveaxis(np.asarray(smaller), 2, 0), _BITS):
    code = (code << bits) | (channel >> (8 - bits))
  return (FIRST + code).ravel()


def pixels_of(codes: np.ndarray) -> np.ndarray:
  """Returns the image [SIDE, SIDE, 3] of codes.

  A colour is in the middle of those that share its code.

  Args:
    codes: integers from 128 to 255, [SIDE^2].
  """
  rest, channels = np.asarray(codes, np.int64) - FIRST, []
  for bits in reversed(_BITS):
    channels.append(((rest % 2**bits) * 256 + 128) // 2**bits)
    rest //= 2**bits
  image = np.stack(channels[::-1], axis=-1).astype(np.uint8)
  return image.reshape(SIDE, SIDE, 3)
