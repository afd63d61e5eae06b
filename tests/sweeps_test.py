"""Arms as overrides of a config, and what makes two configs the same."""

import pytest

from configs import tiny
from experiments import sweeps, tuning
from moe_jax.core.errors import ConfigError
from moe_jax.run import config as config_lib


def test_sweep_algebra():
  k = sweeps.over("model.moe.top_k", {"k1": 1, "k2": 2})
  rate = sweeps.over("optim.learning_rate", {"slow": 1e-3, "fast": 1e-2})
  both = sweeps.product(k, rate)
  assert list(both) == ["k1-slow", "k1-fast", "k2-slow", "k2-fast"]
  assert both["k2-slow"] == {"model.moe.top_k": 2, "optim.learning_rate": 1e-3}
  assert list(sweeps.zipped(k, rate)) == ["k1-slow", "k2-fast"]
  assert sweeps.zipped(k, rate)["k2-fast"] == both["k2-fast"]
  assert list(sweeps.chain(k, rate)) == ["k1", "k2", "slow", "fast"]
  with pytest.raises(ConfigError, match='two arms are called "k1"'):
    sweeps.chain(k, k)
  with pytest.raises(ConfigError, match="model.moe.top_k twice"):
    sweeps.product(k, k)
  with pytest.raises(ConfigError, match="cannot be zipped"):
    sweeps.zipped(k, {"one": {}})


@pytest.mark.parametrize(
  ("field", "stages", "seeds_of"),
  [
    ("seeds_of", (), {"slo": 2}),
    ("like", ({"like": {"slo": "fast"}},), {}),
    ("like", ({"like": {"fast": "slo"}},), {}),
    ("key", ({"key": {"slo": "optim.learning_rate"}},), {}),
    ("values", ({"values": {"slo": (1.0, 2.0)}},), {}),
  ],
)
def test_names_of_arms_that_there_are_not(field, stages, seeds_of):
  rate = sweeps.over("optim.learning_rate", {"slow": 1e-3, "fast": 1e-2})
  plain = {"key": "optim.learning_rate", "values": (1.0, 2.0)}
  with pytest.raises(ConfigError, match=f'{field} .*"slo".* mean "slow"'):
    sweeps.Sweep(
      tiny.get_config(),
      rate,
      stages=tuple(tuning.Stage(**(plain | stage)) for stage in stages),
      seeds_of=seeds_of,
    )


def test_overrides():
  base = tiny.get_config()
  new = sweeps.apply(
    base,
    {
      "model.moe.tokens_per_group": 32,
      "model.moe.balancers": {"b": {"name": "bias", "rate": 0.1}},
      "data.dir": "a 'quoted' folder",
      "mesh": (1, 2, 1, 1),
    },
  )
  assert new.model.moe.tokens_per_group == 32
  assert new.model.moe.balancers.b.rate == 0.1
  assert new.data.dir == "a 'quoted' folder"
  assert new.mesh == (1, 2, 1, 1)
  assert base.model.moe.tokens_per_group == "sequence"
  assert base.data.dir is None
  with pytest.raises(ConfigError, match='did you mean "top_k"?'):
    sweeps.apply(base, {"model.moe.topk": 1})
  with pytest.raises(ConfigError, match="of type str"):
    sweeps.apply(base, {"model.moe.top_k": "two"})


def leaves(section, prefix=""):
  for key, value in section.items():
    if hasattr(value, "items"):
      yield from leaves(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


CHANGED = {str: "other", int: 12345, float: 0.12345, tuple: ("x",)}


@pytest.mark.parametrize("key, value", list(leaves(tiny.get_config())))
def test_the_digest_changes_with_what_changes_the_numbers(key, value):
  base = tiny.get_config()
  new = not value if isinstance(value, bool) else CHANGED.get(type(value))
  if value is None:
    new = {"str": "x", "int": 3, "float": 0.5, "object": 0.5}[
      placeholder_type(base, key)
    ]
  changed = sweeps.apply(base, {key: new})
  same = sweeps.digest(changed) == sweeps.digest(base)
  unchanged = (
    *("seed", "mesh", "writers", "data.cache_dir"),
    *("train.profile_steps", "train.check_mesh"),
  )
  assert same == (key in unchanged or key.startswith("checkpoint."))


def placeholder_type(config, key):
  *sections, last = key.split(".")
  for section in sections:
    config = config[section]
  return config.get_type(last).__name__


def test_two_folders_are_two_datasets_to_an_experiment():
  def mixed(folder):
    part = {"a": {"name": "x", "dir": folder}}
    return sweeps.apply(tiny.get_config(), {"data.mixture": part})

  one, other = mixed("one"), mixed("other")
  assert sweeps.digest(one) != sweeps.digest(other)
  # But a run that goes on may find its data elsewhere.
  keys = [dict(config_lib.numbers(c.to_dict())) for c in (one, other)]
  assert keys[0] == keys[1] and keys[0]["data.mixture.a.name"] == "x"


def test_the_digest_is_of_the_values_alone():
  assert sweeps.digest(tiny.get_config()) == sweeps.digest(tiny.get_config())
