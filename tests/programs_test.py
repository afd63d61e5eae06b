"""Tests that an experiment compiles one program for each structure."""

import itertools

import jax
import pytest
from flax import linen as nn

from experiments import plan, questions, train
from moe_jax.core import parallel
from moe_jax.data.text import mixed
from moe_jax.training import program, train_step
from tests import small

# Arms of load_balancing whose configs differ in numbers alone.
STRUCTURES = (
  {"none"},
  {"loss_1e-2", "loss_1e-3"},
  {"bias", "bias_1e-3"},
  {"dense", "dense_longer"},
)


@pytest.fixture
def experiment(monkeypatch, tmp_path):
  """The question load_balancing at scale cpu, without its text."""
  monkeypatch.setattr(mixed, "prepare", lambda *a, **k: small.SmallCorpus())
  monkeypatch.setattr(parallel, "mesh_or_none", lambda *_: None)

  def make(*overrides):
    question = questions.load("load_balancing")
    made = plan.make(
      question,
      scale="cpu",
      workdir=str(tmp_path),
      overrides=overrides,
      fresh=True,
    )
    return made.knowing([[], [], []])

  return make


def test_all_arms_rates_and_seeds_share_four_programs(
  experiment, monkeypatch, capsys
):
  """The runs of the tuning, and then the eight seeds of every arm."""
  compiled, taken = [], []

  def compile_one(made, *_):
    compiled.append(made.config)
    return (object(),) * 5

  def train_one(run, made, progress, deadline):
    del progress, deadline
    taken.append((run, made.init))
    return True

  monkeypatch.setattr(program.Program, "_compile", compile_one)
  monkeypatch.setattr(train, "_train_one", train_one)
  asked = experiment()
  launched = asked.launch(stage=0)
  train.train(launched)
  assert len(taken) == 7 * 3 and len(compiled) == len(STRUCTURES)
  check_shared(taken)
  rows = [
    run.key | {"bits_per_byte": 1 + i % 3}
    for i, run in enumerate(launched.runs)
  ]
  chosen = asked.knowing([[], rows, []]).launch()
  compiled.clear(), taken.clear()
  train.train(chosen)
  assert len(taken) == 7 * 8 and len(compiled) == len(STRUCTURES)
  check_shared(taken)
  assert len({run.config_digest for run, _ in taken}) == 7


def check_shared(taken):
  """Runs have the same program if, and only if, their structure is the same."""
  by_program = {}
  for run, made in taken:
    by_program.setdefault(id(made), set()).add(run.arm)
  found = sorted(map(sorted, by_program.values()))
  assert found == sorted(map(sorted, STRUCTURES))


@pytest.mark.parametrize(
  "option",
  ["model.moe.exchange='all_gather'", "train.reduce_experts_once=True"],
)
def test_what_devices_send_makes_another_program(experiment, option):
  keys = set()
  for overrides in ((), (option,)):
    c = experiment(*overrides).sweep.configs()["bias"]
    task = program.build_task(c)
    numbers = train_step.numbers(c, program.build_model(c, task))
    keys.add(program._structure(c, task, numbers))
  assert len(keys) == 2


SMALLER = (
  "data.seq_len=16",
  "model.d_model=16",
  "model.head_dim=8",
  "model.num_layers=1",
  "model.prefix=()",
  "model.remat='none'",
  "model.moe.num_experts=8",
  "model.moe.d_expert=8",
  "model.moe.tokens_per_group=16",
)


def test_programs_that_are_shared_are_the_same_text(experiment):
  """The text that XLA gets holds no rate or coefficient of an arm.

  Both runs have a loss and a bias together, with different strengths.
  """
  configs = experiment(*SMALLER).sweep.configs()
  rates, texts = itertools.count(1), set()
  for arm, other in (("loss_1e-2", "bias"), ("loss_1e-3", "bias_1e-3")):
    c = configs[arm]
    c.model.moe.balancers.update(configs[other].model.moe.balancers)
    c.optim.learning_rate = 1e-3 * next(rates)
    task = program.build_task(c)
    model = program.build_model(c, task)
    init, step = small.training(c, model, task)
    state = nn.unbox(jax.eval_shape(init, jax.random.key(0)))
    numbers = train_step.numbers(c, model)
    lowered = jax.jit(step).lower(state, task.train(0)[0], numbers)
    texts.add(lowered.as_text())
    assert len(numbers["balancers"]["decoder/0/moe"]) == 2
  assert len(texts) == 1
