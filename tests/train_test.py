"""The training step, the optimizers, and what is compiled for them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from configs import tiny
from moe_jax import models
from moe_jax.core.errors import ConfigError
from moe_jax.moe import groups
from moe_jax.training import evaluation, losses, optim, program, train_step
from tests import mesh_cases, oracle
from tests.small import BYTES, ROWS, L, SmallCorpus, V, config


def setting(c):
  """(model, optimizer, unboxed state, a batch of two micro-batches)."""
  model = models.build(c.model, vocab_size=V, seq_len=L, batch_sizes=(ROWS,))
  optimizer = optim.build(c.optim, 100)
  init = functools.partial(
    train_step.init_state,
    model=model,
    optimizer=optimizer,
    seq_len=L,
    batch=ROWS,
  )
  rng = jax.random.key(0)
  state = quick(jax.jit(lambda rng: nn.unbox(init(rng))), rng)(rng)
  rng = np.random.default_rng(0)
  batch = {
    "inputs": rng.integers(0, V, (2, ROWS, L)).astype(np.int32),
    "targets": rng.integers(0, V, (2, ROWS, L)).astype(np.int32),
    "mask": np.arange(L) < rng.integers(1, L + 1, (2, ROWS, 1)),
  }
  return model, optimizer, state, batch


def quick(program, *args):
  return program.lower(*args).compile(compiler_options=mesh_cases.QUICK)


def test_the_loss_falls():
  c = config()
  c.optim.learning_rate = 1e-2
  model, optimizer, state, batch = setting(c)
  step = functools.partial(
    train_step.train_step, model=model, optimizer=optimizer, num_bytes_V=BYTES
  )
  step = quick(jax.jit(step), state, batch)
  found = []
  for _ in range(30):
    state, sums = step(state, batch)
    found.append(float(sums["loss"].value()))
  assert abs(found[0] - np.log(V)) < 1
  assert found[-1] < 0.6 * found[0]
  assert state.step == 30


def test_a_step_is_its_pieces():
  """Cross-entropy over the step's tokens, plus the mean balance loss."""
  c = config()
  c.model.dtype = "float64"
  c.optim.update(name="sgd", learning_rate=0.5, clip_norm=None)
  with jax.enable_x64(True):
    model, optimizer, state, batch = setting(c)
    state = state.replace(
      params=jax.tree.map(lambda x: x.astype(float), state.params),
      balance=jax.tree.map(lambda x: x.astype(float), state.balance),
    )
    recipe, grouping = model.arch.recipe, model.arch.grouping
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
          groups.keys(step_rng, ROWS, L, grouping, first=i * ROWS),
          train=True,
        )
        log_p = jax.nn.log_softmax(logits)
        p = jnp.take_along_axis(log_p, micro["targets"][..., None], 2)[..., 0]
        nll -= (p * micro["mask"]).sum()
        stats = one(aux)["stats"]
        aux_loss += losses.balance(
          recipe,
          state.balance,
          {"decoder": {"0": stats}},
          {"decoder": {"0": count_RE}},
        )
        count_RE += stats.count_E.sum((1, 2))
      return nll / tokens + aux_loss / 2, (nll, aux_loss / 2, count_RE)

    def both(state, batch):
      by_hand = jax.grad(loss, has_aux=True)(state.params)
      return by_hand, train_step.train_step(
        state,
        batch,
        model=model,
        optimizer=optimizer,
        num_bytes_V=BYTES,
      )

    run = quick(jax.jit(both), state, batch)
    (gradient, (nll, aux_loss, count_RE)), (new, sums) = run(state, batch)
    want = jax.tree.map(lambda p, g: p - 0.5 * g, state.params, gradient)
    assert mesh_cases.worst(new.params, want)[0] < 1e-12
    np.testing.assert_allclose(sums["loss"].total, nll, rtol=1e-12)
    assert sums["loss"].weight == batch["mask"].sum()
    assert sums["bytes"] == (batch["mask"] & (batch["targets"] < 256)).sum()
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
  c.model.moe.router = {"name": "random"}
  model, _, state, batch = setting(c)

  @jax.jit
  def experts(step):
    step_rng = jax.random.fold_in(state.rng, step)
    rng_G = groups.keys(step_rng, ROWS, L, model.arch.grouping)
    _, aux = model.apply(
      {"params": state.params, "balance": state.balance},
      batch["inputs"][0],
      rng_G=rng_G,
      collect="routing",
    )
    return aux["decoder"]["0"]["expert_GTK"]

  expert_RGTK = experts(0)
  drawn = expert_RGTK.reshape(2 * ROWS, -1).tolist()
  assert len({tuple(d) for d in drawn}) == 2 * ROWS
  np.testing.assert_array_equal(experts(0), expert_RGTK)
  assert not np.array_equal(experts(1), expert_RGTK)


