"""Where documents come from: TFDS datasets, built in, known to it, or a folder."""

import contextlib
import difflib
import hashlib
import inspect
import io
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from moe_jax.core import registry
from moe_jax.core.errors import ConfigError, first_line

SPLITS = ("train", "validation")

# Domain features that need not be there: the default, and the one for none.
_NO_DOMAIN = ("domain", "none")
_VALIDATION_PART = 16  # Held out where a dataset has no validation split.
_READ_AT_ONCE = 256  # Documents.


class Features(NamedTuple):
  """Names of the features that are read."""

  text: str
  domain: str


class Source(NamedTuple):
  """A dataset that may have to be prepared yet.

  versions: the names and versions that its content depends on.
  builder: scratch folder -> TFDS builder of the prepared dataset.
  """

  versions: dict[str, str]
  builder: Callable[[pathlib.Path], Any]


def find(
  name: str, data_dir, plugins: tuple[str, ...], wanted: Features
) -> Source:
  """Returns the source of a dataset, see `corpora.prepare`.

  Raises:
    ConfigError: no such dataset, folder or feature.
  """
  if data_dir:
    return _from_directory(data_dir)
  if name in registry.names("datasets", plugins):
    return _built_in(name, plugins)
  return _from_directory(_known_to_tfds(name, plugins, wanted))


def check(name: str, builder, wanted: Features) -> None:
  """Raises ConfigError for a dataset that lacks what is read."""
  _check_features(name, builder.info.features, wanted)
  sizes = {k: v.num_examples for k, v in builder.info.splits.items()}
  if not sizes.get("train") or not sizes.get("validation", 1):
    raise ConfigError(
      f"dataset {name} has no documents in the split train, or an empty split"
      f" validation: {sizes}; prepare a copy of it that has documents there"
    )


def _check_features(name, features, wanted):
  import tensorflow_datasets as tfds

  features = dict(features.items())
  texts = [k for k, v in features.items() if isinstance(v, tfds.features.Text)]
  text = features.get(wanted.text)
  plain = isinstance(text, tfds.features.Tensor) and not text.shape
  if wanted.text not in texts and not (
    plain and text.np_dtype in (np.object_, np.str_)
  ):
    kind = "not there" if text is None else f"a {type(text).__name__}"
    raise ConfigError(
      f'the feature "{wanted.text}" of dataset {name} is not text but {kind};'
      f" set data.text_feature to one that is: {sorted(texts)}"
    )
  if wanted.domain not in (*_NO_DOMAIN, *features):
    raise ConfigError(
      f'dataset {name} has no feature "{wanted.domain}", but {sorted(features)};'
      ' set data.domain_feature to one of them, or to "none" for one domain'
    )


def label_names(builder, features: Features) -> list[str]:
  """Returns the domains that the dataset declares, in its order."""
  feature = dict(builder.info.features.items()).get(features.domain)
  return list(getattr(feature, "names", None) or ())


def read(
  name: str, builder, features: Features
) -> Iterator[tuple[str, str, bytes]]:
  """Yields (split, domain, text as bytes) of every document.

  Raises:
    ConfigError: a file of the dataset is damaged.
  """
  names = label_names(builder, features)
  held_out = "validation" in builder.info.splits
  for split in SPLITS if held_out else ("train",):
    for example in _examples(name, builder, split):
      text = _as_bytes(example[features.text])
      domain = example.get(features.domain, "text")
      if names:  # TFDS has -1 for a document without a label.
        domain = names[domain] if domain >= 0 else "unlabelled"
      else:
        domain = _as_bytes(domain).decode("utf-8", "replace")
      yield (split if held_out else _split_of(text)), domain, text


def _examples(name, builder, split):
  with _in_a_sentence(
    f"the split {split} of dataset {name} cannot be read",
    "prepare the dataset again",
  ):
    source = builder.as_data_source(split=split)
    for start in range(0, len(source), _READ_AT_ONCE):
      stop = min(start + _READ_AT_ONCE, len(source))
      yield from source.__getitems__(list(range(start, stop)))


@contextlib.contextmanager
def _in_a_sentence(what, remedy):
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
      builder.download_and_prepare(download_dir=folder / "downloads")
    shutil.rmtree(folder / "downloads", ignore_errors=True)
    return builder

  return Source(versions, prepared)


def _known_to_tfds(name, plugins, wanted):
  """Returns the folder of a dataset of TFDS, prepared if need be."""
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder(name, file_format="array_record")
  except Exception as e:  # Also of the network, for community datasets.
    raise ConfigError(
      f'there is no dataset "{name}", neither built in nor known to TFDS'
      f"{_near(name, plugins)} For one of your own, set data.dir to the folder of"
      " a prepared TFDS dataset"
    ) from e
  _check_features(name, builder.info.features, wanted)  # Before a download.
  if not builder.is_prepared():
    with _in_a_sentence(  # No network, package, or space on the disk.
      f"TFDS cannot prepare the dataset {name} here",
      "prepare it elsewhere with file_format='array_record' and set data.dir to"
      " its folder",
    ):
      builder.download_and_prepare()
  return builder.data_dir


def _near(name, plugins):
  """Returns '; did you mean ...?' with names, or configs of its dataset."""
  import tensorflow_datasets as tfds

  known = set(tfds.list_builders(with_community_datasets=False))
  dataset, _, config = name.partition("/")
  if config and dataset in known:
    configs = tfds.builder_cls(dataset).builder_configs
    known = {f"{dataset}/{config}" for config in configs}
  else:
    known |= set(registry.names("datasets", plugins))
  near = difflib.get_close_matches(name, sorted(known), n=3)
  return f"; did you mean {' or '.join(near)}?" if near else "."


def _from_directory(data_dir):
  from etils import epath  # Buckets too, where their client is installed.

  folder = epath.Path(data_dir).expanduser()
  if not (folder / "dataset_info.json").exists():
    reason = "has no dataset_info.json" if folder.exists() else "does not exist"
    raise ConfigError(
      f"data.dir {folder} {reason}; give the folder of one version of a "
      "prepared TFDS dataset, such as ~/tensorflow_datasets/NAME/1.0.0"
    )
  stats = [(f.name, f.stat()) for f in sorted(folder.iterdir())]
  files = "".join(f"{name} {s.length} {s.mtime}\n" for name, s in stats)
  digest = hashlib.sha256(files.encode()).hexdigest()
  versions = {"data_dir": str(folder), "files": digest}
  return Source(versions, lambda _: _open_builder(folder))


def _open_builder(folder):
  import tensorflow_datasets as tfds

  with _in_a_sentence(
    f"data.dir {folder} cannot be read", "prepare the dataset again"
  ):
    builder = tfds.builder_from_directory(folder)
    form = builder.info.file_format.value
  if form not in ("array_record", "parquet"):
    raise ConfigError(
      f"data.dir {folder} is in {form} format, which only TensorFlow reads; "
      'prepare the dataset with file_format="array_record"'
    )
  return builder


def _as_bytes(value):
  return value if isinstance(value, bytes) else str(value).encode()


def _split_of(text):
  part = int(hashlib.sha256(text).hexdigest(), 16) % _VALIDATION_PART
  return "train" if part else "validation"
