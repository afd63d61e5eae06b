"""A TFDS builder of labelled texts, the base class of the built-in datasets."""

import tensorflow_datasets as tfds


class Texts(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Texts of some domains. A subclass has these constants, and a method `splits`
  that returns {split: pairs of a key and an example}.

  DOMAINS: names of the domains.
  TEXTS: names of the features that are text.
  """

  VERSION = tfds.core.Version("1.0.0")
  TEXTS = ("text",)

  def _info(self) -> tfds.core.DatasetInfo:
    features = {name: tfds.features.Text() for name in self.TEXTS}
    features["domain"] = tfds.features.ClassLabel(names=list(self.DOMAINS))
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__,
      features=tfds.features.FeaturesDict(features),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing is downloaded.
    return {k: self._generate_examples(v) for k, v in self.splits().items()}

  def _generate_examples(self, examples):
    yield from examples
