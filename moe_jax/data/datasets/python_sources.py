"""Python source files of our own dependencies: code beside English prose.

Real text that is already on every machine where this package is installed, in
two labelled domains: `code` (a file without its docstrings) and `docstrings`
(the docstrings of one file, joined). See docs/data.md; it is not a benchmark.
"""

import ast
import hashlib
import inspect
import re
import sys
import warnings

import tensorflow_datasets as tfds

from moe_jax.core.errors import ConfigError
from moe_jax.data.datasets import installed

# Dependencies of ours, all of them under Apache-2.0 or BSD.
DISTRIBUTIONS = (
  "absl-py",
  "chex",
  "flax",
  "grain",
  "jax",
  "ml_collections",
  "numpy",
  "optax",
  "orbax-checkpoint",
  "scipy",
)
# Files are taken until each domain has this many bytes.
BYTES = {"code": 9_000_000, "docstrings": 4_000_000}
MIN_BYTES = 500  # A shorter document is an import or two.
MAX_FILE_BYTES = 64_000  # Longer files would make up a split by themselves.
VALIDATION_PART = 16  # One file of so many is held out.

_HEADER = re.compile(r"\A(?:[ \t]*(?:#[^\n]*)?\n)+")
_FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef


def build() -> type[tfds.core.GeneratorBasedBuilder]:
  """Returns the TFDS builder of this dataset."""
  return PythonSources


class PythonSources(tfds.core.GeneratorBasedBuilder):
  """Code and docstrings of the Python files of our dependencies."""

  VERSION = tfds.core.Version("1.0.0")

  @staticmethod
  def sources() -> dict[str, str]:
    """Returns what the text depends on besides VERSION: name -> version."""
    versions = {name: installed(name).version for name in DISTRIBUTIONS}
    # A file with newer syntax than the interpreter's is left out.
    python = "{}.{}".format(*sys.version_info[:2])
    return {"python": python, **versions}

  def _info(self) -> tfds.core.DatasetInfo:
    features = {
      "text": tfds.features.Text(),
      "domain": tfds.features.ClassLabel(names=list(BYTES)),
      "document": tfds.features.Text(),
    }
    features = tfds.features.FeaturesDict(features)
    return tfds.core.DatasetInfo(
      builder=self, description=__doc__, features=features
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing is downloaded.
    splits = {"train": [], "validation": []}
    for name, texts in _documents():
      splits[_split(texts["code"])].append((name, texts))
    return {k: self._generate_examples(files) for k, files in splits.items()}

  def _generate_examples(self, files):
    for name, texts in files:
      for domain, text in texts.items():
        example = {"text": text, "domain": domain, "document": name}
        yield f"{domain}/{name}", example


def _documents():
  """Yields (file name, {domain: text}) until every domain has its bytes.

  A file that repeats a text of an earlier one is left out as a whole, so that
  no text is there twice and both domains of a file are in the same split.
  """
  size = dict.fromkeys(BYTES, 0)
  seen = set()
  for name, path in _files():
    texts = _texts(path)
    if "code" not in texts or not seen.isdisjoint(texts.values()):
      continue
    seen.update(texts.values())
    yield name, texts
    for domain, text in texts.items():
      size[domain] += len(text.encode())
    if all(size[domain] >= BYTES[domain] for domain in BYTES):
      return
  raise ConfigError(
    f"datasets/python_sources: the installed sources of {DISTRIBUTIONS} hold "
    f"only {size} bytes where {BYTES} are needed; install these packages with "
    "pip, which keeps their sources and the list of their files"
  )


def _files():
  """Returns (name, path) of the candidates, in the order of their names' hash.

  The order mixes the distributions, so that a part of the list is a fair
  sample of it.
  """
  files = {}
  for distribution in map(installed, DISTRIBUTIONS):
    for file in distribution.files or ():
      name = file.as_posix()
      # Tests repeat themselves, and carry tables of expected numbers.
      if name.endswith(".py") and "test" not in name:
        files[name] = distribution.locate_file(file)
  return sorted(files.items(), key=lambda item: _hash(item[0]))


def _texts(path):
  """Returns {domain: text} of a file, without the texts that are too short."""
  try:
    content = path.read_bytes()
    if len(content) > MAX_FILE_BYTES:
      return {}
    # The licence above the code is the same in thousands of files: it would
    # be learnt by heart, and it would be in both splits.
    source = _HEADER.sub("", content.decode("utf-8").replace("\r\n", "\n"))
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # Theirs: invalid escapes and the like.
      tree = ast.parse(source)
  except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
    return {}  # Listed but not there, or not Python for this interpreter.
  nodes = _docstring_nodes(tree)
  texts = {
    "code": _without(source, nodes),
    "docstrings": "\n\n".join(_clean(node) for node in nodes),
  }
  return {k: text for k, text in texts.items() if len(text) >= MIN_BYTES}


def _docstring_nodes(tree):
  """Returns the docstrings' constants, in the order of the source."""
  docstrings, statements = [], [tree]
  while statements:  # ast.walk would also visit every expression: 5x slower.
    node = statements.pop()
    documented = isinstance(node, (ast.Module, ast.ClassDef, *_FUNCTIONS))
    if documented and ast.get_docstring(node, clean=False):
      docstrings.append(node.body[0].value)
    for field in ("body", "orelse", "handlers", "finalbody", "cases"):
      statements.extend(getattr(node, field, ()))
  return sorted(docstrings, key=lambda node: (node.lineno, node.col_offset))


def _clean(node):
  text = inspect.cleandoc(node.value)
  return text.encode("utf-8", "replace").decode()  # Lone surrogates.


def _without(source, nodes):
  """Returns the source without these nodes, nor the lines they leave empty."""
  source = source.encode()  # Columns of ast count bytes.
  starts = [0]
  for line in source.split(b"\n"):
    starts.append(starts[-1] + len(line) + 1)
  kept, done = [], 0
  for node in nodes:
    begin = starts[node.lineno - 1] + node.col_offset
    end = starts[node.end_lineno - 1] + node.end_col_offset
    line_begin = source.rfind(b"\n", 0, begin) + 1
    line_end = source.find(b"\n", end) + 1 or len(source)
    if not (source[line_begin:begin] + source[end:line_end]).strip():
      begin, end = line_begin, line_end
    kept.append(source[done:begin])
    done = end
  kept.append(source[done:])
  return b"".join(kept).decode().strip() + "\n"


def _split(code):
  held_out = int(_hash(code), 16) % VALIDATION_PART == 0
  return "validation" if held_out else "train"


def _hash(text):
  return hashlib.sha256(text.encode()).hexdigest()
