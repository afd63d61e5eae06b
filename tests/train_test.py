"""The training step, and what is compiled for it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax import models
from moe_jax.data.text import mixed
from moe_jax.training import balancing, evaluation, program, train_step
from tests import mesh_cases, oracle, small, tiers
from tests.small import ROWS, L, SmallCorpus, V, config

PATH = "decoder/0/moe"  # Path of the two MoE layers.


def setting(c):
  """(model, a training step, unboxed state, a batch of two micro-batches)."""
  model = models.build(c.model, vocab_size=V)
  init, step = small.training(c, model, small.task())
  step = functools.partial(step, numbers=train_step.numbers(c, model))
  rng = jax.random.key(0)
  state = quick(jax.jit(lambda rng: nn.unbox(init(rng))), rng)(rng)
  rng = np.random.default_rng(0)
  batch = {
    "inputs": rng.integers(0, V, (2, ROWS, L)).astype(np.int32),
    "targets": rng.integers(0, V, (2, ROWS, L)).astype(np.int32),
    "mask": np.arange(L) < rng.integers(1, L + 1, (2, ROWS, 1)),
  }
  return model, step, state, batch


def quick(program, *args):
  return program.lower(*args).compile()


@functools.cache
def compiled():
  """(step, state, batch) of a model that learns."""
  c = config()
  c.optim.learning_rate = 1e-2
  c.optim.learning_rate = 1e-2
  _, step, state, batch = setting(c)
  return quick(jax.jit(step), state, batch), state, batch


def test_the_loss_falls():
  step, state, batch = compiled()
  found = []
  for _ in range(30):
    state, sums = step(state, batch)
    found.append(float(sums["loss"].value()))
  assert abs(found[0] - np.log(V)) < 1
  assert found[-1] < 0.6 * found[0]
  assert state.step == 30


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_step_that_spoils_a_balancer_changes_nothing(value):
  """Its loss and gradient are finite: the bias decides between experts only."""
  step, state, batch = compiled()
  bias = state.balance["decoder"]["0"]["moe"]["bias"]["bias_E"]
  spoilt = state.replace(
    balance={"decoder": {"0": {"moe": {"bias": {"bias_E": bias + value}}}}}
  )
  new, sums = step(spoilt, batch)
  assert np.isfinite(sums["loss"].total) and np.isfinite(sums["grad_norm"])
  assert (int(new.step), int(new.skipped)) == (1, 1)
  assert int(sums["skipped_in_a_row"]) == 1
  for part in ("params", "opt_state", "balance"):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(new, part), getattr(spoilt, part)
    )


def test_a_step_is_its_pieces():
  """Cross-entropy over the step's tokens, plus the mean balance loss."""
  c = config()
  c.model.dtype = "float64"
  c.optim.update(optimizer={"name": "sgd"}, learning_rate=0.5, clip_norm=None)
  with jax.enable_x64(True):
    model, step, state, batch = setting(c)
    state = state.replace(
      params=jax.tree.map(lambda x: x.astype(float), state.params),
      balance=jax.tree.map(lambda x: x.astype(float), state.balance),
    )
    step_rng = jax.random.fold_in(state.rng, state.step)
    one = lambda tree: tree["decoder"]["0"]  # noqa: E731

    def loss(params):
      nll, tokens, aux_loss = 0.0, batch["mask"].sum(), 0.0
      count_RE = jnp.zeros((2, 4), int)
      for i in range(2):
        micro = {k: v[i] for k, v in batch.items()}
        logits, aux = model.apply(
          {"params": params, "balance": state.balance},
          micro["inputs"],
          micro["mask"],
          step_rng,
          first=i * ROWS,
          train=True,
        )
        log_p = jax.nn.log_softmax(logits)
        p = jnp.take_along_axis(log_p, micro["targets"][..., None], 2)[..., 0]
        nll -= (p * micro["mask"]).sum()
        stats = one(aux)["moe"]["stats"]
        aux_loss += balancing.loss(
          model.sublayers,
          state.balance,
          {PATH: stats},
          {PATH: count_RE},
          params,
        )
        count_RE += stats.count_E.sum((1, 2))
      return nll / tokens + aux_loss / 2, (nll, aux_loss / 2, count_RE)

    def both(state, batch):
      by_hand = jax.grad(loss, has_aux=True)(state.params)
      return by_hand, step(state, batch)

    run = quick(jax.jit(both), state, batch)
    (gradient, (nll, aux_loss, count_RE)), (new, sums) = run(state, batch)
    want = jax.tree.map(lambda p, g: p - 0.5 * g, state.params, gradient)
    assert mesh_cases.worst(new.params, want)[0] < 1e-12
    np.testing.assert_allclose(sums["loss"].total, nll, rtol=1e-12)
    assert sums["loss"].weight == batch["mask"].sum()
    num_bytes = (batch["mask"] & (batch["targets"] < 256)).sum()
    assert sums["task"]["bytes"] == num_bytes
    np.testing.assert_allclose(sums["aux_loss"], aux_loss, rtol=1e-12)
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(sums["grad_norm"], norm, rtol=1e-12)

    bias = lambda tree: one(tree)["moe"]["bias"]["bias_E"]  # noqa: E731
    for r in range(2):
      want_E = oracle.bias_update(bias(state.balance)[r], count_RE[r], 1e-2)
      np.testing.assert_array_equal(bias(new.balance)[r], want_E)
    np.testing.assert_array_equal(bias(sums["balance"]), bias(new.balance))


