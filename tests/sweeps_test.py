"""Arms as overrides of a config, and what makes two configs the same."""

import json
import pathlib

import ml_collections
import pytest

from configs import base, tiny
from experiments import sweeps, tuning
from moe_jax.core.errors import ConfigError
from moe_jax.run import config as config_lib

ROOT = pathlib.Path(__file__).parents[1]


def test_sweep_algebra():
  k = sweeps.over("model.moe.top_k", {"k1": 1, "k2": 2})
  rate = sweeps.over("optim.learning_rate", {"slow": 1e-3, "fast": 1e-2})
  both = sweeps.product(k, rate)
  assert list(both) == ["k1-slow", "k1-fast", "k2-slow", "k2-fast"]
  assert both["k2-slow"] == {"model.moe.top_k": 2, "optim.learning_rate": 1e-3}
  with pytest.raises(ConfigError, match="model.moe.top_k twice"):
    sweeps.product(k, k)
  with pytest.raises(ConfigError, match='two arms are called "a-b-c"'):
    sweeps.product({"a": {}, "a-b": {}}, {"b-c": {}, "c": {}})


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


def test_where_arms_start():
  arms = sweeps.over("optim.learning_rate", {"a": 1e-3, "b": 1e-2, "c": 1e-1})
  config = tiny.get_config()
  with pytest.raises(ConfigError, match='starts names the arm "aa"'):
    sweeps.Sweep(config, arms, starts={"aa": "b"})
  with pytest.raises(ConfigError, match="arm b starts from a, .* from c; give"):
    sweeps.Sweep(config, arms, starts={"a": "c", "b": "a"})


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


def test_plugins_of_a_question_lie_beside_it(tmp_path):
  """First there, then where the command runs; and a digest is of their files."""
  digests = []
  for folder in (tmp_path / "here", tmp_path / "there"):
    (folder / "parts" / "routers").mkdir(parents=True)
    (folder / "parts" / "routers" / "mine.py").write_text("x = 1")
    config = sweeps.apply(tiny.get_config(), {"plugins": ("parts", "no_parts")})
    arms = {"all": {}, "none": {"plugins": ()}, "own": {"plugins": ("parts",)}}
    sweep = sweeps.Sweep(config, arms).beside(folder)
    own = str(folder / "parts")
    assert {k: c.plugins for k, c in sweep.configs().items()} == {
      "all": (own, "no_parts"),
      "none": (),
      "own": (own,),
    }
    digests.append(sweeps.digest(sweep.configs()["own"]))
  assert digests[0] == digests[1] != sweeps.digest(tiny.get_config())
  (folder / "parts" / "routers" / "mine.py").write_text("x = 2")
  assert sweeps.digest(sweep.configs()["own"]) != digests[0]


# A value for each key that it does not have.
CHANGED = {str: "other", int: 12345, float: 0.12345, tuple: ("x",)}
IDLE = (*config_lib.IDLE, "seed", "plugins")


@pytest.mark.parametrize(
  "key, value", list(config_lib.flat(tiny.get_config().to_dict()))
)
def test_the_digest_changes_with_what_changes_the_numbers(key, value):
  base = tiny.get_config()
  new = not value if isinstance(value, bool) else CHANGED.get(type(value), 0.5)
  if isinstance(value, dict):
    new = {"x": {"name": "y"}}
  changed = sweeps.apply(base, {key: new})
  same = sweeps.digest(changed) == sweeps.digest(base)
  assert same == key.startswith(IDLE)


def test_a_new_option_changes_no_digest(monkeypatch):
  """Committed rows stay those of their arms; only a run that sets it changes."""
  before, get_config = sweeps.digest(tiny.get_config()), base.get_config

  def longer():
    c = get_config()
    with c.unlocked():
      c.model.moe.brand_new = 0
      c.brand_new = ml_collections.ConfigDict({"name": "x"})
    return c

  monkeypatch.setattr(base, "get_config", longer)
  c = tiny.get_config()
  assert c.model.moe.brand_new == 0
  assert sweeps.digest(c) == before
  assert sweeps.digest(sweeps.apply(c, {"model.moe.brand_new": 1})) != before
  assert sweeps.digest(sweeps.apply(c, {"brand_new.name": "y"})) != before


def test_a_part_with_fewer_options_is_another_one():
  """A default of configs/base.py that is left out is no default of `build`."""
  c = base.get_config()
  c.model.moe.dispatcher = {"name": "gather"}
  assert sweeps.digest(c) != sweeps.digest(base.get_config())


def test_the_defaults_that_committed_rows_are_told_apart_from():
  """A digest says what differs from them, so one that changes has to be set by
  every sweep with committed rows; then the file may be written anew. Keys that
  are new do not matter.
  """
  now = dict(config_lib.flat(base.get_config().to_dict()))
  then = json.loads((ROOT / "tests" / "defaults.json").read_text())
  changed = {k for k, v in then.items() if json.loads(json.dumps(now[k])) != v}
  assert not changed


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