def test_a_step_draws_from_its_own_number():
  """The counts of a random router are those of seed and step alone."""
  c = config()
  c.model.moe.router = {"name": "random"}
  model, optimizer, state, batch = setting(c)
  step = functools.partial(
    train_step.train_step, model=model, optimizer=optimizer, num_bytes_V=BYTES
  )
  step = quick(jax.jit(step), state, batch)

  def counts(**changes):
    _, sums = step(state.replace(**changes), batch)
    return np.asarray(sums["stats"]["decoder"]["0"].count_E)

  first = counts()
  np.testing.assert_array_equal(counts(), first)
  assert not np.array_equal(counts(step=jnp.ones((), jnp.int32)), first)
  assert not np.array_equal(counts(rng=jax.random.key(1)), first)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 2, 4, 1)])
def test_a_program_is_traced_once(sizes, monkeypatch):
  """For all seeds and steps; and evaluation leaves the balancers alone."""
  devices = jax.devices()[: np.prod(sizes)]
  monkeypatch.setattr(jax, "devices", lambda: devices)
  monkeypatch.setattr(program.mixture, "prepare", lambda *a, **k: SmallCorpus())
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


# Optimizers.


def schedule(num_steps, **options):
  c = tiny.get_config().optim
  c.update(learning_rate=1.0, **options)
  return [float(optim.schedule(c, num_steps)(s)) for s in range(num_steps + 1)]


def test_warm_up_is_linear_and_moves_at_once():
  found = schedule(10, warmup_steps=4, schedule="constant")
  np.testing.assert_allclose(found[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
  assert found[4:] == [1.0] * 7


def test_cosine():
  found = schedule(12, warmup_steps=2, schedule="cosine", final_fraction=0.2)
  t = np.arange(10) / 9
  want = 0.2 + 0.8 * (1 + np.cos(np.pi * t)) / 2
  np.testing.assert_allclose(found[2:12], want, rtol=1e-5)


def test_warm_up_stable_decay():
  found = schedule(
    12, warmup_steps=2, schedule="wsd", decay_steps=4, final_fraction=0.2
  )
  assert found[2:8] == [1.0] * 6
  np.testing.assert_allclose(found[8:12], [0.8, 0.6, 0.4, 0.2], rtol=1e-5)


@pytest.mark.parametrize(
  "options,words",
  [
    (dict(schedule="cosin"), 'did you mean "cosine"'),
    (dict(warmup_steps=20), "warmup_steps = 20"),
    (dict(schedule="wsd", decay_steps=0), "decay_steps = 0"),
    (dict(name="adam"), 'did you mean "adamw"'),
  ],
)
def test_impossible_optimizers_are_refused(options, words):
  c = tiny.get_config().optim
  c.update(**options)
  with pytest.raises(ConfigError, match=words):
    optim.build(c, 20)


def test_what_weight_decay_shrinks():
  c = config(use_bias=True)
  c.optim.update(weight_decay=0.5, learning_rate=0.1, clip_norm=None)
  model, optimizer, state, _ = setting(c)
  params = jax.tree.map(jnp.ones_like, state.params)
  nothing = jax.tree.map(jnp.zeros_like, params)
  update = quick(jax.jit(optimizer.update), nothing, state.opt_state, params)
  updates, _ = update(nothing, state.opt_state, params)
  shrunk, kept = set(), set()
  for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    (shrunk if (leaf != 0).all() else kept).add(name)
    assert (leaf == leaf.reshape(-1)[0]).all()
  assert kept == {
    "embedding",
    "final_norm/scale",
    "decoder/0/attention_norm/scale",
    "decoder/0/ffn_norm/scale",
    *(f"decoder/0/moe/experts/{k}_bias" for k in ("gate", "up", "down")),
  }
  assert {"decoder/0/moe/router/kernel", "decoder/0/attention/out"} <= shrunk


def test_clipping_and_sgd():
  c = tiny.get_config().optim
  c.update(name="sgd", learning_rate=0.1, schedule="constant", warmup_steps=0)
  params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
  gradient = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
  for clip, factor in ((None, 1.0), (10.0, 1.0), (1.0, 0.2)):
    c.clip_norm = clip
    optimizer = optim.build(c, 10)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new["a"], [-0.3 * factor, 0], rtol=1e-6)
    np.testing.assert_allclose(new["b"], [-0.4 * factor], rtol=1e-6)
