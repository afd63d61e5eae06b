"""Training steps of encoder-decoders: any mesh, any micro-batches, any stop."""

import functools

import jax
import numpy as np
import pytest

from configs import switch
from moe_jax.data import spans
from moe_jax.tasks import span_corruption
from tests import pair_of_runs, small

MESHES = ((2, 1, 4, 1), (1, 2, 2, 2))
ROWS = 16


@pytest.fixture(autouse=True)
def double_precision():
  with jax.enable_x64(True):
    yield


def config(accumulation=1, balanced=True, **model):
  """Switch with everything that draws: jitter, dropout inside and outside."""
  c = switch.get_config("tiny")
  c.data.update(name="small", seq_len=16, batch_size=ROWS)
  c.data.separate_documents = True
  c.model.update(dtype="float64", dropout=0.2, **model)
  # They compile faster.
  c.model.update(pattern=("moe",), num_layers=1, remat="none")
  c.model.moe.expert_dropout = 0.3
  c.optim.optimizer = {"name": "sgd"}
  c.optim.update(learning_rate=0.1, schedule="constant")
  c.train.accumulation = accumulation
  if not balanced:
    c.model.moe.balancers = {}
  return c


def task_of(c, mesh=None):
  corruption = spans.Corruption(
    inputs_length=16, separate_documents=True, targets_length=12
  )
  corpus = small.SmallCorpus()
  return span_corruption.of_corpus(c, corpus, corruption, mesh)


@functools.cache
def stepped(sizes=None, accumulation=1, balanced=True):
  """(parameters, sums) after a step from the same start."""
  c = config(accumulation, balanced)
  return pair_of_runs.stepped(c, lambda mesh: task_of(c, mesh), sizes)


def assert_close(found, wanted):
  """Every leaf within 1e-9 of its norm; integers equal."""

  def compare(path, x, y):
    if np.issubdtype(np.asarray(y).dtype, np.integer):
      np.testing.assert_array_equal(x, y, err_msg=str(path))
    else:
      norm = np.linalg.norm(y) or 1.0
      assert np.linalg.norm(np.subtract(x, y)) <= 1e-9 * norm, path

  jax.tree.map_with_path(compare, found, wanted)


@pytest.mark.long  # Another model takes the same steps in the quick tier.
@pytest.mark.parametrize("sizes", MESHES)
def test_a_step_on_a_mesh_is_that_without(sizes):
  wanted, found = stepped(), stepped(sizes)
  assert_close(found, wanted)
  kept = {k: x.kept_E.sum() for k, x in wanted[1]["stats"].items()}
  assert all(kept.values())
  drops = [x.dropped for x in wanted[1]["stats"].values()]
  dropped = sum(x.sum() for causes in drops for x in causes.values())
  assert dropped > 0


@pytest.mark.long
def test_micro_batches_are_one_large_batch():
  """Dropout and jitter too; a balance loss would be a mean over micro-batches."""
  (params, sums), (others, wanted) = (
    stepped(accumulation=n, balanced=False) for n in (2, 1)
  )
  for name in ("loss", "task"):
    assert_close(sums[name], wanted[name])
  assert_close(params, others)


FLAGS = (
  "--config=configs/switch.py:tiny",
  "--config.train.num_steps=12",
  "--config.train.log_every=1",
  "--config.checkpoint.every=5",
  "--config.model.dropout=0.1",
  "--config.model.remat=none",  # It compiles faster.
  "--config.model.pattern=('moe',)",
  "--config.model.num_layers=1",
)


@pytest.mark.long
def test_a_run_that_was_stopped_is_the_run(tmp_path):
  with jax.enable_x64(False):
    pair_of_runs.check_stopped(FLAGS, tmp_path)
