"""TFDS builders of texts and of images, the base classes of the built-in datasets."""

import io

import tensorflow_datasets as tfds


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Examples with some features.

  A subclass has a method `features`, which returns {name: feature}, and a
  method `splits`, which returns {split: pairs of a key and an example}.
  """

  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__,
      features=tfds.features.FeaturesDict(self.features()),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # It would download files, and there are none.
    return {k: self._generate_examples(v) for k, v in self.splits().items()}

  def _generate_examples(self, examples):
    yield from examples


class Texts(Builder, skip_registration=True):
  """Texts of some domains, with these constants.

  DOMAINS: names of the domains.
  TEXTS: names of the features that are text.
  """

  TEXTS = ("text",)

  def features(self):
    """Returns {name: feature of TFDS}: the texts and the domain."""
    texts = {name: tfds.features.Text() for name in self.TEXTS}
    return texts | {
      "domain": tfds.features.ClassLabel(names=list(self.DOMAINS))
    }


class Pictures(Builder, skip_registration=True):
  """Images of some classes, with these constants.

  SHAPE: height, width and channels.
  CLASSES: names of the classes.
  TEXTS: names of the features that are text.
  """

  TEXTS = ()

  def features(self):
    """Returns {name: feature of TFDS}: the texts, the image and the label."""
    features = {name: tfds.features.Text() for name in self.TEXTS}
    features["image"] = tfds.features.Image(
      shape=self.SHAPE, encoding_format="png"
    )
    return features | {
      "label": tfds.features.ClassLabel(names=list(self.CLASSES))
    }

  def _generate_examples(self, examples):
    for key, example in examples:
      yield key, example | {"image": _as_png(example["image"])}


def _as_png(pixels):
  """Returns a PNG file of an image; TFDS would need TensorFlow to make it."""
  from PIL import Image

  file = io.BytesIO()
  pixels = pixels[..., 0] if pixels.shape[2] == 1 else pixels
  Image.fromarray(pixels).save(file, "PNG")
  file.seek(0)
  return file
