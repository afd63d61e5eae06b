"""Documents of datasets: built in, known to TFDS, or in a folder."""

import contextlib
import hashlib
import inspect
import io
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from moe_jax.core import registry
from moe_jax.core.errors import ConfigError, first_line, nearest
from moe_jax.data import lines

SPLITS = ("train", "validation")

_VALIDATION_PART = 16  # Held out where a dataset has no validation split.
_READ_AT_ONCE = 256  # Documents.

# The names and versions that a dataset's content depends on, and a function
# that prepares the dataset in a folder and returns its TFDS builder. The parent
# of this folder is a scratch folder.
Source = tuple[dict[str, str], Callable[[pathlib.Path], Any]]


class Features(NamedTuple):
  """The features that are read.

  text: the name of one, which is a document; or those of a source and a target,
    which are two documents, one after the other.
  domain: the one that names the domain.
  prefix: text before every source that is not empty.
  begins: tokens before the sources, and before the targets, that are not empty.
  """

  text: str | tuple[str, str]
  domain: str
  prefix: str = ""
  begins: tuple[tuple[int, ...], ...] = ((), ())

  @property
  def texts(self) -> dict[str, str]:
    """{key of the config: feature} of `text`."""
    if isinstance(self.text, str):
      return {"data.text_feature": self.text}
    return dict(zip(("task.source", "task.target"), self.text))


def find(
  name: str, data_dir, plugins: tuple[str, ...], wanted: Features
) -> Source:
  """Returns the source of a dataset, see `corpora.prepare`.

  Raises:
    ConfigError: no such dataset, folder or feature.
  """
  if not data_dir and name in registry.names("datasets", plugins):
    return _built_in(name, plugins)
  data_dir = data_dir or _known_to_tfds(name, plugins, wanted)
  return _from_directory(data_dir, wanted)


def check(name: str, builder, wanted: Features) -> None:
  """Raises ConfigError for a dataset that lacks what is read.

  The sizes of its splits are not known, and not checked, before it is prepared.
  """
  import tensorflow_datasets as tfds

  features = dict(builder.info.features.items())
  # Shape and dtype; a nested dataset of texts has them too.
  text = ((), object)
  texts = [
    k
    for k, f in features.items()
    if isinstance(f, tfds.features.Tensor) and (f.shape, f.np_dtype) == text
  ]
  for key, text in wanted.texts.items():
    if text not in texts:
      what = "is not there"
      if text in features:
        what = f"is not text but a {type(features[text]).__name__}"
      raise ConfigError(
        f'the feature "{text}" of dataset {name} {what}; set {key} to a feature of'
        f" text: {', '.join(sorted(texts))}"
      )
  # The default feature of the domain need not be there.
  if wanted.domain not in ("domain", "none", *features):
    raise ConfigError(
      f'dataset {name} has no feature "{wanted.domain}", but {sorted(features)};'
      ' set data.domain_feature to one of them, or to "none" for one domain'
    )
  sizes = {k: v.num_examples for k, v in builder.info.splits.items()}
  if sizes and not (sizes.get("train") and sizes.get("validation", 1)):
    raise ConfigError(
      f"dataset {name} has no documents in the split train, or an empty split"
      f" validation: {sizes}; prepare a copy of it that has documents there"
    )


def label_names(builder, features: Features) -> list[str]:
  """Returns the domains that the dataset declares, in its order."""
  feature = dict(builder.info.features.items()).get(features.domain)
  return list(getattr(feature, "names", None) or ())


def split_of(text: bytes) -> str:
  """Returns the split of a document of a dataset that has no validation."""
  part = int(hashlib.sha256(text).hexdigest(), 16) % _VALIDATION_PART
  return "train" if part else "validation"


