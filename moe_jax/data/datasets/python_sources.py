"""Python source files of our own dependencies: code beside English prose.

The text is real and already on every machine where this package is installed.
It has two labelled domains: `code` (a file without its docstrings) and
`docstrings` (the docstrings of one file, joined). See docs/data.md; it is not a
benchmark.
"""

import ast
import hashlib
import inspect
import re
import sys
import warnings

from moe_jax.core.errors import ConfigError
from moe_jax.data import sources
from moe_jax.data.datasets import _builder, installed

# Dependencies of ours, all of them under Apache-2.0 or BSD.
DISTRIBUTIONS = (
  *("absl-py", "chex", "flax", "grain", "jax", "ml_collections", "numpy"),
  *("optax", "orbax-checkpoint", "scipy"),
)
# Files are taken until each domain has this many bytes.
BYTES = {"code": 9_000_000, "docstrings": 4_000_000}
MIN_BYTES = 500  # A shorter document is an import or two.
MAX_FILE_BYTES = 64_000  # Longer files would make up a split by themselves.

_HEADER = re.compile(r"\A(?:[ \t]*(?:#[^\n]*)?\n)+")
_DOCUMENTED = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef


def build() -> type[_builder.Texts]:
  """Returns the TFDS builder of this dataset."""
  return PythonSources


class PythonSources(_builder.Texts):
  """Code and docstrings of the Python files of our dependencies."""

  DOMAINS = tuple(BYTES)
  TEXTS = ("text", "document")

  @staticmethod
  def sources() -> dict[str, str]:
    """Returns {name: version} of Python and the packages that have the text."""
    versions = {name: installed(name).version for name in DISTRIBUTIONS}
    # A file with newer syntax than the interpreter's is left out.
    return {"python": "{}.{}".format(*sys.version_info[:2]), **versions}

  def splits(self):
    """Returns {split: pairs of a key and an example}."""
    return split(_enough())


def split(files) -> dict[str, list]:
  """Returns {split: pairs of a key and an example}.

  Args:
    files: pairs (file name, {domain: text}).
  """
  examples = {"train": [], "validation": []}
  for name, texts in files:
    own = examples[sources.split_of(texts["code"].encode())]
    for domain, text in texts.items():
      example = {"text": text, "domain": domain, "document": name}
      own.append((f"{domain}/{name}", example))
  return examples


def files(distributions):
  """Yields (file name, {domain: text}) of the files of installed packages.

  A file that repeats a text of an earlier one is left out as a whole, so that
  no text is there twice and both domains of a file are in the same split.

  Args:
    distributions: `importlib.metadata.Distribution`s.
  """
  seen = set()
  for name, path in paths(distributions):
    texts = _texts(path)
    if "code" not in texts or not seen.isdisjoint(texts.values()):
      continue
    seen.update(texts.values())
    yield name, texts


def _enough():
  """Yields files of our dependencies until every domain has its bytes."""
  size = dict.fromkeys(BYTES, 0)
  for name, texts in files(map(installed, DISTRIBUTIONS)):
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


def paths(distributions):
  """Returns (name, path) of Python files, ordered by a hash of their names.

  The order mixes the distributions, so that a part of the list is a fair sample
  of it.

  Args:
    distributions: `importlib.metadata.Distribution`s.
  """
  found = {}
  for distribution in distributions:
    for file in distribution.files or ():
      name = file.as_posix()
      # Tests repeat themselves, and carry tables of expected numbers.
      if name.endswith(".py") and "test" not in name:
        found[name] = distribution.locate_file(file)
  return sorted(
    found.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest()
  )


def parsed(path) -> tuple[str, ast.Module] | None:
  """Returns the source of a file below its licence, and its tree.

  It returns None for a file that is too long, is listed and not there, or is
  not Python for this interpreter.

  Args:
    path: the file.
  """
  try:
    content = path.read_bytes()
    if len(content) > MAX_FILE_BYTES:
      return None
    # The licence above the code is the same in thousands of files: it would
    # be learnt by heart, and it would be in both splits.
    source = _HEADER.sub("", content.decode("utf-8").replace("\r\n", "\n"))
    # The files' own warnings: invalid escapes and the like.
    with warnings.catch_warnings(action="ignore"):
      return source, ast.parse(source)
  except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
    return None


def _texts(path):
  """Returns {domain: text} of a file, without the texts that are too short."""
  found = parsed(path)
  if not found:
    return {}
  source, tree = found
  nodes = _docstring_nodes(tree)
  docstrings = "\n\n".join(inspect.cleandoc(node.value) for node in nodes)
  texts = {
    "code": _without(source, nodes),
    # Lone surrogates cannot be encoded: they become question marks.
    "docstrings": docstrings.encode("utf-8", "replace").decode(),
  }
  return {k: text for k, text in texts.items() if len(text) >= MIN_BYTES}


def _docstring_nodes(tree):
  """Returns the docstrings' constants, in the order of the source."""
  docstrings, statements = [], [tree]
  while statements:  # ast.walk would also visit every expression: 5x slower.
    node = statements.pop()
    if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False):
      docstrings.append(node.body[0].value)
    for field in ("body", "orelse", "handlers", "finalbody", "cases"):
      statements.extend(getattr(node, field, ()))
  return sorted(docstrings, key=lambda node: (node.lineno, node.col_offset))


def _without(source, nodes):
  """Returns the source without these nodes, and without lines left empty."""
  source = source.encode()  # Columns of ast count bytes.
  starts = [0]
  for line in source.split(b"\n"):
    starts.append(starts[-1] + len(line) + 1)
  for node in reversed(nodes):
    begin = starts[node.lineno - 1] + node.col_offset
    end = starts[node.end_lineno - 1] + node.end_col_offset
    line_begin = source.rfind(b"\n", 0, begin) + 1
    line_end = source.find(b"\n", end) + 1 or len(source)
    if not (source[line_begin:begin] + source[end:line_end]).strip():
      begin, end = line_begin, line_end
    source = source[:begin] + source[end:]
  return source.decode().strip() + "\n"
