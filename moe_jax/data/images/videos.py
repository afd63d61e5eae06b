"""Videos or their latents in a folder of arrays, and images as videos of one frame.

  train_video.npy      [N, F, H, W, channels], bytes of pixels, or numbers
  train_label.npy      [N], classes from 0 on; may be left out
  train_text.npy       [N, M, T], vectors that a text encoder has made; may be left out
  train_text_mask.npy  [N, M], False for padding; may be left out
  train_more.npy       [N, F, H, W, more channels] that a model reads beside; may be
                       left out

and the same for `validation`. The files are mapped, and only what is read is loaded.
"""

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Videos:
  """The videos of a dataset. Without `arrays` there are none.

  name: of the dataset.
  shape: F, H, W and channels of every video.
  num_classes: of the labels; 0: there are none.
  text: (M, T) of the texts' vectors; None: there are none.
  more_channels: of what a model reads beside.
  fingerprint: changes when the data does.
  arrays: {split: {kind: array of all videos}}.
  sources: names and versions of what they were made from.
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
  """Images as videos of one frame, whose classes are their labels."""
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
  """Numbers from -1 to 1 of bytes, in at least float32; others as they are."""
  dtype = jnp.promote_types(dtype, jnp.float32)
  if video.dtype == jnp.uint8:
    return video.astype(dtype) / 127.5 - 1
  return video.astype(dtype)


def is_folder(folder: str | None) -> bool:
  """Whether a folder has arrays of videos."""
  if folder is None:
    return False
  return (pathlib.Path(folder).expanduser() / "train_video.npy").is_file()


def of_folder(name: str, folder: str) -> Videos:
  """The videos of a folder.

  Args:
    name: to call it by.
    folder: see the head of this file.

  Raises:
    ConfigError: a file is missing or damaged, or arrays do not fit together.
  """
  path, arrays, stats = pathlib.Path(folder).expanduser(), {}, []
  for split in SPLITS:
    arrays[split] = {}
    for kind in _KINDS:
      file = path / f"{split}_{kind}.npy"
      if file.exists():
        arrays[split][kind] = _mapped(file, _AXES[kind])
        stats.append((file.name, file.stat().st_size, file.stat().st_mtime))
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
    fingerprint=caches.sha256(stats),
    arrays=arrays,
    sources={"data_dir": str(path)},
  )


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
  _check_kinds(path, split, own)
  for kind, array in own.items():
    if array.shape[1:] != first[kind].shape[1:]:
      raise ConfigError(
        f"{path}: {split}_{kind}.npy has entries of shape {array.shape[1:]}, and those"
        f" of train {first[kind].shape[1:]}; make them equal"
      )
  label, known = own.get("label"), first.get("label")
  if label is not None and not 0 <= label.min() <= label.max() <= known.max():
    raise ConfigError(
      f"{path}: {split}_label.npy has labels from {label.min()} to {label.max()}, and"
      f" those of train go from 0 to {known.max()}"
    )


def _check_kinds(path, split, own):
  """Raises ConfigError for arrays of a split of the wrong type, or of other sizes."""
  kinds = {"label": "iu", "text_mask": "b"}
  for kind, array in own.items():
    if array.dtype.kind not in kinds.get(kind, "uf"):
      what = {"label": "whole numbers", "text_mask": "True and False"}
      raise ConfigError(
        f"{path}: {split}_{kind}.npy has the type {array.dtype}, and it needs"
        f" {what.get(kind, 'bytes (uint8) or fractions')}; write it again"
      )
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
    Batches by step: the kinds that there are, `mask` bool [B], True, `time` -1: it is
    drawn, and `number` int32 [B], of the row in the stream.
  """
  import grain  # Slow to import: only for who reads data.

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
    ranges: {name: (from, to)} of timesteps. Those of all videos cover one evenly.
    batch_size, batches_per_domain: as in `batches.validation_batches`.

  Returns:
    Pairs of a range's name and a batch as in `train_batches`, with a `time`. Its last
    rows may be padding, with `mask` False.
  """
  arrays = videos.arrays["validation"]
  count = len(arrays["video"])
  chosen = batch_size, batches_per_domain, rows
  # All cover a range evenly, and those of a few batches are spread over it.
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
  """Returns these videos."""
  batch = {kind: np.asarray(array[places]) for kind, array in arrays.items()}
  if "label" in batch:
    batch["label"] = batch["label"].astype(np.int32)
  batch |= {"time": time.astype(np.float32), "number": numbers.astype(np.int32)}
  return batch | {"mask": np.ones(len(places), bool)}
