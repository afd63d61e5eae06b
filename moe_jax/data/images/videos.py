"""Videos or their latents in a folder of arrays; images as one-frame videos.

  train_video.npy      [N, F, H, W, channels], bytes of pixels, or fractions
  train_label.npy      [N], classes from 0 on; may be left out
  train_text.npy       [N, M, T], vectors of a text encoder; may be left out
  train_text_mask.npy  [N, M], False for padding; may be left out
  train_more.npy       [N, F, H, W, more channels], further inputs of a model;
                       may be left out

and the same for `validation`. The files are mapped, and only the parts that are
used are loaded.
"""

import dataclasses
import hashlib
import itertools
import operator
import pathlib
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import numpy as np

from moe_jax.core.errors import ConfigError, first_line
from moe_jax.data import batches, caches, sources
from moe_jax.data.images import prepared

SPLITS = sources.SPLITS
_KINDS = ("video", "label", "text", "text_mask", "more")
_AXES = dict(zip(_KINDS, (5, 1, 3, 2, 5)))
_TYPES = {  # The letters that numpy has for the types of a kind, and words for them.
  "label": (np.typecodes["AllInteger"], "whole numbers"),
  "text": ("efd", "float16, float32 or float64"),
  "text_mask": ("?", "True and False"),
}
# The types and words of the other kinds: videos, and further channels.
_NUMBERS = ("Befd", "bytes (uint8), float16, float32 or float64")
_FORMAT = "arrays 1"  # Change it when arrays are hashed or checked differently.
_READ_AT_ONCE = 2**24  # Bytes.
_LARGEST = np.finfo(np.float32).max


class Features(prepared.Features):
  """The features of images for a task that also reads arrays."""

  @property
  def words(self) -> str:
    """See `sources.Wanted`."""
    return f"{super().words}, or arrays such as train_video.npy"


@dataclasses.dataclass(frozen=True)
class Videos:
  """The videos of a dataset. Without `arrays` there are none.

  name: of the dataset.
  shape: F, H, W and channels of every video.
  num_classes: number of classes of the labels; 0: there are no labels.
  text: (M, T) of the texts' vectors; None: there are none.
  more_channels: number of channels of a model's further inputs.
  fingerprint: changes when the content does.
  arrays: {split: {kind: array of all videos}}.
  sources: {name: version} of everything that they were made from.
  """

  name: str
  shape: tuple[int, int, int, int]
  num_classes: int = 0
  text: tuple[int, int] | None = None
  more_channels: int = 0
  fingerprint: str = ""
  arrays: Mapping[str, Mapping[str, np.ndarray]] = dataclasses.field(
    default_factory=dict, repr=False, compare=False
  )
  sources: Mapping = dataclasses.field(default_factory=dict)


def of_images(images: prepared.Images) -> Videos:
  """Returns images as videos of one frame, whose classes are their labels."""
  return Videos(
    images.name,
    (1, *images.shape),
    num_classes=len(images.classes),
    fingerprint=images.fingerprint,
    arrays={
      split: {"video": pixels[:, None], "label": labels}
      for split, (pixels, labels) in images.arrays.items()
    },
    sources=images.sources,
  )


def numbers(video, dtype=jnp.float32):
  """Returns bytes as numbers from -1 to 1; other numbers keep their values.

  Args:
    video: uint8, or fractions.
    dtype: of the result, which has at least float32.
  """
  dtype = jnp.promote_types(dtype, jnp.float32)
  if video.dtype == jnp.uint8:
    return video.astype(dtype) / 127.5 - 1
  return video.astype(dtype)


def is_folder(folder: str | None) -> bool:
  """Whether a folder has arrays of videos."""
  if folder is None:
    return False
  return (pathlib.Path(folder).expanduser() / "train_video.npy").is_file()


