"""Configs: every key has one description, and what flags do to them."""

import argparse
import copy
import json
import math

import pytest

from configs import base, tiny
from moe_jax.core import options, registry
from moe_jax.core.errors import ConfigError
from moe_jax.run import config as config_lib
from moe_jax.run import run_directory
from moe_jax.training import program, train_step
from tests import small

DEFAULTS = dict(
  config_lib.flat(base.get_config().to_dict(), whole=config_lib.OPEN)
)
# Values that no key takes; and sizes that no array has.
NEVER = (math.nan, math.inf, -math.inf, 1e39, 10**39, object(), (None,), [[]])


def described(key):
  """The description of a dotted key, through the tables of its sections."""
  option = options.section(program.OPTIONS)
  for name in key.split("."):
    option = option.table[name]
  return option


def described_keys(table, prefix=""):
  for name, option in table.items():
    if option.table and prefix + name not in config_lib.OPEN:
      yield from described_keys(option.table, f"{prefix}{name}.")
    else:
      yield prefix + name


def changed(key, value):
  """A config with another value, and no conversions on the way."""
  c = base.get_config()
  *sections, last = key.split(".")
  section = c
  for name in sections:
    section = section[name]
  with section.ignore_type():
    section[last] = value
  return c


def test_every_key_has_one_description():
  keys = list(described_keys(options.section(program.OPTIONS).table))
  assert sorted(keys) == sorted(DEFAULTS)
  program.check(base.get_config())
  for key, value in DEFAULTS.items():
    described(key).check(value, key)


@pytest.mark.parametrize("key", DEFAULTS)
def test_what_no_key_takes_is_refused_with_its_name(key):
  option = described(key)
  values = NEVER if option.fits(None) else (*NEVER, None)
  if not option.is_number:
    values += (10**19, -(10**19))
  for value in values:
    with pytest.raises(ConfigError) as e:
      program.check(changed(key, value))
    assert str(e.value).startswith((f"{key} ", f"{key}[")), str(e.value)
    assert "\n" not in str(e.value)
  if option.fits(None):
    program.check(changed(key, None))