def read(
  name: str, builder, features: Features
) -> Iterator[tuple[str, str, bytes, tuple[int, ...]]]:
  """Yields (split, domain, text as bytes, tokens before it) of every document.

  The hash of an example's first text decides where it is held out.

  Raises:
    ConfigError: a file of the dataset is damaged.
  """
  names = label_names(builder, features)
  held_out = "validation" in builder.info.splits
  for split in SPLITS if held_out else ("train",):
    for example in _examples(name, builder, split):
      texts = [_as_bytes(example[name]) for name in features.texts.values()]
      domain = example.get(features.domain, "text")
      if names:  # TFDS has -1 for a document without a label.
        domain = names[domain] if domain >= 0 else "unlabelled"
      else:
        domain = _as_bytes(domain).decode("utf-8", "replace")
      own_split = split if held_out else split_of(texts[0])
      texts[0] = texts[0] and features.prefix.encode() + texts[0]
      for text, begin in zip(texts, features.begins):
        yield own_split, domain, text, begin if text else ()


def _examples(name, builder, split):
  with _in_a_sentence(f"the split {split} of dataset {name} cannot be read"):
    source = builder.as_data_source(split=split)
    numbers = range(len(source))
    for start in numbers[::_READ_AT_ONCE]:
      yield from source.__getitems__(numbers[start : start + _READ_AT_ONCE])


@contextlib.contextmanager
def _in_a_sentence(what, remedy="mend it, or prepare the dataset again"):
  """Turns whatever TFDS raises into a ConfigError."""
  try:
    yield
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
    tfds.disable_progress_bar()  # It takes seconds, and logs are kept.
    builder = builder_class(data_dir=folder, file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):  # It names scratch paths.
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
  except Exception as e:  # Also of the network, for community datasets.
    known = set(tfds.list_builders(with_community_datasets=False))
    dataset = name.partition("/")[0]
    if dataset in known:
      configs = tfds.builder_cls(dataset).builder_configs
      known = {f"{dataset}/{config}" for config in configs}
    known |= set(registry.names("datasets", plugins))
    raise ConfigError(
      f'there is no dataset "{name}", neither built in nor known to TFDS'
      f"{nearest(name, known) or '.'} For one of your own, set data.dir to the"
      " folder of a prepared TFDS dataset"
    ) from e
  check(name, builder, wanted)  # Before a download.
  if not builder.is_prepared():
    what = f"TFDS cannot prepare the dataset {name} here"
    remedy = (
      "prepare it elsewhere with file_format='array_record' and set data.dir to"
      " its folder"
    )
    with _in_a_sentence(what, remedy):  # No network, package, or disk space.
      builder.download_and_prepare()
  return builder.data_dir


def _from_directory(data_dir, wanted):
  from etils import epath  # Buckets too, where their client is installed.

  folder = epath.Path(data_dir).expanduser()
  names = tuple(wanted.texts.values())
  plain = lines.find(folder, names, SPLITS)
  if not plain and not (folder / "dataset_info.json").exists():
    reason = "has no dataset_info.json" if folder.exists() else "does not exist"
    raise ConfigError(
      f"data.dir {folder} {reason}; give the folder of one version of a "
      "prepared TFDS dataset, such as ~/tensorflow_datasets/NAME/1.0.0, or one"
      f" with train.jsonl, train.tsv or {' and '.join(f'train.{n}' for n in names)}"
    )
  read = sorted(sum(plain.values(), ()) if plain else folder.iterdir())
  stats = [(f.name, f.stat()) for f in read]
  files = "".join(f"{name} {s.length} {s.mtime}\n" for name, s in stats)
  digest = hashlib.sha256(files.encode()).hexdigest()
  versions = {"data_dir": str(folder), "files": digest}

  def opened(_):
    import tensorflow_datasets as tfds

    what = f"data.dir {folder} cannot be read"
    if plain:
      with _in_a_sentence(what):
        return lines.Builder(plain, names)
    with _in_a_sentence(what), _features_of_tfds_alone():
      builder = tfds.builder_from_directory(folder)
      form, _ = builder.info.file_format.value, builder.info.features
    if form not in ("array_record", "parquet"):
      raise ConfigError(
        f"data.dir {folder} is in {form} format, which only TensorFlow reads; "
        'prepare the dataset with file_format="array_record"'
      )
    return builder

  return versions, opened


@contextlib.contextmanager
def _features_of_tfds_alone():
  """Refuses features whose class TFDS would import from somebody else's file."""
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


def _as_bytes(value):
  return value if isinstance(value, bytes) else str(value).encode()
