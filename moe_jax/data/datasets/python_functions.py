"""Functions of our dependencies: a sentence about each, and its definition.

Pairs of texts that are already on every machine where this package is installed. A
source is the first sentence of a docstring, and its target is the definition of the
function, without type annotations:

  Returns the mean of an array along an axis
  def mean(a, axis=None):

See docs/data.md; it is not a benchmark.
"""

import ast
import inspect

from moe_jax.data.datasets import _builder, installed, python_sources

MOST_BYTES = 127  # As bytes, such a text has 128 tokens with its end.
_FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef


def build() -> type[_builder.Texts]:
  """Returns the TFDS builder of this dataset."""
  return PythonFunctions


class PythonFunctions(_builder.Texts):
  """First sentences of docstrings, and the definitions of their functions.

  Its one split is `train`; a hash of each source decides whether the pair is
  held out.
  """

  DOMAINS = ("functions",)
  TEXTS = ("source", "target")

  sources = staticmethod(python_sources.PythonSources.sources)

  def splits(self):
    """Returns {"train": pairs of a number and an example}."""
    return {"train": enumerate(_examples())}


def _examples():
  """Yields examples; a source that was there before is left out."""
  seen = set()
  distributions = map(installed, python_sources.DISTRIBUTIONS)
  for _, path in python_sources.paths(distributions):
    _, tree = python_sources.parsed(path) or ("", ast.Module([], []))
    for node in ast.walk(tree):
      if isinstance(node, _FUNCTIONS) and ast.get_docstring(node):
        source, target = _sentence(ast.get_docstring(node)), _definition(node)
        short = max(len(source.encode()), len(target.encode())) <= MOST_BYTES
        if source and short and source not in seen:
          seen.add(source)
          yield {"source": source, "target": target, "domain": "functions"}


def _sentence(docstring):
  """The first sentence, on one line."""
  paragraph = inspect.cleandoc(docstring).split("\n\n")[0]
  sentence = " ".join(paragraph.split()).partition(". ")[0].rstrip(".")
  # Lone surrogates cannot be encoded: they become question marks.
  return sentence.encode("utf-8", "replace").decode()


def _definition(node):
  """The first line of a function, without type annotations."""
  for argument in ast.walk(node.args):
    if isinstance(argument, ast.arg):
      argument.annotation = None
  return f"def {node.name}({ast.unparse(node.args)}):"