@pytest.mark.parametrize(
  "key",
  [
    *("mesh", "writers", "plugins", "train.profile_steps"),
    *("model.prefix", "model.pattern"),
  ],
)
def test_elements_are_checked(key):
  length = len(DEFAULTS[key]) or 1
  for value in (None, math.nan, 10**19, 1.5, ("a",), {}):
    with pytest.raises(ConfigError, match=rf"^{key}\[0\] = "):
      program.check(changed(key, (value,) * length))


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("seed=4294967296", ["seed = 4294967296", "0 to 2147483647"]),
    ("optim.learning_rate=-1.0", ["optim.learning_rate = -1.0", "0 or more"]),
    ("optim.final_fraction=-3.0", ["optim.final_fraction", "at most 1"]),
    ("optim.weight_decay=-5.0", ["optim.weight_decay = -5.0"]),
    ("optim.clip_norm=0.0", ["clip_norm", "None"]),
    ("optim.optimizer.name=adam", ["adam", "adamw"]),
    ("optim.schedule=cosin", ["cosin", "cosine"]),
    ("train.num_steps=ten", ["train.num_steps", "ten", "whole number"]),
    ("train.num_steps=0", ["train.num_steps = 0"]),
    ("train.accumulation=0", ["train.accumulation = 0"]),
    ("train.reduce_experts_once=3", ["reduce_experts_once = 3", "True or"]),
    ("eval.every=-1", ["eval.every = -1"]),
    ("checkpoint.every=-1", ["checkpoint.every = -1"]),
    ("checkpoint.keep_last=0", ["keep_last = 0"]),
    ("data.batch_size=0", ["data.batch_size = 0"]),
    ("data.seq_len=0", ["data.seq_len = 0"]),
    ("writers=('tensorbord',)", ["tensorbord", "tensorboard"]),
    ("mesh=(0,1,1,1)", ["mesh[0] = 0", "-1"]),
    ("mesh=(2,2,2)", ["mesh = (2, 2, 2)", "4 values"]),
    ("model.norm_eps=-1.0", ["model.norm_eps = -1.0", "above 0"]),
    ("model.rope_theta=0.0", ["model.rope_theta = 0.0"]),
    ("model.dtype=bf16", ["bf16", "bfloat16"]),
    ("model.remat=all", ["remat", "block"]),
    ("model.num_layers=1000000000", ["model.num_layers", "10000"]),
    ("model.moe.init_scale=0.0", ["model.moe.init_scale = 0.0", "above 0"]),
    ("model.moe.num_shared_experts=-1", ["num_shared_experts = -1"]),
    ("model.moe.capacity_factor=1e999", ["capacity_factor = inf"]),
    ("model.moe.capacity_factor=0.0", ["capacity_factor = 0.0"]),
    ("model.moe.eval_capacity_factor=droples", ['mean "dropless"']),
    ("model.moe.tokens_per_group=seqence", ["seqence", "sequence"]),
    ("model.moe.grouped_matmul=refrence", ["refrence", "reference"]),
    ("model.moe.exchange=all_gahter", ["all_gahter", "all_gather"]),
    ("model.attention={'clip': -1.0}", ["model.attention.clip = -1.0"]),
    ("model.attention={'clop': 1.0}", ["model.attention", 'mean "clip"']),
    ("model.attention={'temperature': (1, 2)}", ["temperature = (1, 2)"]),
    ("model.attention={'temperature': (1.0, 0, 0)}", ["temperature[1] = 0"]),
    (
      "model.attention.rope_scaling={'name': 'yarn', 'factor': 2.0}",
      ["model.attention.rope_scaling", '"original_length"'],
    ),
    ("model.variants={'a': {'window': 0}}", ["model.variants.a.window = 0"]),
    ("model.variants={'a.b': {}}", ["model.variants", "dots"]),
    ("model.variants={'a/b': {}}", ["'a/b'", "letters"]),
    ("model.variants={1: {}}", ["model.variants", "label 1"]),
    ("data.mixture={'a': 3}", ["data.mixture.a = 3"]),
    ("data.mixture={'a': {'nme': 'x'}}", ["data.mixture.a", 'mean "name"']),
    (
      "data.mixture={'a': {'name': 'x', 'weight': 0}}",
      ["data.mixture.a.weight = 0", "above 0"],
    ),
    ("data.mixture={'a': {'weight': 1.0}}", ["data.mixture.a", '"name"']),
    (
      "optim.learning_rate_factors.experts=1e999",
      ["optim.learning_rate_factors.experts = inf"],
    ),
    ("model.moe.balancers={'loss': 0.01}", ["balancers.loss = 0.01", "name"]),
    ("model.moe.router={'score': 'sigmoid'}", ["model.moe.router", "name"]),
    ("train.accumulation=3", ["accumulation = 3", "batch_size = 16"]),
    ("train.profile_steps=(5,5)", ["profile_steps = (5, 5)"]),
    ("train.profile_steps=(5,)", ["profile_steps = (5,)"]),
    ("model.dtype=float64", ["float64", "JAX_ENABLE_X64"]),
  ],
)
def test_what_is_out_of_range_is_refused(text, words):
  with pytest.raises(ConfigError) as e:
    program.check(config_lib.load("configs/base.py", [text]))
  assert all(word in str(e.value) for word in words), str(e.value)


def loaded(*flags):
  return config_lib.load("configs/tiny.py", flags)


def test_another_name_takes_the_options_of_the_old_part_away():
  c = loaded("model.moe.dispatcher.name=sorted")
  assert c.model.moe.dispatcher.to_dict() == {"name": "sorted"}
  # The order of flags does not matter, and the same name changes nothing.
  flags = ["model.moe.router.jitter=0.1", "model.moe.router.name=top_k"]
  for order in (flags, flags[::-1]):
    c = loaded("model.moe.router={'name': 'top_k', 'scale': 2.0}", *order)
    assert c.model.moe.router.to_dict() == {
      "name": "top_k",
      "scale": 2.0,
      "jitter": 0.1,
    }
  c = loaded("model.moe.router={'name': 'top_k', 'scale': 2.0}")
  c = config_lib.overridden(c, ["model.moe.router.name=random"])
  assert c.model.moe.router.to_dict() == {"name": "random"}
  # Sections of their own keep theirs.
  assert loaded("data.name=x").data.seq_len == tiny.get_config().data.seq_len


def test_a_name_that_is_no_part_s_takes_nothing_away():
  """A variant names its kind of attention, and a mixture its datasets."""
  texts = [
    "model.variants.few.moe.num_experts=8",
    "model.variants.few.window=4",
  ]
  texts += ["data.mixture.code.weight=3.0", "data.mixture.code.name=old"]
  c = config_lib.overridden(base.get_config(), texts)
  names = ["model.variants.few.name=fading", "data.mixture.code.name=new"]
  c = config_lib.overridden(c, names).to_dict()
  few = {"moe": {"num_experts": 8}, "window": 4, "name": "fading"}
  assert c["model"]["variants"]["few"] == few
  assert c["data"]["mixture"]["code"] == {"name": "new", "weight": 3.0}


