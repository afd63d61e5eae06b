"""Datasets: built in, known to TFDS, in a folder, or on the Hugging Face hub."""

import contextlib
import hashlib
import inspect
import io
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from absl import logging

from moe_jax.core import hub, registry
from moe_jax.core.errors import ConfigError, first_line, nearest

SPLITS = ("train", "validation")

_VALIDATION_PART = 16  # One in 16 is held out where there is no such split.
_READ_AT_ONCE = 256  # Examples.

# The names and versions that a dataset's content depends on, and a function
# that prepares the dataset in a folder and returns its TFDS builder. The parent
# of this folder is a scratch folder.
Source = tuple[dict[str, str], Callable[[pathlib.Path], Any]]


class Wanted(Protocol):
  """The features that a reader asks of a dataset."""

  def check(self, name: str, builder) -> None:
    """Raises ConfigError for a dataset that lacks a feature.

    Args:
      name: of the dataset, for the message.
      builder: of TFDS.
    """

  def plain(self, folder: pathlib.Path):
    """(paths that are read, () -> builder) for files that are no TFDS dataset.

    None: the folder has no such files.
    """

  @property
  def words(self) -> str:
    """The files that `plain` looks for, for a message after "give"."""


def find(
  name: str, data_dir, plugins: tuple[str, ...], wanted: Wanted
) -> Source:
  """Returns the source of a dataset, see `corpora.prepare` or `images.prepare`.

  Args:
    name: of the dataset.
    data_dir: a folder or pattern of files, or None.
    plugins: folders that are searched first for a builder of this name.
    wanted: the features that are read.

  Raises:
    ConfigError: there is no such dataset, folder or feature.
  """
  if not data_dir and name in registry.names("datasets", plugins):
    return _built_in(name, plugins)
  if not data_dir and name.startswith(hub.PREFIX):
    data_dir = hub.dataset(name)
  data_dir = data_dir or _known_to_tfds(name, plugins, wanted)
  return _from_directory(data_dir, wanted)


def tell_changed(made: Sequence, data_dir, wanted: Wanted) -> None:
  """Warns if files have changed since the data of a run were prepared.

  Args:
    made: prepared data of equal content, each with `name` and `sources`.
    data_dir: as in `find`; None: the data are not read from files of a user.
    wanted: as in `find`.
  """
  with contextlib.suppress(ConfigError):  # The files may be gone.
    known = [one.sources for one in made]
    if data_dir and find(made[0].name, data_dir, (), wanted)[0] not in known:
      logging.warning(
        "The files in %s have changed since this run began, which goes on with its"
        " prepared data; give another --workdir to train on the new ones",
        data_dir,
      )


def split_of(text: bytes) -> str:
  """Returns the split of an example, where a dataset has no validation split.

  Args:
    text: bytes of the example; its digest decides.
  """
  part = int(hashlib.sha256(text).hexdigest(), 16) % _VALIDATION_PART
  return "train" if part else "validation"


def examples(name: str, builder, split: str) -> Iterator[dict]:
  """Yields the examples of a split.

  Args:
    name: of the dataset, for errors.
    builder: of TFDS, or with a method `examples`.
    split: "train" or "validation", as TFDS writes splits.

  Raises:
    ConfigError: a file of the dataset is damaged.
  """
  with in_a_sentence(f"the split {split} of dataset {name} cannot be read"):
    if hasattr(builder, "examples"):  # Its examples cannot be indexed.
      yield from builder.examples(split)
      return
    source = builder.as_data_source(split=split)
    numbers = range(len(source))
    for start in numbers[::_READ_AT_ONCE]:
      yield from source.__getitems__(numbers[start : start + _READ_AT_ONCE])


@contextlib.contextmanager
def in_a_sentence(what, remedy="mend it, or prepare the dataset again"):
  """Turns any error of TFDS into a ConfigError.

  Args:
    what: a sentence that says what failed, for the message.
    remedy: what the user can do about it.

  Raises:
    ConfigError: there was an error.
  """
  try:
    yield
  except ConfigError:  # This is a sentence already.
    raise
  except Exception as e:
    raise ConfigError(f"{what} ({first_line(e)}); {remedy}") from e