def of_folder(name: str, folder: str, cache_dir: str | None = None) -> Videos:
  """Returns the videos of a folder.

  Args:
    name: a name of your choice, for messages.
    folder: see the head of this file.
    cache_dir: the folder of caches, where fingerprints of files are kept, see
      `caches.entry`.

  Raises:
    ConfigError: a file is missing or damaged, or arrays do not fit together or
      have numbers that are not finite.
  """
  path = pathlib.Path(folder).expanduser()
  files, arrays = {}, {split: {} for split in SPLITS}
  for split, kind in itertools.product(SPLITS, _KINDS):
    file = path / f"{split}_{kind}.npy"
    if file.exists():
      files[file] = arrays[split][kind] = _mapped(file, _AXES[kind])
  first = arrays["train"]
  for split, own in arrays.items():
    _check(path, split, own, first)
  text, label = first.get("text"), first.get("label")
  more = first.get("more")
  return Videos(
    name,
    first["video"].shape[1:],
    num_classes=0 if label is None else int(label.max()) + 1,
    text=None if text is None else text.shape[1:],
    more_channels=0 if more is None else more.shape[-1],
    fingerprint=_fingerprint(name, files, cache_dir),
    arrays=arrays,
    sources={"data_dir": str(path)},
  )


def _fingerprint(name, files, cache_dir):
  """Returns the sha256 of all arrays, which are read only if a file has changed."""
  stats = [(str(file.absolute()), file.stat()) for file in files]
  # ctime changes with the content even where somebody sets the time back.
  key = [(file, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for file, s in stats]
  entry = caches.entry(name, cache_dir, [_FORMAT, key])

  def write(folder):
    digests = {file.name: _digest(file, x) for file, x in files.items()}
    index = {"format": _FORMAT, "fingerprint": caches.sha256(digests)}
    caches.write_index(folder, index)

  def opened(folder):
    return caches.read(folder, _FORMAT, operator.itemgetter("fingerprint"))

  return caches.get(name, entry, write, opened)


def _digest(file, array):
  """Returns the sha256 of an array, of which a part is in memory at a time.

  Raises:
    ConfigError: a number is NaN or infinite, or would be infinite in float32.
  """
  digest = hashlib.sha256(repr((array.dtype.str, array.shape)).encode())
  rows = max(1, _READ_AT_ONCE * len(array) // array.nbytes)
  for start in range(0, len(array), rows):
    part = np.ascontiguousarray(array[start : start + rows])
    digest.update(part)
    fits = (np.abs(part) <= _LARGEST).reshape(len(part), -1).all(axis=1)
    if not fits.all():
      raise ConfigError(
        f"{file} has NaN, infinity or a number beyond float32 in row"
        f" {start + fits.argmin()}, counted from 0; mend that row, or remove it from"
        " all arrays of its split"
      )
  return digest.hexdigest()


def _mapped(file, axes):
  try:
    array = np.load(file, mmap_mode="r", allow_pickle=False)
  except (OSError, ValueError, EOFError) as e:
    raise ConfigError(
      f"{file} is no whole array ({first_line(e)}); write it again with numpy.save"
    ) from e
  if not isinstance(array, np.ndarray) or array.ndim != axes:
    raise ConfigError(
      f"{file} has the shape {getattr(array, 'shape', 'of several arrays')}, and"
      f" {axes} axes are needed: see docs/data.md"
    )
  return array


def _check(path, split, own, first):
  """Raises ConfigError for arrays of a split that do not fit together."""
  if own.keys() != first.keys():
    lacking = sorted(first.keys() ^ own.keys())
    raise ConfigError(
      f"{path} has {', '.join(lacking)} in one split alone; train and {split} need the"
      " same kinds of arrays"
    )
  sizes = {kind: len(array) for kind, array in own.items()}
  if len(set(sizes.values())) > 1 or not sizes["video"]:
    raise ConfigError(
      f"the arrays of {split} in {path} have {sizes} entries; give each as many, and"
      " one or more"
    )
  for kind, array in own.items():
    for fits, words in _requirements(kind, array, first[kind]):
      if not fits:
        raise ConfigError(f"{path}: {split}_{kind}.npy has {words}")
  _check_pairs(path, split, own)


def _requirements(kind, array, other):
  """Yields (whether an array meets a requirement, words for the other case).

  Args:
    kind: of the array.
    array: of a split.
    other: the training array of the same kind.
  """
  dtype, (letters, types) = array.dtype, _TYPES.get(kind, _NUMBERS)
  yield (
    dtype.char in letters and (dtype.isnative or kind == "label"),
    f"the type {dtype}, and it needs {types}, in this machine's order of bytes; write"
    " it again",
  )
  yield (
    all(array.shape),
    f"the shape {array.shape}, and every size must be at least 1; write it again",
  )
  yield (
    array.shape[1:] == other.shape[1:],
    f"entries of shape {array.shape[1:]}, and those of train {other.shape[1:]}; make"
    " them equal",
  )
  yield (
    dtype == other.dtype or kind == "label",
    f"the type {dtype}, and that of train has {other.dtype}; write both with one type",
  )
  if kind == "label":
    yield from _label_requirements(array, other)


def _label_requirements(label, known):
  """Yields the requirements of labels, as `_requirements` does."""
  low, high, most = (int(x) for x in (label.min(), label.max(), known.max()))
  yield (
    low >= 0,
    f"the label {low}, and labels begin at 0; number the classes from 0 on",
  )
  yield (
    high <= most,
    f"labels up to {high}, and those of train go up to {most}; remove these videos, or"
    " add their classes to train",
  )
  distinct = len(np.unique(known))
  yield (
    most < 10 * distinct + 1000,
    f"{distinct} distinct labels up to {most}, and there would be {most + 1} classes;"
    " number the classes from 0 on without such gaps",
  )


def _check_pairs(path, split, own):
  """Raises ConfigError for an array without the array that it belongs to."""
  sides = {"more": ("video", slice(1, 4)), "text_mask": ("text", slice(1, 2))}
  for kind, (of, axes) in sides.items():
    if kind in own and (of not in own):
      raise ConfigError(
        f"{path} has {split}_{kind}.npy without {split}_{of}.npy; add it"
      )
    if kind in own and own[kind].shape[axes] != own[of].shape[axes]:
      raise ConfigError(
        f"{path}: {split}_{kind}.npy has the sizes {own[kind].shape[axes]}, and"
        f" {split}_{of}.npy {own[of].shape[axes]}; make them equal"
      )


def train_batches(
  videos: Videos,
  seed: int,
  rows: np.ndarray | None = None,
  *,
  batch_size: int,
  accumulation: int | None = None,
) -> batches.ByStep:
  """Returns the training batches: every epoch is a new order of all videos.

  Args:
    videos: from `of_images` or `of_folder`.
    seed, rows, batch_size, accumulation: as in `batches.train_batches`.

  Returns:
    Batches by step: the kinds that there are, [B, ...] each; `mask` bool [B],
    True; `time` float32 [B], -1: the timestep is drawn; and `number` int32 [B],
    the index of the row in the stream.
  """
  import grain  # Slow to import: only where data is read.

  arrays = videos.arrays["train"]
  order = grain.MapDataset.range(len(arrays["video"])).seed(seed).shuffle()
  order = order.repeat()

  def read(places):
    numbers = np.array([order[place] for place in places.tolist()], int)
    return _batch(arrays, numbers, numbers, np.full(len(numbers), -1.0))

  return batches.by_step(read, batch_size, accumulation, rows)


def validation_batches(
  videos: Videos,
  ranges: Mapping[str, tuple[float, float]],
  rows: np.ndarray | None = None,
  *,
  batch_size: int,
  batches_per_domain: int | None = None,
) -> Iterator[tuple[str, batches.Batch]]:
  """Returns every validation video once in every range of timesteps.

  Args:
    videos, rows: as in `train_batches`.
    ranges: {name: (from, to)} of timesteps; the timesteps of all videos cover
      each range evenly.
    batch_size, batches_per_domain: as in `batches.validation_batches`.

  Returns:
    Pairs of a range's name and a batch as in `train_batches`, with a `time`.
    Its last rows may be padding, with `mask` False.
  """
  arrays = videos.arrays["validation"]
  count = len(arrays["video"])
  chosen = batch_size, batches_per_domain, rows
  # The times cover a range evenly; those of a few batches are spread over it.
  order = np.random.default_rng(0).permutation(count)
  for name, numbers, read in batches.validation_rows(
    dict.fromkeys(ranges, count), *chosen
  ):
    low, high = ranges[name]
    share = (order[read] + 0.5) / count
    padded = np.resize(np.append(read, 0), len(numbers))
    time = np.resize(np.append(low + share * (high - low), low), len(numbers))
    mask = np.arange(len(numbers)) < len(read)
    yield name, _batch(arrays, padded, padded, time) | {"mask": mask}


def _batch(arrays, places, numbers, time):
  """Returns a batch of the videos at `places`."""
  batch = {kind: np.asarray(array[places]) for kind, array in arrays.items()}
  if "label" in batch:
    batch["label"] = batch["label"].astype(np.int32)
  batch |= {"time": time.astype(np.float32), "number": numbers.astype(np.int32)}
  return batch | {"mask": np.ones(len(places), bool)}
