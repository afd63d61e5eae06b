"""Sweeps: arms by name, each a dict from dotted config key to value.

  product(
    over("model.moe.top_k", {"k1": 1, "k2": 2}),
    over("optim.learning_rate", {"slow": 1e-3, "fast": 1e-2}),
  )

has the arms k1-slow, k1-fast, k2-slow and k2-fast.
"""

import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ml_collections

from configs import base
from experiments import tuning
from moe_jax.core.errors import ConfigError, did_you_mean
from moe_jax.run import config as config_lib

Arms = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Sweep:
  """The arms and seeds of a question at one scale.

  config: what all arms share.
  arms: {name: {dotted key: value}}; a name is also a folder's.
  seeds: how many (0, 1, ...), unless another number is asked for.
  stages: what is tuned for every arm before its seeds are run.
  seeds_of: {arm: how many}, for arms that get another number of them.
  starts: {arm: another one, whose trained model of the same seed it starts from}. The
    option `upcycle` of the arm says what is made of that model; empty, it has the
    same layers. The other one must not be in `starts` itself.
  """

  config: ml_collections.ConfigDict
  arms: Mapping[str, Mapping[str, Any]]
  seeds: int = 3
  stages: tuple[tuning.Stage, ...] = ()
  seeds_of: Mapping[str, int] = dataclasses.field(default_factory=dict)
  starts: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    """Raises ConfigError for names of arms that there are not."""
    named = [("seeds_of", name) for name in self.seeds_of]
    named += [("starts", n) for pair in self.starts.items() for n in pair]
    for number, stage in enumerate(self.stages):
      names = {"like": [*stage.like, *stage.like.values()]}
      for field, value in (("key", stage.key), ("values", stage.values)):
        names[field] = value if isinstance(value, Mapping) else ()
      named += [(f"stages[{number}].{f}", n) for f in names for n in names[f]]
    for field, name in named:
      if name not in self.arms:
        raise ConfigError(
          f'{field} names the arm "{name}", which this sweep does not have'
          + did_you_mean(name, self.arms)
        )
    for arm, source in self.starts.items():
      if source in self.starts:
        raise ConfigError(
          f"the arm {arm} starts from {source}, which starts from"
          f" {self.starts[source]}; give it one that starts from none"
        )

  def beside(self, folder: pathlib.Path) -> "Sweep":
    """The same sweep, which takes plugins that lie in a folder from there.

    Args:
      folder: of the question. Plugins that are not in it keep their path, which is
        relative to where the command runs.
    """

    def found(plugins):
      if not isinstance(plugins, list | tuple):  # `apply` refuses it.
        return plugins
      paths = [(folder / path, path) for path in plugins]
      return tuple(str(own) if own.is_dir() else path for own, path in paths)

    arms = {
      name: {k: found(v) if k == "plugins" else v for k, v in own.items()}
      for name, own in self.arms.items()
    }
    config = apply(self.config, {"plugins": found(self.config.plugins)})
    return dataclasses.replace(self, config=config, arms=arms)

  def asked(
    self, arms: Collection[str], texts: Sequence[str]
  ) -> tuple[tuple[str, ...], "Sweep"]:
    """(names of the wanted arms in their order, sweep with values for all arms).

    Args:
      arms: the names of those that are wanted; none of them: all.
      texts: KEY=VALUE.

    Raises:
      ConfigError: no such arm or key, or a key that is not the same for all the
        wanted arms.
    """
    for arm in arms:
      if arm not in self.arms:
        raise ConfigError(
          f'there is no arm "{arm}" at this scale'
          + did_you_mean(arm, self.arms)
        )
    names = tuple(arm for arm in self.arms if not arms or arm in arms)
    for key in (text.partition("=")[0] for text in texts):
      if key == "seed":
        raise ConfigError(
          "--config.seed differs between the runs of an arm; give --seeds=N"
        )
      for arm in self.starts.keys() & names:
        if key == "init_from":
          raise ConfigError(
            f"--config.init_from would have no effect on the arm {arm}, which starts"
            f" from {self.starts[arm]}; give --arm of others"
          )
      for arm, own in self._own(names):
        if f"{key}.".startswith(f"{own}.") or f"{own}.".startswith(f"{key}."):
          raise ConfigError(
            f"--config.{key} would have no effect on the arm {arm}, which has or"
            f" tunes a {own} of its own; change sweep.py, or train it alone with"
            " python -m moe_jax.main and a run's config.json"
          )
    config = config_lib.overridden(apply(self.config, {}), texts)
    return names, dataclasses.replace(self, config=config)

  def _own(self, arms):
    """(arm, key) of what arms set or tune by themselves."""
    for arm in arms:
      yield from ((arm, key) for key in self.arms[arm])
      for stage in self.stages:
        for overrides in stage.tried(stage.source(arm)).values():
          yield from ((arm, key) for key in overrides)

  def configs(self) -> dict[str, ml_collections.ConfigDict]:
    """The config of each arm, as it is before anything is tuned."""
    starts = {arm: {"init_from": source} for arm, source in self.starts.items()}
    return {
      name: apply(self.config, own | starts.get(name, {}))
      for name, own in self.arms.items()
    }


def over(key: str, values: Mapping[str, Any]) -> Arms:
  """An arm for each named value of one key."""
  return {name: {key: value} for name, value in values.items()}


def product(*several: Arms) -> Arms:
  """Every arm of one sweep with every arm of the others."""
  product = {}
  for parts in itertools.product(*(arms.items() for arms in several)):
    name, together = "-".join(name for name, _ in parts), {}
    for _, overrides in parts:
      twice = sorted(together.keys() & overrides.keys())
      if twice:
        raise ConfigError(f'arm "{name}" sets {", ".join(twice)} twice')
      together |= overrides
    if name in product:
      raise ConfigError(f'two arms are called "{name}"; rename one')
    product[name] = together
  return product


def apply(
  config: ml_collections.ConfigDict, overrides: Mapping[str, Any]
) -> ml_collections.ConfigDict:
  """A locked copy of a config with overrides; a dict replaces a section.

  Raises:
    ConfigError: no such key, or a value of another type.
  """
  texts = [f"{key}={value!r}" for key, value in overrides.items()]
  return config_lib.overridden(config_lib.locked(config.to_dict()), texts)


def digest(config: ml_collections.ConfigDict) -> str:
  """Twelve hexadecimal digits that change with the options of a run.

  These are the values that differ from configs/base.py, but for the seed and,
  for instance, the mesh; and the files of plugins, wherever they lie. An option that
  is added to configs/base.py changes no digest.
  """
  values = config_lib.differences(config.to_dict(), base.get_config().to_dict())
  idle = ("seed", "plugins", *config_lib.IDLE)
  values = {k: v for k, v in values.items() if not k.startswith(idle)}
  values["plugin_files"] = [
    (f.relative_to(folder).as_posix(), f.read_text())
    for folder in map(pathlib.Path, config.plugins)
    for f in sorted(folder.glob("*/*.py"))
  ]
  text = json.dumps(values, sort_keys=True, separators=(",", ":"))
  return hashlib.sha256(text.encode()).hexdigest()[:12]