def _built_in(name, plugins):
  builder_class = registry.load("datasets", name, plugins=tuple(plugins))
  versions = {name: str(builder_class.VERSION)}
  # A dataset that depends on more than its version says so.
  versions |= getattr(builder_class, "sources", dict)()

  def prepared(folder):
    import tensorflow_datasets as tfds  # Slow to import: only if needed.
    from etils import epath

    # TFDS would import a plugin's package to find it, but it is a lone file.
    builder_class.code_path = epath.Path(inspect.getfile(builder_class))
    tfds.disable_progress_bar()  # Preparing takes seconds; logs stay short.
    builder = builder_class(data_dir=folder, file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS names scratch paths.
      builder.download_and_prepare(download_dir=folder.parent / "downloads")
    return builder

  return versions, prepared


def _known_to_tfds(name, plugins, wanted):
  """Returns the folder of a dataset of TFDS, prepared if need be."""
  import tensorflow_datasets as tfds

  try:
    namespace = tfds.core.naming.parse_builder_name_kwargs(name)[0].namespace
  except ValueError:  # There is no dataset of such a name.
    namespace = None
  if namespace:
    raise ConfigError(
      f'"{name}" is a community dataset, whose code TFDS would download and run;'
      " prepare it yourself and set data.dir to its folder"
    )
  try:
    builder = tfds.builder(name, file_format="array_record")
  except Exception as e:  # Community datasets also need the network.
    if pathlib.Path(name).expanduser().exists():
      raise ConfigError(
        f'data.name = "{name}" is a place; set data.dir to it, and data.name to a'
        " word to call it by"
      ) from e
    known = set(tfds.list_builders(with_community_datasets=False))
    dataset = name.partition("/")[0]
    if dataset in known:
      configs = tfds.builder_cls(dataset).builder_configs
      known = {f"{dataset}/{config}" for config in configs}
    known |= set(registry.names("datasets", plugins))
    raise ConfigError(
      f'there is no dataset "{name}", neither built in nor known to TFDS'
      f"{nearest(name, known) or '.'} For one of your own, set data.dir to the"
      " folder of a prepared TFDS dataset, or of files, see docs/data.md"
    ) from e
  wanted.check(name, builder)  # Before a download.
  if not builder.is_prepared():
    what = f"TFDS cannot prepare the dataset {name} here"
    remedy = (
      "prepare it elsewhere with file_format='array_record' and set data.dir to"
      " its folder"
    )
    with in_a_sentence(what, remedy):  # Network, package or space may lack.
      builder.download_and_prepare()
  return builder.data_dir


def _from_directory(data_dir, wanted):
  from etils import epath  # Reads buckets too, if their client is installed.

  folder = epath.Path(data_dir).expanduser()
  plain = wanted.plain(folder)
  if not plain and not (folder / "dataset_info.json").exists():
    raise ConfigError(
      f"data.dir {folder} {_without_data(folder)}; give {wanted.words}, or the"
      " folder of one version of a prepared TFDS dataset, such as"
      " ~/tensorflow_datasets/NAME/1.0.0"
    )
  read = map(epath.Path, plain[0] if plain else sorted(folder.iterdir()))
  # A pattern is no folder: its files may lie in several.
  with in_a_sentence(
    f"data.dir {folder} cannot be read", "take that file away"
  ):
    stats = [(str(f).removeprefix(f"{folder}/"), f.stat()) for f in read]
  files = "".join(f"{name} {s.length} {s.mtime}\n" for name, s in stats)
  digest = hashlib.sha256(files.encode()).hexdigest()
  versions = {"data_dir": str(folder), "files": digest}

  def opened(_):
    import tensorflow_datasets as tfds

    what = f"data.dir {folder} cannot be read"
    if plain:
      with in_a_sentence(what):
        return plain[1]()
    with in_a_sentence(what), _features_of_tfds_alone():
      builder = tfds.builder_from_directory(folder)
      form, _ = builder.info.file_format.value, builder.info.features
    if form not in ("array_record", "parquet"):
      raise ConfigError(
        f"data.dir {folder} is in {form} format, which only TensorFlow reads; "
        'prepare the dataset with file_format="array_record"'
      )
    return builder

  return versions, opened


def _without_data(folder):
  """Words for a place without a dataset."""
  if not folder.exists():
    return "does not exist"
  if not folder.is_dir():
    return "is a file of a kind that is not read"
  names = sorted(path.name for path in folder.iterdir())
  if not names:
    return "is empty"
  several = f"{len(names)} files or folders, such as " if names[1:] else ""
  return f"holds nothing that is read, but {several}{names[0]}"


@contextlib.contextmanager
def _features_of_tfds_alone():
  """Refuses features whose class TFDS would import from a file of others."""
  import tensorflow_datasets as tfds

  connector = tfds.features.FeatureConnector
  original = vars(connector)["cls_from_name"]

  def checked(cls, name):
    if not name.startswith("tensorflow_datasets."):
      raise ValueError(f"its feature {name} is code of somebody else")
    return original.__func__(cls, name)

  connector.cls_from_name = classmethod(checked)
  try:
    yield
  finally:
    connector.cls_from_name = original