def test_a_variant_or_a_dataset_may_have_any_label():
  """Also that of a section of balancers."""
  c = tiny.get_config()
  c.model.variants = {"balancers": {"window": 4}}
  task = small.task()
  numbers = train_step.numbers(c, program.build_model(c, task))
  key = program._structure(c, task, numbers)
  c.model.variants.balancers.window = 5
  assert program._structure(c, task, numbers) != key


def test_parts_are_added_key_by_key():
  flags = [
    "model.moe.balancers.load.coefficient=0.01",
    "model.moe.balancers.load.name=switch",
    "model.variants.local.window=8",
    "model.attention.rope_scaling.factor=2.0",
    "model.attention.rope_scaling.name=yarn",
    "model.attention.rope_scaling.original_length=64",
    "data.mixture.a.name=python_sources",
  ]
  c = loaded(*flags)
  load = {"name": "switch", "coefficient": 0.01}
  assert c.model.moe.balancers.to_dict() == {"load": load}
  assert c.model.variants.to_dict() == {"local": {"window": 8}}
  assert c.data.mixture.a.name == "python_sources"
  program.check(c)
  registry.from_config("balancers", c.model.moe.balancers.load, "here")
  # A whole section comes before its keys, wherever the flag stands.
  both = [*flags[:2], "model.moe.balancers={'z': {'name': 'z_loss'}}"]
  assert set(loaded(*both).model.moe.balancers) == {"load", "z"}
  for flag in ("model.mo.top_k=1", "optim.x.y=1", "seed.x=1"):
    with pytest.raises(ConfigError, match=f"config.{flag.partition('=')[0]}: "):
      loaded(flag)


def test_the_router_of_switch_needs_no_other_options():
  """Arms with one and with two experts a token differ in nothing else."""
  for top_k in (1, 2):
    router = loaded(f"model.moe.top_k={top_k}").model.moe.router
    assert router == base.get_config().model.moe.router
    registry.from_config("routers", router, "here", top_k=top_k)


def test_values_are_python_or_bare_words():
  for text, value in (
    ("optim.learning_rate=1", 1.0),
    ("data.name=None", None),
    ("data.name='none'", "none"),
    ("train.check_mesh=false", False),
    # A word where the option takes words, and else Python's None.
    ("model.remat=none", "none"),
    ("model.attention.rope=none", "none"),
    ("train.ema=none", None),
    ("data.dir=a/b=c", "a/b=c"),
    ("model.pattern=('dense', 'moe')", ("dense", "moe")),
    ("data.name=" + "(" * 9000, "(" * 9000),
    ("seed=" + "9" * 5000, "9" * 5000),
  ):
    key = text.partition("=")[0]
    found = dict(config_lib.flat(loaded(text).to_dict()))[key]
    assert found == value and type(found) is type(value)


# Configs that a run left behind.


def left_behind(tmp_path, c, without=()):
  values = c.to_dict()
  for key in without:
    *sections, last = key.split(".")
    section = values
    for name in sections:
      section = section[name]
    del section[last]
  path = tmp_path / "config.json"
  path.write_text(json.dumps(values))
  return path


def test_the_config_that_a_run_left_is_a_config(tmp_path):
  """Tuples, sections and options of parts as they were."""
  c = loaded(
    "model.prefix=('dense',)",
    "model.num_layers=3",
    "model.moe.balancers={'a': {'name': 'bias', 'rate': 0.5}}",
    "data.dir=somewhere",
  )
  path = left_behind(tmp_path, c)
  again = config_lib.load(str(path))
  assert again.to_dict() == c.to_dict()
  again = config_lib.load(
    str(path), ["eval.every=5", "model.moe.balancers.a.rule=proportional"]
  )
  assert again.eval.every == 5
  assert again.model.moe.balancers.a.rule == "proportional"
  with pytest.raises(ConfigError, match='did you mean "every"'):
    config_lib.load(str(path), ["eval.evry=5"])
  again = config_lib.load(str(path), ["model.moe.tokens_per_group=128"])
  assert again.model.moe.tokens_per_group == 128
  for text in ("{", "[]", '{"a": 1}', '{"model": {"moe": {}}}', "3"):
    path.write_text(text)
    with pytest.raises(ConfigError, match="is not the config.json of a run"):
      config_lib.load(str(path))
  with pytest.raises(ConfigError, match="there is no config file"):
    config_lib.load(str(tmp_path / "none.json"))
  with pytest.raises(ConfigError, match="neither a Python file"):
    config_lib.load("README.md")


