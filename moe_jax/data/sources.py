"""Where documents come from: TFDS datasets, built in, known to it, or a folder."""

import contextlib
import difflib
import hashlib
import inspect
import io
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from moe_jax.core import registry
from moe_jax.core.errors import ConfigError, first_line

SPLITS = ("train", "validation")

# Domain features that need not be there: the default, and what says so.
_NO_DOMAIN = ("domain", "none")
_VALIDATION_PART = 16  # Held out where a dataset has no validation split.
_READ_AT_ONCE = 256  # Documents.


class Features(NamedTuple):
  """Names of the features that are read."""

  text: str
  domain: str


class Source(NamedTuple):
  """Where documents come from."""

  versions: dict[str, str]  # What the content depends on.
  builder: Callable[[pathlib.Path], Any]  # scratch folder -> prepared builder.


def find(
  name: str, data_dir, plugins: tuple[str, ...], wanted: Features
) -> Source:
  """The source of a dataset, see `tokens.prepare`.

  Raises:
    ConfigError: no such dataset, folder or feature.
  """
  if data_dir:
    return _from_directory(data_dir)
  if name in registry.names("datasets", plugins):
    return _built_in(name, plugins)
  return _from_directory(_known_to_tfds(name, plugins, wanted))


def check(name: str, builder, wanted: Features) -> None:
  """Raises ConfigError for a dataset that has not what is read."""
  _check_features(name, builder.info.features, wanted)
  splits = builder.info.splits
  if "train" not in splits:
    raise ConfigError(
      f'dataset {name} has no split "train", but {sorted(splits)}; prepare a'
      " copy of the dataset that has one"
    )
  for split in SPLITS:
    if split in splits and not splits[split].num_examples:
      raise ConfigError(
        f'the split "{split}" of dataset {name} is empty; prepare it with'
        " documents, or without that split"
      )


def _check_features(name, features, wanted):
  import tensorflow_datasets as tfds

  if wanted.text not in features:
    raise ConfigError(
      f'dataset {name} has no feature "{wanted.text}", but {sorted(features)};'
      " set data.text_feature to one that is text"
    )
  text = features[wanted.text]
  plain = isinstance(text, tfds.features.Tensor) and not text.shape
  if not isinstance(text, tfds.features.Text) and not (
    plain and text.np_dtype in (np.object_, np.str_)
  ):
    names = [
      k for k, v in features.items() if isinstance(v, tfds.features.Text)
    ]
    raise ConfigError(
      f'the feature "{wanted.text}" of dataset {name} is not text but'
      f" {type(text).__name__}; text are {sorted(names)}: set data.text_feature"
    )
  if wanted.domain not in (*_NO_DOMAIN, *features):
    raise ConfigError(
      f'dataset {name} has no feature "{wanted.domain}", but {sorted(features)};'
      ' set data.domain_feature to one of them, or to "none" for one domain'
    )


def label_names(builder, features: Features) -> list[str]:
  """Names of the domains where the dataset knows them, in its order."""
  known = builder.info.features
  if features.domain not in known:
    return []
  return list(getattr(known[features.domain], "names", None) or ())


def documents(builder, features: Features) -> Iterator[tuple[str, str, bytes]]:
  """Yields (split, domain, text as bytes) of every document."""
  names = label_names(builder, features)
  held_out = "validation" in builder.info.splits
  for split in SPLITS if held_out else ("train",):
    source = builder.as_data_source(split=split)
    for start in range(0, len(source), _READ_AT_ONCE):
      stop = min(start + _READ_AT_ONCE, len(source))
      for example in source.__getitems__(list(range(start, stop))):
        text = _as_bytes(example[features.text])
        domain = example.get(features.domain, "text")
        if names:  # TFDS has -1 for a document without a label.
          domain = names[domain] if domain >= 0 else "unlabelled"
        else:
          domain = _as_bytes(domain).decode()
        yield (split if held_out else _split_of(text)), domain, text


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
  """The folder of a dataset that TFDS finds by name, prepared if need be."""
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
    try:
      builder.download_and_prepare()
    except Exception as e:  # Of the network, a missing package, a full disk.
      raise ConfigError(
        f"TFDS cannot prepare the dataset {name} here ({first_line(e)}); prepare"
        " it elsewhere with file_format='array_record' and set data.dir to its"
        " folder"
      ) from e
  return builder.data_dir


def _near(name, plugins):
  """The names like it, or the configs of the dataset that it is of."""
  import tensorflow_datasets as tfds

  known = set(tfds.list_builders(with_community_datasets=False))
  dataset, _, config = name.partition("/")
  if config and dataset in known:
    configs = sorted(tfds.builder_cls(dataset).builder_configs)
    near = difflib.get_close_matches(config, configs, n=3) or configs[:3]
    near = [f"{dataset}/{c}" for c in near]
  else:
    known |= set(registry.names("datasets", plugins))
    near = difflib.get_close_matches(name, known, n=3)
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
  versions = {"data_dir": str(folder), "files": _digest(json.dumps(files))}
  return Source(versions, lambda _: _open_builder(folder))


def _open_builder(folder):
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder_from_directory(folder)
    form = builder.info.file_format.value
  except Exception as e:  # Whatever damage makes TFDS raise.
    raise ConfigError(
      f"data.dir {folder} cannot be read ({first_line(e)}); prepare the dataset"
      " again"
    ) from e
  if form not in ("array_record", "parquet"):
    raise ConfigError(
      f"data.dir {folder} is in {form} format, which only TensorFlow reads; "
      'prepare the dataset with file_format="array_record"'
    )
  return builder


def _as_bytes(value):
  return value if isinstance(value, bytes) else str(value).encode()


def _split_of(text):
  part = int(_digest(text), 16) % _VALIDATION_PART
  return "validation" if part == 0 else "train"


def _digest(text):
  text = text if isinstance(text, bytes) else text.encode()
  return hashlib.sha256(text).hexdigest()
