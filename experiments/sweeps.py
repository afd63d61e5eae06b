"""Sweeps: arms by name, each a dict from dotted config key to value.

  product(
    over("model.moe.top_k", {"k1": 1, "k2": 2}),
    over("optim.learning_rate", {"slow": 1e-3, "fast": 1e-2}),
  )

has the arms k1-slow, k1-fast, k2-slow and k2-fast.
"""

import copy
import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections

from experiments import tuning
from moe_jax.core.errors import ConfigError, did_you_mean
from moe_jax.run import config as config_lib

Arms = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Sweep:
  """What a question runs at one scale.

  config: what all arms share.
  arms: {name: {dotted key: value}}; a name is also a folder's.
  seeds: how many (0, 1, ...), unless another number is asked for.
  stages: what is tuned for every arm before its seeds are run.
  seeds_of: {arm: how many}, for arms that get another number of them.
  """

  config: ml_collections.ConfigDict
  arms: Mapping[str, Mapping[str, Any]]
  seeds: int = 3
  stages: tuple[tuning.Stage, ...] = ()
  seeds_of: Mapping[str, int] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    """Raises ConfigError for names of arms that there are not."""
    named = {"seeds_of": self.seeds_of}
    for number, stage in enumerate(self.stages):
      named[f"stages[{number}].like"] = [*stage.like, *stage.like.values()]
      for field in ("key", "values"):
        value = getattr(stage, field)
        names = value if isinstance(value, Mapping) else ()
        named[f"stages[{number}].{field}"] = names
    for field, names in named.items():
      for name in names:
        if name not in self.arms:
          raise ConfigError(
            f'{field} names the arm "{name}", which this sweep does not have'
            + did_you_mean(name, self.arms)
          )

  def configs(self) -> dict[str, ml_collections.ConfigDict]:
    """The config of each arm, as it is before anything is tuned."""
    return {name: apply(self.config, o) for name, o in self.arms.items()}


def over(key: str, values: Mapping[str, Any]) -> Arms:
  """An arm for each named value of one key."""
  return {name: {key: value} for name, value in values.items()}


def chain(*several: Arms) -> Arms:
  """The arms of one sweep after those of the other."""
  return _unique(item for arms in several for item in arms.items())


def product(*several: Arms) -> Arms:
  """Every arm of one sweep with every arm of the others."""
  items = (arms.items() for arms in several)
  return _unique(_join(parts) for parts in itertools.product(*items))


def zipped(*several: Arms) -> Arms:
  """The first arms together, the second ones together, and so on."""
  sizes = [len(arms) for arms in several]
  if len(set(sizes)) != 1:
    raise ConfigError(f"sweeps of {sizes} arms cannot be zipped")
  items = (arms.items() for arms in several)
  return _unique(_join(parts) for parts in zip(*items))


def apply(
  config: ml_collections.ConfigDict, overrides: Mapping[str, Any]
) -> ml_collections.ConfigDict:
  """A locked copy of a config with overrides; a dict replaces a section.

  Raises:
    ConfigError: no such key, or a value of another type.
  """
  new = copy.deepcopy(config)
  if not new.is_locked:
    new.lock()
  for key, value in overrides.items():
    config_lib.override(new, f"{key}={value!r}")
  return new


def digest(config: ml_collections.ConfigDict) -> str:
  """Twelve hexadecimal digits that change with what a run's numbers depend on.

  That is any value but the seed and, for instance, the mesh; and any file of a
  plugin, as its path alone does not say what it does. A run that goes on may
  find its data elsewhere, but two folders are two datasets to an experiment.
  """
  values = dict(config_lib.numbers(config.to_dict()))
  values.pop("seed", None)
  # It decides which runs are given up.
  values["train.max_skipped_in_a_row"] = config.train.max_skipped_in_a_row
  if config.data.dir is not None:
    values["data.dir"] = config.data.dir
  for label, part in config.data.mixture.items():
    if part.get("dir") is not None:
      values[f"data.mixture.{label}.dir"] = part["dir"]
  values["plugin_files"] = [
    (f.relative_to(folder).as_posix(), f.read_text())
    for folder in map(pathlib.Path, config.get("plugins", ()))
    for f in sorted(folder.glob("*/*.py"))
  ]
  text = json.dumps(values, sort_keys=True, separators=(",", ":"))
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def _join(parts):
  """Several (name, overrides) as one."""
  name = "-".join(name for name, _ in parts)
  together = {}
  for _, overrides in parts:
    twice = sorted(together.keys() & overrides.keys())
    if twice:
      raise ConfigError(f'arm "{name}" sets {", ".join(twice)} twice')
    together |= overrides
  return name, together


def _unique(items):
  arms = {}
  for name, overrides in items:
    if name in arms:
      raise ConfigError(f'two arms are called "{name}"; rename one')
    arms[name] = dict(overrides)
  return arms