def test_an_older_config_has_the_defaults_of_keys_that_it_lacks(tmp_path):
  c = loaded("model.moe.router={'name': 'random'}")
  lacks = ["model.moe.shared_gate", "model.variants", "train.check_mesh"]
  path = left_behind(tmp_path, c, without=lacks)
  assert config_lib.load(str(path)).to_dict() == c.to_dict()
  # A run with an older config goes on, unless a new key has another value.
  folder = tmp_path / "run"
  folder.mkdir()
  path.rename(folder / "config.json")
  (folder / "run.json").write_text("{}")
  run_directory.RunDirectory(folder, c).close()
  c.model.moe.shared_gate = True
  with pytest.raises(ConfigError, match="shared_gate = False, and now it is T"):
    run_directory.RunDirectory(folder, c)


def test_a_run_has_no_variants_and_may_lack_a_tuple(tmp_path):
  values = json.loads(tiny.get_config().to_json())
  path = tmp_path / "config.json"
  path.write_text(json.dumps(values))
  with pytest.raises(ConfigError, match='no variants, so it has no ":small"'):
    config_lib.load(f"{path}:small")
  path.with_name("a:b").mkdir()  # Folders may have colons.
  path = path.rename(path.with_name("a:b") / path.name)
  assert config_lib.load(str(path)).to_json() == json.dumps(values)
  older = json.loads(json.dumps(values))
  del older["plugins"], older["model"]["prefix"]
  run_directory._check_same(tmp_path, older, values)


def test_keys_that_a_config_has_not_are_refused(tmp_path):
  c = loaded()
  values = c.to_dict()
  values["optim"]["momentum"] = 0.9
  with pytest.raises(ConfigError, match='optim has no "momentum"'):
    program.check(config_lib.locked(values))


def test_the_config_of_another_version_is_told_as_one(tmp_path):
  """Also to a run that would go on; options of a part are not looked at."""
  c, path = loaded(), tmp_path / "config.json"
  values = c.to_dict()
  values["model"]["moe"]["router"]["brand_new"] = 1
  path.write_text(json.dumps(values))
  assert config_lib.load(str(path)).model.moe.router.brand_new == 1
  values["optim"]["momentum"], values["model"]["moe"]["gone"] = 0.9, {"a": 1}
  path.write_text(json.dumps(values))
  words = "of another version of moe_jax, with .*model.moe.gone.*optim.momentum"
  with pytest.raises(ConfigError, match=f"{path} is a config {words}"):
    config_lib.load(str(path))
  (tmp_path / "run.json").write_text("{}")
  with pytest.raises(ConfigError, match=f"{words}.* or choose another --work"):
    run_directory.RunDirectory(tmp_path, c)


def test_differences_are_whole_for_open_sections():
  c, other = loaded().to_dict(), copy.deepcopy(loaded().to_dict())
  assert config_lib.differences(c, other) == {}
  other["seed"] = 3
  other["model"]["moe"]["dispatcher"] = {"name": "gather", "order": "choice"}
  assert config_lib.differences(other, c) == {
    "seed": 3,
    "model.moe.dispatcher": {"name": "gather", "order": "choice"},
  }


def test_flags_that_count_something():
  assert config_lib.at_least_1("12") == 12
  for text in ("0", "-1", "1.5", "nan", "", "9" * 10, "9" * 99):
    with pytest.raises(
      argparse.ArgumentTypeError, match="from 1 to 2147483647"
    ):
      config_lib.at_least_1(text)


def test_an_unknown_key_in_a_file_and_flags_that_lack_something(tmp_path):
  file = tmp_path / "mine.py"
  lines = ["from configs import tiny", "def get_config():"]
  lines += [
    "  c = tiny.get_config()",
    "  c.model.moe.num_expert = 4",
    "  return c",
  ]
  file.write_text("\n".join(lines))
  wanted = (
    'mine.py, line 4: there is no key "num_expert"; did you mean "num_experts"'
  )
  with pytest.raises(ConfigError, match=wanted):
    config_lib.load(str(file))
  parser = config_lib.parser("A command.")
  for argument, words in {
    "--model.moe.top_k=1": "write --config.model.moe.top_k=1",
    "30": "belongs to no flag; write --FLAG=30",
  }.items():
    with pytest.raises(ConfigError, match=words):
      config_lib.parse(parser, ["--config=tiny", argument])
