"""Runs that begin with other weights: what does not fit, and what begins new."""

import os
import sys
import tempfile

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import traverse_util

from moe_jax import main, models
from moe_jax.core.errors import ConfigError
from moe_jax.run import config as config_lib
from moe_jax.training import checkpoint, program, starts
from moe_jax.training.starts import parts

CACHE = f"{tempfile.gettempdir()}/moe_jax_tests_{os.getuid()}/moe_jax"
FLAGS = ["--config=configs/tiny.py", f"--config.data.cache_dir={CACHE}"]
FLAGS += ["--config.train.num_steps=2", "--config.optim.warmup_steps=0"]
FLAGS += ["--config.eval.batches_per_domain=1"]
BIAS = "--config.model.moe.balancers={'b': {'name': 'bias', 'rate': 0.01}}"
KEPT = "--config.optim.learning_rate=0"


def config(*flags):
  texts = [flag.removeprefix("--config.") for flag in (*FLAGS, *flags)]
  return config_lib.load("configs/tiny.py", texts[1:])


def built(*flags):
  """(config, task, model) of the flags."""
  c = config(*flags)
  task = program.build_task(c, prepare=False)
  return c, task, program.build_model(c, task)


@pytest.fixture(autouse=True, scope="module")
def one_device():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(program.parallel, "mesh_or_none", lambda *_: None)
    yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The folder of a run of a few steps."""
  folder = tmp_path_factory.mktemp("starts") / "run"
  main.main([*FLAGS, BIAS, f"--workdir={folder}"])
  return folder


def flat(tree):
  return traverse_util.flatten_dict(dict(tree), sep="/")


def random(model, seed=0):
  """Random numbers in the place of a model's parameters."""
  rng = np.random.default_rng(seed)
  shapes = nn.unbox(models.variables(model))["params"]
  return jax.tree.map(lambda x: rng.normal(size=x.shape), shapes)


ROUTER, EXPERTS = "decoder/0/moe/router/kernel", "decoder/0/moe/experts/"


def test_all_that_does_not_fit_is_in_one_sentence(run):
  """Their number, the first ones with both shapes, and their parts are told."""
  wide = ["--config.model.moe.num_experts=8", "--config.model.norm=layer_bias"]
  c, _, model = built(*wide)
  with pytest.raises(ConfigError) as e:
    starts.read(str(run), model, c)
  told, more = str(e.value), "--config.model.moe.num_shared_experts=1"
  for words in (
    f"init_from = {run} is of another model ",
    f"(parameters of another shape: 4 ({EXPERTS}down: [2, 4, 32, 32] there and [2, 8, 32, 32] here, ",
    "missing there: 3 (decoder/0/attention_norm/bias: [2, 32] here, ",
    "--config.init_new=\"('router', 'experts', 'norm')\"",
    "moe-jax upcycle",
  ):
    assert words in told, words
  assert "left over" not in told
  # Of another width nothing fits: beginning new would keep nothing.
  c, _, model = built("--config.model.d_model=64")
  with pytest.raises(
    ConfigError, match="make the sizes equal, give other"
  ) as e:
    starts.read(str(run), model, c)
  assert "init_new" not in str(e.value)
  # The other way round, they are left over.
  c, _, model = built()
  given, other = random(built(more)[2]), built(more)[2]
  with pytest.raises(ConfigError) as e:
    parts.taken(given, model, (), "here", lambda: parts.of(other))
  for words in (
    "(left over there: 3 (decoder/0/moe/shared/down: [2, 32, 32] there, ",
    "--config.init_new=\"('shared',)\"",
  ):
    assert words in str(e.value), words


def test_another_number_of_experts(run, tmp_path, capsys):
  """Parts of that name are those of a run without a start; all others are kept."""
  flags = [
    f"--config.init_from={run}",
    "--config.model.moe.num_experts=8",
    KEPT,
  ]
  flags += ["--config.init_new=('router', 'experts')"]
  flags += ["--config.train.ema=0.5"]
  main.main([*FLAGS, *flags, f"--workdir={tmp_path}/next"])
  told = capsys.readouterr().err
  names = f"4 ({EXPERTS}down, {EXPERTS}gate, {EXPERTS}up, ...)"
  assert f"that begin new, of router, experts: {names}; all others are" in told
  c, task, model = built(*flags)
  new = flat(starts.own(task, model, c.seed)["params"])
  old = flat(checkpoint.load_params(run))
  for average in (False, True):
    found = checkpoint.load_variables(tmp_path / "next", ema=average)["params"]
    for name, x in flat(found).items():
      begins = "/router/" in name or "/experts/" in name
      wanted = (new if begins else old)[name]
      np.testing.assert_array_equal(x, wanted, err_msg=name)
    assert flat(found)[ROUTER].shape == (2, 32, 8)


