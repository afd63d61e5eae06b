"""Repositories of the Hugging Face hub, by name, and the folders they are copied to.

  hf:ORG/NAME            a repository
  hf:ORG/NAME/PATH       a folder in it; for a dataset also a file or a pattern
  hf:ORG/NAME@REVISION   at a branch, a tag or a commit; without it, at main

Only files that are read are downloaded, into the cache of huggingface_hub. A process
sees one snapshot of a repository.
"""

import functools
import pathlib
import re
from typing import NamedTuple

from moe_jax.core.errors import ConfigError, first_line

PREFIX = "hf:"
_PLAIN = re.compile(r"\w[\w.-]*/[\w.-]+")
_NAME = re.compile(
  rf"{PREFIX}({_PLAIN.pattern})((?:/(?!\.+(?:/|@|$))[^/@]+)*)(?:@(\S+))?"
)
_OF_MODELS = ("config.json", "generation_config.json", "tokenizer.json")
_OF_MODELS += ("*.safetensors", "*.safetensors.index.json")
# A dataset may have its rows in several forms: the first form here is read.
_OF_DATASETS = ("*.parquet", "*.jsonl", "*.jsonl.gz")
_HELD_OUT = re.compile(r"(^|[-_./])(test|valid|validation|dev)[-_./]")


class _Repository(NamedTuple):
  """text: as the user wrote it; kind: "model" or "dataset"; inside: a path or ""."""

  text: str
  kind: str
  id: str
  inside: str
  revision: str | None


def is_named(path: str) -> bool:
  """Whether a path of weights is a name on the hub.

  It is a name if it begins with hf:, or has the form ORG/NAME where there is no
  folder ORG here. A misspelt path in a folder that exists is never looked up on
  the hub.
  """
  plain = _PLAIN.fullmatch(path) and not pathlib.Path(path).parent.exists()
  return path.startswith(PREFIX) or bool(plain)


def weights(path: str) -> str:
  """Returns the folder of published weights.

  Args:
    path: a name on the hub, see `is_named`; any other path is returned
      unchanged.

  Raises:
    ConfigError: the weights cannot be downloaded, or are no safetensors files;
      or the path has the form of a name and is not there.
  """
  if not is_named(path):
    here = pathlib.Path(path)
    # The path may also be the prefix of files' names.
    if _PLAIN.fullmatch(path) and not any(here.parent.glob(f"{here.name}*")):
      raise ConfigError(
        f"there is no folder {path}; give one, or hf:{path} if that is a name on the"
        " Hugging Face hub"
      )
    return path
  place = _repository(path, "model")
  begin = f"{place.inside}/" if place.inside else ""
  # The files of folders inside, and weights in a second form, are not read.
  left_out = f"{begin}*/*", f"{begin}consolidated*"
  folder = _snapshot(place, tuple(begin + x for x in _OF_MODELS), left_out)
  if not any((folder / place.inside).glob("*.safetensors")):
    raise ConfigError(
      f"{path} has no safetensors files on the Hugging Face hub; take a repository"
      " or a folder of one, hf:ORG/NAME/FOLDER, that has them"
    )
  return str(folder / place.inside)


def dataset(name: str) -> str:
  """Returns the pattern of a dataset's files on disk, as `data.dir` takes it.

  Args:
    name: a name on the hub, with hf:. Its path may be a folder, or a file or
      pattern, whose last part has a dot or a star. Without a path, all files of
      the first form that the dataset has are read: parquet, jsonl, or jsonl.gz.

  Raises:
    ConfigError: the files cannot be downloaded, or there are none, or, in a
      folder, some seem to be held out by their names.
  """
  place = _repository(name, "dataset")
  if re.search(r"[.*][^/]*$", place.inside):
    forms = (place.inside,)
  else:
    forms = tuple(f"{place.inside}/**/{x}".strip("/") for x in _OF_DATASETS)
  for form in forms:
    folder = _snapshot(place, (form.replace("**/", ""),), ())
    files = sorted(str(x.relative_to(folder)) for x in folder.glob(form))
    held_out = [file for file in files if _HELD_OUT.search(file)]
    if held_out and "**" in form:
      raise ConfigError(
        f"{name} has files that seem to be held out, such as {held_out[0]}; name"
        f" those to read, such as {_example(place, files)}"
      )
    if files:
      return str(folder / form)
  raise ConfigError(
    f"{name} has no files {' or '.join(forms)} on the Hugging Face hub; name others,"
    " such as hf:ORG/NAME/*.txt"
  )


def _example(place, files):
  """A name with a pattern for the training files."""
  file = next((x for x in files if not _HELD_OUT.search(x)), files[0])
  pattern = re.sub(r"(train)[^/]*?(\.\w+(\.gz)?)$", r"\1*\2", file)
  at = f"@{place.revision}" if place.revision else ""
  return f"{PREFIX}{place.id}/{pattern}{at}"


def _repository(text, kind):
  """The repository that a name stands for.

  Raises:
    ConfigError: the name has not the form of a name on the hub.
  """
  plain = PREFIX + text.removeprefix(PREFIX)
  if not (found := _NAME.fullmatch(plain)):
    raise ConfigError(
      f"{text} is no name on the Hugging Face hub; give hf:ORG/NAME, with a /PATH or"
      " an @REVISION behind if need be"
    )
  repository, inside, revision = found.groups()
  return _Repository(text, kind, repository, inside.strip("/"), revision)


@functools.cache
def _snapshot(place, wanted, left_out):
  """The folder with the wanted files of a repository.

  Args:
    place: `_Repository`.
    wanted, left_out: patterns, in which a star stands for slashes too.

  Raises:
    ConfigError: it cannot be downloaded, or huggingface_hub is not installed.
  """
  try:
    import huggingface_hub
  except ImportError:
    raise ConfigError(
      f"{place.text} is on the Hugging Face hub, which needs the extra hf: pip install"
      " 'moe_jax[hf]', or give the folder of a copy that is on this machine"
    ) from None
  try:
    folder = huggingface_hub.snapshot_download(
      place.id,
      repo_type=place.kind,
      revision=place.revision,
      allow_patterns=list(wanted),
      ignore_patterns=list(left_out),
    )
  except Exception as e:  # The network, the name or the disk failed.
    raise ConfigError(
      f"{place.text} cannot be downloaded from the Hugging Face hub ({first_line(e)});"
      " check the name and your access to it, or give the folder of a copy that is on"
      " this machine"
    ) from e
  return pathlib.Path(folder)
