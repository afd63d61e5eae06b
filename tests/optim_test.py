"""Optimizers: experts and layers apart, parts with rates of their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from moe_jax import models
from moe_jax.core import parallel
from moe_jax.core.errors import ConfigError
from moe_jax.training import optim, train_step
from tests import mesh_cases
from tests.small import BYTES, ROWS, L, V, config

R, E = 2, 3
D, F = 20, 24
LARGE = (136, 144)  # Adafactor factors no smaller matrices.
NAMES = tuple(optim.DIRECTIONS)


def options(name, **changes):
  c = tiny.get_config().optim
  c.update(name=name, learning_rate=1.0, schedule="constant", warmup_steps=0)
  c.update(weight_decay=0.0, clip_norm=None)
  for key, value in changes.items():
    c[key] = value
  return c


def tree(seed, experts=None, size=(D, F)):
  """A parameter of each kind, or its gradient."""
  D, F = size
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
  drawn = draw(R, E, D, F)
  return {
    "embedding": draw(V, D),
    "decoder": {
      "0": {
        "attention": {"query": draw(R, D, 4, 8), "out": draw(R, 4, 8, D)},
        "ffn_norm": {"scale": draw(R, D)},
        "moe": {
          "router": {"kernel": draw(R, D, E)},
          "experts": {"up": drawn if experts is None else experts(drawn)},
        },
      }
    },
  }


def moved(c, gradients, params):
  """The updates of several steps."""
  optimizer = optim.build(c, 10)

  @jax.jit
  def run(params):
    state, found = optimizer.init(params), []
    for gradient in gradients:
      updates, state = optimizer.update(gradient, state, params)
      found.append(updates)
    return found

  return jax.device_get(run(params))


def up_of(tree):
  return tree["decoder"]["0"]["moe"]["experts"]["up"]


@pytest.mark.parametrize("name", NAMES)
def test_segments_can_have_other_names(name):
  """What counts is that the model says which they are."""
  c = options(name)

  def moved_as(segment, **known):
    rename = lambda t: {segment if k == "decoder" else k: t[k] for k in t}  # noqa: E731
    params, gradient = (rename(tree(i, size=LARGE)) for i in (0, 1))
    optimizer = optim.build(c, 10, **known)
    update = jax.jit(optimizer.update)
    updates, _ = update(gradient, optimizer.init(params), params)
    return jax.device_get(updates[segment])

  same = moved_as("decoder")
  tower = moved_as("tower", segments=("tower",))
  jax.tree.map(np.testing.assert_array_equal, same, tower)


@pytest.mark.parametrize("name", NAMES)
def test_an_expert_does_not_feel_another_ones_gradient(name):
  """Nor does a layer feel another layer's."""
  huge = lambda x: x.at[1, 2].multiply(1e3)  # noqa: E731
  size = LARGE if name == "adafactor" else (D, F)
  found, other = (
    moved(
      options(name), [tree(1, f, size), tree(2, f, size)], tree(0, size=size)
    )
    for f in (lambda x: x, huge)
  )
  for one, two in zip(found, other):
    changed = np.abs(up_of(one) - up_of(two)).max((2, 3)) > 1e-6
    may = np.zeros((R, E), bool)
    may[1, 2] = True
    assert not (changed & ~may).any()


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_every_expert_moves_as_a_lone_matrix_does(name):
  size = LARGE if name == "adafactor" else (D, F)
  params, *gradients = (tree(seed, size=size) for seed in range(3))
  together = moved(options(name), gradients, params)
  for r, e in ((0, 0), (1, 2)):
    lone = lambda t, r=r, e=e: {"matrix": up_of(t)[r, e]}  # noqa: E731
    alone = moved(options(name), [lone(g) for g in gradients], lone(params))
    for one, two in zip(together, alone):
      np.testing.assert_allclose(
        up_of(one)[r, e], two["matrix"], rtol=2e-4, atol=1e-6
      )


def test_adafactor_by_hand():
  """1804.04235, algorithm 4, in its first step."""
  params, gradient = tree(0, size=LARGE), tree(1, size=LARGE)
  (found,) = moved(options("adafactor"), [gradient], params)
  g, p = (np.float64(up_of(t)[1, 2]) for t in (gradient, params))
  square = g**2 + 1e-30  # The decay of the first step is 0.
  rows, columns = square.mean(1), square.mean(0)
  u = g / np.sqrt(np.outer(rows, columns) / rows.mean())
  u /= max(1.0, np.sqrt((u**2).mean()))
  u *= max(1e-3, np.sqrt((p**2).mean()))
  np.testing.assert_allclose(up_of(found)[1, 2], -u, rtol=1e-3, atol=1e-5)