def test_weights_are_read_once_before_compiling_and_let_go(
  run, tmp_path, monkeypatch
):
  """Weights that do not fit are refused at once, and others do not stay."""
  read, kept, original = [], [], starts.read

  def once(*args):
    read.append(original(*args))
    return read[-1]

  def compiled(self, *args):
    raise InterruptedError

  def taken(state, weights, *args):
    assert weights is read[0]
    read.clear()
    kept.append(sys.getrefcount(weights))
    raise InterruptedError

  monkeypatch.setattr(starts, "read", once)
  monkeypatch.setattr(starts, "replaced", taken)
  flags = [*FLAGS, BIAS, f"--config.init_from={run}"]
  with pytest.raises(InterruptedError):
    main.main([*flags, f"--workdir={tmp_path / 'a'}"])
  # The caller's variable, the argument, and that of getrefcount.
  assert kept[0] <= 4 and not read
  with (
    pytest.raises(ConfigError, match="of another model"),
    monkeypatch.context() as m,
  ):
    m.setattr(jax.stages.Lowered, "compile", compiled)
    main.main(
      [*flags, "--config.model.d_model=64", f"--workdir={tmp_path / 'b'}"]
    )


def test_a_router_that_would_fit_begins_new_too(run):
  """With what balancers know of it."""
  flags = [f"--config.init_from={run}", "--config.init_new=('router',)", BIAS]
  c, task, model = built(*flags)
  own = starts.own(task, model, seed=3)
  state = State(own["params"], own["balance"])
  given = starts.read(str(run), model, c)
  found = starts.replaced(state, given, model, c, str(run), 3)
  old, new = flat(checkpoint.load_params(run)), flat(own["params"])
  assert (old[ROUTER] != new[ROUTER]).any()
  for name, x in flat(found.params).items():
    wanted = new if name == ROUTER else old
    np.testing.assert_array_equal(x, wanted[name], err_msg=name)
  (bias,) = jax.tree.leaves(found.balance)
  assert not np.any(bias)
  # Which go on where only experts are new.
  with c.unlocked():
    c.init_new = ("experts",)
  given = starts.read(str(run), model, c)
  found = starts.replaced(state, given, model, c, str(run), 3)
  (bias,) = jax.tree.leaves(found.balance)
  assert np.any(bias)


class State:
  """The attributes of a train state that `starts.replaced` reads."""

  ema = None

  def __init__(self, params, balance):
    self.params, self.balance = jax.tree.map(
      jax.numpy.asarray, (params, balance)
    )

  def replace(self, params, balance, ema):
    del ema
    return State(params, balance)


def test_a_router_without_parameters(run, capsys):
  """Those of the router that is given up are left out, by the run's own config."""
  flags = ["--config.model.moe.router={'name': 'random'}"]
  c, _, model = built(*flags)
  with pytest.raises(ConfigError, match=f"left over there: 1 .{ROUTER}"):
    starts.read(str(run), model, c)
  c, _, model = built(*flags, "--config.init_new=('router',)")
  given = starts.read(str(run), model, c)
  assert ROUTER not in flat(given["params"])
  told = capsys.readouterr().err
  assert f"new, of router: 0; left out of {run}: 1 ({ROUTER}); all" in told
  # Where nothing says which part a parameter is of, it is not left out.
  with pytest.raises(ConfigError, match=f"left over there: 1 .{ROUTER}"):
    old = checkpoint.load_params(run)
    parts.taken(old, model, ("router",), str(run), dict)


@pytest.mark.parametrize(
  "flags, words",
  [
    (
      ["init_new=('ruoter',)"],
      'init_new.0. = .ruoter. .* did you mean "router"',
    ),
    (["init_new=('rest',)"], "init_new.0. = 'rest' is not one of"),
    (["init_new=router"], "init_new = 'router' is not a tuple"),
    (
      ["init_new=('router',)"],
      "has no weights to begin with; set init_from to",
    ),
  ],
)
def test_parts_that_are_refused_at_once(flags, words):
  with pytest.raises(ConfigError, match=words):
    program.check(config(*(f"--config.{flag}" for flag in flags)))


def test_a_part_that_nobody_has(run):
  c, _, model = built("--config.init_new=('shared',)")
  with pytest.raises(
    ConfigError, match="init_new has the part shared, of which"
  ):
    starts.read(str(run), model, c)