def test_noise_differs_by_layer_group_and_step():
  """And not between two runs of the same step."""
  c = config()
  c.model.moe.router, c.model.moe.balancers = {"name": "random"}, {}
  model, _, state, batch = setting(c)

  @jax.jit
  def experts(step):
    _, aux = model.apply(
      {"params": state.params, "balance": state.balance},
      batch["inputs"][0],
      rng=jax.random.fold_in(state.rng, step),
      collect="routing",
    )
    return aux["decoder"]["0"]["moe"]["choice"].expert_TK

  expert_RGTK = experts(0)
  drawn = expert_RGTK.reshape(2 * ROWS, -1).tolist()
  assert len({tuple(d) for d in drawn}) == 2 * ROWS
  np.testing.assert_array_equal(experts(0), expert_RGTK)
  assert not np.array_equal(experts(1), expert_RGTK)


def test_a_step_draws_from_its_own_number():
  """The counts of a random router are those of seed and step alone."""
  c = config()
  c.model.moe.router, c.model.moe.balancers = {"name": "random"}, {}
  _, step, state, batch = setting(c)
  step = quick(jax.jit(step), state, batch)

  def counts(**changes):
    _, sums = step(state.replace(**changes), batch)
    return np.asarray(sums["stats"][PATH].count_E)

  first = counts()
  np.testing.assert_array_equal(counts(), first)
  assert not np.array_equal(counts(step=jnp.ones((), jnp.int32)), first)
  assert not np.array_equal(counts(rng=jax.random.key(1)), first)


MESHES = [(1, 1, 1, 1), (1, 2, 4, 1)]


@pytest.mark.parametrize("sizes", tiers.only(MESHES[:1], MESHES))
def test_a_program_is_traced_once(sizes, monkeypatch):
  """All seeds and steps share it, and evaluation leaves balancers alone."""
  devices = jax.devices()[: np.prod(sizes)]
  monkeypatch.setattr(jax, "devices", lambda: devices)
  monkeypatch.setattr(mixed, "prepare", lambda *a, **k: SmallCorpus())
  chex.clear_trace_counter()
  monkeypatch.setattr(
    train_step, "train_step", chex.assert_max_traces(train_step.train_step, n=1)
  )
  monkeypatch.setattr(
    evaluation, "eval_step", chex.assert_max_traces(evaluation.eval_step, n=1)
  )
  c = config()
  c.mesh = sizes
  made = program.Program(c)
  finals = []
  for seed in (0, 1):
    state = made.init(jax.random.key(seed))
    stream = made.batches(seed)
    for step in range(c.train.num_steps):
      state, _ = made.train_step(state, made.put(stream[step]))
    before = jax.device_get(state.balance)
    assert any(x.any() for x in jax.tree.leaves(before))
    found = [made.evaluate(state) for _ in range(2)]
    assert found[0] == found[1]
    jax.tree.map(
      np.testing.assert_array_equal, before, jax.device_get(state.balance)
    )
    finals.append(found[0])
  assert finals[0]["loss"] != finals[1]["loss"]
  assert {"max_vio_global/a", "max_vio_global/b"} <= set(finals[0])