def test_muon_is_orthogonal_in_every_matrix_and_of_adams_size():
  (found,) = moved(options("muon"), [tree(1)], tree(0))
  part = found["decoder"]["0"]
  for matrix in (
    *up_of(found).reshape(-1, D, F),
    *part["moe"]["router"]["kernel"],
    *part["attention"]["query"].reshape(R, D, -1),
    *part["attention"]["out"].reshape(R, -1, D),
  ):
    values = np.linalg.svd(matrix, compute_uv=False)
    size = 0.2 * np.sqrt(max(matrix.shape))
    # Five iterations bring singular values near one, not to it.
    assert (0.5 * size < values).all() and (values < 1.4 * size).all()
  adam = moved(options("adamw"), [tree(1)], tree(0))[0]
  for name in ("embedding",):
    np.testing.assert_allclose(found[name], adam[name], rtol=1e-5)
  np.testing.assert_allclose(
    part["ffn_norm"]["scale"],
    adam["decoder"]["0"]["ffn_norm"]["scale"],
    rtol=1e-5,
  )


@pytest.mark.parametrize("name", NAMES)
def test_parts_have_rates_of_their_own(name):
  gradient, params = tree(1), tree(0)
  (plain,) = moved(options(name), [gradient], params)
  factors = {"router": 0.0, "experts": 2.0, "rest": 0.5}
  (found,) = moved(
    options(name, learning_rate_factors=factors), [gradient], params
  )
  flat = lambda t: jax.tree_util.tree_leaves_with_path(t)  # noqa: E731
  for (path, one), (_, other) in zip(flat(plain), flat(found)):
    np.testing.assert_allclose(
      other, one * factors[optim.label(path)], rtol=1e-6
    )


def test_every_part_is_a_key_of_the_config():
  c = tiny.get_config()
  for key in ("learning_rate_factors", "weight_decay_factors"):
    assert set(c.optim[key]) == set(optim.LABELS)


def test_weight_decay_by_part():
  params = tree(0)
  nothing = jax.tree.map(jnp.zeros_like, params)
  c = options(
    "adamw", weight_decay=0.1, weight_decay_factors={"router": 0.0, "rest": 3}
  )
  (found,) = moved(c, [nothing], params)
  part, of = found["decoder"]["0"], params["decoder"]["0"]
  assert not part["moe"]["router"]["kernel"].any()
  np.testing.assert_allclose(up_of(found), -0.1 * up_of(params), rtol=1e-6)
  for name in ("query", "out"):
    np.testing.assert_allclose(
      part["attention"][name], -0.3 * of["attention"][name], rtol=1e-6
    )
  assert not part["ffn_norm"]["scale"].any()


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"learning_rate_factors": {"ruoter": 1.0}}, ["ruoter", "router"]),
    ({"weight_decay_factors": {"router": -1.0}}, ["router = -1.0"]),
    ({"name": "adafctor"}, ["adafctor", "adafactor"]),
  ],
)
def test_impossible_options_are_refused(changes, words):
  with pytest.raises(ConfigError) as e:
    optim.build(options(**({"name": "adamw"} | changes)), 10)
  assert all(word in str(e.value) for word in words), str(e.value)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_three_steps_on_a_mesh(name):
  """The same losses as without one; moments lie where their parameters do."""
  c = config()
  c.model.update(d_model=16)
  c.model.moe.update(num_experts=8)
  c.optim.update(name=name, learning_rate=1e-2)
  rng = np.random.default_rng(0)
  batch = {
    "inputs": rng.integers(0, V, (2, ROWS, L)).astype(np.int32),
    "targets": rng.integers(0, V, (2, ROWS, L)).astype(np.int32),
    "mask": np.ones((2, ROWS, L), bool),
  }

  def losses(mesh):
    model = models.build(
      c.model, vocab_size=V, seq_len=L, batch_sizes=(ROWS,), mesh=mesh
    )
    optimizer = optim.build(c.optim, 10)
    init = functools.partial(
      train_step.init_state,
      model=model,
      optimizer=optimizer,
      seq_len=L,
      batch=ROWS,
    )
    boxed = jax.eval_shape(init, jax.random.key(0))
    placed = {}
    if mesh is not None:
      placed = {"out_shardings": train_step.shardings(boxed, mesh)}
    state = jax.jit(lambda rng: train_step.nn.unbox(init(rng)), **placed)(
      jax.random.key(0)
    )
    if mesh is not None:
      _check_places(state, mesh)
    step = jax.jit(
      functools.partial(
        train_step.train_step,
        model=model,
        optimizer=optimizer,
        num_bytes_V=BYTES,
      )
    ).lower(state, batch)
    step = step.compile(compiler_options=mesh_cases.QUICK)
    found = []
    for _ in range(3):
      state, sums = step(state, batch)
      found.append(float(sums["loss"].value()))
    return found

  alone = losses(None)
  np.testing.assert_allclose(
    losses(mesh_cases.make_mesh((1, 2, 4, 1))), alone, atol=1e-4
  )
  assert alone[2] < alone[0]


def _check_places(state, mesh):
  experts = jax.NamedSharding(mesh, parallel.spec(("layers", "expert")))
  moments = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
    if "'experts'" in jax.tree_util.keystr(path) and leaf.ndim > 1
  ]
  moments = [leaf for leaf in moments if leaf.shape[1] == 8]
  assert moments
  for leaf in moments:
    held = leaf.sharding.shard_shape(leaf.shape)[1]
    assert held == experts.shard_shape(leaf.shape[:2])[1] < 8
