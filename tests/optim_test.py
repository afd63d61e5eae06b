"""Optimizers: experts and layers apart, parts with rates of their own.

Those of the plugin folders in MOE_JAX_PLUGINS are tested like ours.
"""

import os

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import tiny
from moe_jax import models
from moe_jax.core import options as options_lib
from moe_jax.core import registry
from moe_jax.core.errors import ConfigError
from moe_jax.core.roles import FACTORS, Role
from moe_jax.run import config as config_lib
from moe_jax.training import optimizers, train_step
from moe_jax.training.optimizers import schedules
from tests import mesh_cases
from tests.small import ROWS, L, V, config, task, training

R, E = 2, 3
D, F = 20, 24
LARGE = (136, 144)  # Adafactor factors no smaller matrices.
OURS = registry.names("optimizers")
PLUGINS = tuple(
  filter(None, os.environ.get("MOE_JAX_PLUGINS", "").split(os.pathsep))
)
NAMES = registry.names("optimizers", PLUGINS)
SCHEDULES = schedules.OPTIONS["schedule"].choices

ROLES = {
  "embedding": Role("embedding", ("vocab", "embed")),
  "head": Role("head", ("embed", "vocab")),
  "decoder": {
    "0": {
      "attention": {
        "query": Role("attention", ("layers", "embed", "heads", None)),
        "out": Role("attention", ("layers", "heads", None, "embed")),
      },
      "ffn_norm": {"scale": Role("norm", ("layers", "embed"))},
      "moe": {
        "router": {"kernel": Role("router", ("layers", "embed", None))},
        "experts": {
          "up": Role("experts", ("layers", "expert", "embed", "mlp"))
        },
      },
    }
  },
}


def options(name, **changes):
  c = tiny.get_config().optim
  c.optimizer = {"name": name}
  c.update(learning_rate=1.0, schedule="constant", warmup_steps=0)
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
    "head": draw(D, V),
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


def moved(c, gradients, params, roles=ROLES):
  """The updates of several steps, the numbers of `c` being arguments."""
  optimizers.numbers(c, 10, PLUGINS)
  direction = optimizers.load(c, PLUGINS).direction

  @jax.jit
  def run(params, numbers):
    optimizer = optimizers.build(direction, roles, numbers)
    state, updates = optimizer.init(params), []
    for gradient in gradients:
      update, state = optimizer.update(gradient, state, params)
      updates.append(update)
    return updates

  return jax.device_get(run(params, optimizers.numbers(c, 10, PLUGINS)))


def up_of(tree):
  return tree["decoder"]["0"]["moe"]["experts"]["up"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_parameters_mean_nothing(name):
  """Their roles do: under any other names they move the same."""
  new = {"decoder": "tower", "moe": "x_bias", "experts": "scale", "up": "head"}

  def renamed(tree):
    if not isinstance(tree, dict):
      return tree
    return {new.get(k, k): renamed(v) for k, v in tree.items()}

  c = options(name, weight_decay=0.1)
  params, gradient = (tree(i, size=LARGE) for i in (0, 1))
  (same,) = moved(c, [gradient], params)
  (other,) = moved(c, [renamed(gradient)], renamed(params), renamed(ROLES))
  jax.tree.map(np.testing.assert_array_equal, renamed(same), other)


@pytest.mark.parametrize("name", NAMES)
def test_an_expert_does_not_feel_another_ones_gradient(name):
  """Nor does a layer feel another layer's."""
  huge = lambda x: x.at[1, 2].multiply(1e3)  # noqa: E731
  size = LARGE if name == "adafactor" else (D, F)
  plain, other = (
    moved(
      options(name), [tree(1, f, size), tree(2, f, size)], tree(0, size=size)
    )
    for f in (lambda x: x, huge)
  )
  for one, two in zip(plain, other):
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
    alone = moved(
      options(name),
      [lone(g) for g in gradients],
      lone(params),
      {"matrix": Role("other", (None, None))},
    )
    for one, two in zip(together, alone):
      np.testing.assert_allclose(
        up_of(one)[r, e], two["matrix"], rtol=2e-4, atol=1e-6
      )


def test_adafactor_by_hand():
  """1804.04235, algorithm 4, in its first step."""
  params, gradient = tree(0, size=LARGE), tree(1, size=LARGE)
  (update,) = moved(options("adafactor"), [gradient], params)
  g, p = (np.float64(up_of(t)[1, 2]) for t in (gradient, params))
  square = g**2 + 1e-30  # The decay of the first step is 0.
  rows, columns = square.mean(1), square.mean(0)
  u = g / np.sqrt(np.outer(rows, columns) / rows.mean())
  u /= max(1.0, np.sqrt((u**2).mean()))
  u *= max(1e-3, np.sqrt((p**2).mean()))
  np.testing.assert_allclose(up_of(update)[1, 2], -u, rtol=1e-3, atol=1e-5)


def test_adafactor_takes_heads_together():
  """Factors are those of T5X: a row or a column for each number of each head."""
  heads, width = 4, 36
  axes = {"query": ("embed", "heads", None), "out": ("heads", None, "embed")}
  roles = {name: Role("attention", names) for name, names in axes.items()}
  rows, columns = LARGE
  assert columns == heads * width

  def drawn(seed):
    draw = np.random.default_rng(seed).standard_normal
    return {
      "query": draw((rows, heads, width)),
      "out": draw((heads, width, rows)),
    }

  def flat(t):
    return {
      "query": t["query"].reshape(rows, -1),
      "out": t["out"].reshape(-1, rows),
    }

  params, *gradients = map(drawn, range(3))
  c = options("adafactor")
  found = moved(c, gradients, params, roles)
  plain = dict.fromkeys(roles, Role("other", (None, None)))
  wanted = moved(c, [*map(flat, gradients)], flat(params), plain)
  for ours, theirs in zip(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, flat(ours), theirs)
  numbers = optimizers.numbers(c, 10)["direction"]
  state = optimizers.load(c).direction(numbers, roles)
  state = state.init(jax.tree.map(jnp.asarray, params))
  assert max(x.size for x in jax.tree.leaves(state)) == max(LARGE)


def test_muon_is_orthogonal_in_every_matrix_and_of_adams_size():
  (update,) = moved(options("muon"), [tree(1)], tree(0))
  part = update["decoder"]["0"]
  for matrix in (
    *up_of(update).reshape(-1, D, F),
    *part["moe"]["router"]["kernel"],
    *part["attention"]["query"].reshape(R, D, -1),
    *part["attention"]["out"].reshape(R, -1, D),
  ):
    values = np.linalg.svd(matrix, compute_uv=False)
    size = 0.2 * np.sqrt(max(matrix.shape))
    # Five iterations bring singular values near one, not to it.
    assert (0.5 * size < values).all() and (values < 1.4 * size).all()
  (adam,) = moved(options("adamw"), [tree(1)], tree(0))
  for name in ("embedding", "head"):
    np.testing.assert_allclose(update[name], adam[name], rtol=1e-5)
  np.testing.assert_allclose(
    part["ffn_norm"]["scale"],
    adam["decoder"]["0"]["ffn_norm"]["scale"],
    rtol=1e-5,
  )


def test_the_momentum_of_muon_is_its_own():
  """And b1 and b2 are of its AdamW part alone."""
  gradients = [tree(1), tree(2)]

  def last(**changes):
    c = options("muon")
    c.optimizer.update(changes)
    *_, update = moved(c, gradients, tree(0))
    return up_of(update), update["embedding"]

  matrix, embedding = last()
  other_matrix, same_embedding = last(momentum=0.5)
  same_matrix, other_embedding = last(b1=0.5, b2=0.5)
  np.testing.assert_array_equal(same_embedding, embedding)
  np.testing.assert_array_equal(same_matrix, matrix)
  assert np.abs(other_matrix - matrix).max() > 1e-3
  assert np.abs(other_embedding - embedding).max() > 1e-3


def test_adamw_is_optax_adam():
  """Updates are equal to the bit, though optax has its numbers as constants.

  Operation by operation: what XLA fuses, it may round otherwise.
  """
  c = options("adamw", learning_rate=0.1)
  c.optimizer.update(b1=0.8, b2=0.9, eps=1e-3)
  gradients, params = [tree(1), tree(2), tree(3)], tree(0)
  adam = optax.adam(0.1, b1=0.8, b2=0.9, eps=1e-3)

  def by_optax(params):
    state, updates = adam.init(params), []
    for gradient in gradients:
      update, state = adam.update(gradient, state, params)
      updates.append(update)
    return updates

  with jax.disable_jit():
    pairs = list(zip(moved(c, gradients, params), by_optax(params)))
  for ours, theirs in pairs:
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_parts_have_rates_of_their_own(name):
  gradient, params = tree(1), tree(0)
  (plain,) = moved(options(name), [gradient], params)
  factors = {"router": 0.0, "experts": 2.0, "rest": 0.5}
  (scaled,) = moved(
    options(name, learning_rate_factors=factors), [gradient], params
  )
  jax.tree.map(
    lambda role, one, other: np.testing.assert_allclose(
      other, one * factors.get(role.factor, 0.5), rtol=1e-6
    ),
    ROLES,
    plain,
    scaled,
  )


def test_every_part_may_have_factors():
  """From the command line too; what has none gets those of the rest."""
  given = {part: float(i) for i, part in enumerate(FACTORS)}
  texts = [f"optim.learning_rate_factors.{k}={x}" for k, x in given.items()]
  c = config_lib.overridden(tiny.get_config(), texts)
  assert optimizers.numbers(c.optim, 100)["factors"] == given
  c = config_lib.overridden(tiny.get_config(), ["optim.weight_decay=1"])
  c.optim.weight_decay_factors = {"attention": 2.0, "rest": 0.5}
  decay = optimizers.numbers(c.optim, 100)["decay"]
  assert decay == {**dict.fromkeys(FACTORS, 0.5), "attention": 2.0}


def test_a_part_may_warm_up_later():
  gradient, params = tree(1), tree(0)
  c = options("sgd", schedule="constant")
  gradients = [gradient] * 6
  plain = moved(c, gradients, params)
  c.part_warmup_steps = {"router": 4}
  late = moved(c, gradients, params)
  # The rest are all parts without a number of their own.
  c.part_warmup_steps = {"rest": 4, "router": 1}
  for one, other in zip(plain, moved(c, gradients, params)):
    equal = jax.tree.map(lambda x, y: bool((x == y).all()), one, other)
    of_router = jax.tree.map(
      lambda role, x: role.part != "router" or x, ROLES, equal
    )
    assert all(jax.tree.leaves(of_router))
    if one is plain[0]:
      assert not all(jax.tree.leaves(equal))
  for step, (one, other) in enumerate(zip(plain, late)):
    share = min((step + 1) / 4, 1)
    jax.tree.map(
      lambda role, x, y, share=share: np.testing.assert_allclose(
        y, x * (share if role.part == "router" else 1), rtol=1e-6
      ),
      ROLES,
      one,
      other,
    )


def test_adafactor_has_its_numbers():
  """Against optax's with the numbers in the program; GShard's and ST-MoE's."""
  gradients, params = [tree(1), tree(2), tree(3)], tree(0)
  plain = moved(options("adafactor"), gradients, params)
  c = options("adafactor")
  c.optimizer.update(most=0.3)
  assert_differ(plain[2], moved(c, gradients, params)[2])
  jax.tree.map(
    np.testing.assert_array_equal, plain[0], moved(c, gradients, params)[0]
  )
  c = options("adafactor")
  c.optimizer.update(clip=1e-3)
  small = moved(c, gradients[:1], params)[0]
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(1e-3 * x, y, rtol=1e-5),
    plain[0],
    small,
  )


def assert_differ(one, other):
  pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other))
  assert all((np.asarray(x) != y).any() for x, y in pairs)


def test_weight_decay_by_part():
  params = tree(0)
  nothing = jax.tree.map(jnp.zeros_like, params)
  c = options(
    "adamw",
    weight_decay=0.1,
    weight_decay_factors={"router": 0.0, "experts": 1.0, "rest": 3},
  )
  (update,) = moved(c, [nothing], params)
  part, of = update["decoder"]["0"], params["decoder"]["0"]
  assert not part["moe"]["router"]["kernel"].any()
  np.testing.assert_allclose(up_of(update), -0.1 * up_of(params), rtol=1e-6)
  np.testing.assert_allclose(update["head"], -0.3 * params["head"], rtol=1e-6)
  for name in ("query", "out"):
    np.testing.assert_allclose(
      part["attention"][name], -0.3 * of["attention"][name], rtol=1e-6
    )
  assert not part["ffn_norm"]["scale"].any()
  assert not update["embedding"].any()
  c.optimizer.name = "sgd"
  (update,) = moved(c, [nothing], params)
  assert not any(x.any() for x in jax.tree.leaves(update))


def test_clipping():
  params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
  roles = {"a": Role("other", (None,)), "b": Role("other", (None,))}
  gradient = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
  for clip, factor in ((None, 1.0), (10.0, 1.0), (1.0, 0.2)):
    c = options("sgd", learning_rate=0.1, clip_norm=clip)
    (update,) = moved(c, [gradient], params, roles)
    np.testing.assert_allclose(update["a"], [-0.3 * factor, 0], rtol=1e-6)
    np.testing.assert_allclose(update["b"], [-0.4 * factor], rtol=1e-6)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"learning_rate_factors": {"ruoter": 1.0}}, ["ruoter", "router"]),
    ({"weight_decay_factors": {"router": -1.0}}, ["router = -1.0"]),
    ({"optimizer": {"name": "adafctor"}}, ["adafctor", "adafactor"]),
    (
      {"optimizer": {"name": "sgd", "b1": 0.9}},
      ['optim.optimizer has no "b1"'],
    ),
    ({"optimizer": {"name": "muon", "momentum": 1.0}}, ["momentum = 1.0"]),
    ({"schedule": "cosin"}, ['did you mean "cosine"']),
    ({"warmup_steps": 20}, ["warmup_steps = 20"]),
    ({"schedule": "wsd", "decay_steps": 0}, ["decay_steps = 0"]),
    ({"schedule": "rsqrt", "decay_steps": 0}, ["decay_steps = 0", "10_000"]),
    (
      {"schedule": "rsqrt", "decay_steps": 3, "warmup_steps": 4},
      ["decay_steps = 3", "from the 4 of the warm-up on"],
    ),
    ({"learning_rate_factors": {"rest": 0.0}}, ["nothing is learnt"]),
    ({"part_warmup_steps": {"router": 0}}, ["router = 0"]),
    ({"learning_rate": float("nan")}, ["learning_rate = nan"]),
    ({"clip_norm": float("inf")}, ["clip_norm = inf"]),
  ],
)
def test_impossible_options_are_refused(changes, words):
  section = options("adamw", **changes)
  with pytest.raises(ConfigError) as e:
    options_lib.section(optimizers.OPTIONS).check(section, "optim")
    optimizers.numbers(section, 10)
  assert all(word in str(e.value) for word in words), str(e.value)


def test_a_plugin_that_builds_something_else(tmp_path):
  (tmp_path / "optimizers").mkdir()
  (tmp_path / "optimizers" / "none.py").write_text("def build():\n  pass\n")
  c = options("none")
  with pytest.raises(
    ConfigError, match="optimizers/none.*returned None.*Optimizer"
  ):
    optimizers.numbers(c, 10, (str(tmp_path),))
  with pytest.raises(ConfigError, match='no "none"'):
    optimizers.numbers(c, 10)


# Numbers do not compile.


def sections():
  """Sections that differ in every number, for each optimizer and schedule."""
  for name, schedule in zip(OURS, (*SCHEDULES, "cosine")):
    same = {"schedule": schedule, "warmup_steps": 2}
    c = options(name, decay_steps=3, clip_norm=1.0, **same)
    other = options(name, decay_steps=2, clip_norm=0.5, **same)
    other.update(learning_rate=0.2, warmup_steps=1, final_fraction=0.3)
    other.update(weight_decay=0.3)
    for key in ("learning_rate_factors", "weight_decay_factors"):
      other[key] = {"router": 0.5, "experts": 0.2, "rest": 0.1}
    if name in ("adamw", "muon"):
      other.optimizer.update(b1=0.5, b2=0.6, eps=1e-4)
    yield pytest.param(c, other, id=f"{name}-{schedule}")


@pytest.mark.parametrize(("one", "other"), list(sections()))
def test_other_numbers_are_the_same_program(one, other):
  """And change what it computes."""
  direction = optimizers.load(one).direction
  assert optimizers.load(other).direction is direction
  roles = {"w": Role("other", (None, None))}
  params = {"w": jnp.ones((3, 4))}

  @jax.jit
  @chex.assert_max_traces(n=1)
  def run(params, numbers):
    optimizer = optimizers.build(direction, roles, numbers)
    update, _ = optimizer.update(params, optimizer.init(params), params)
    return update["w"]

  chex.clear_trace_counter()
  numbers = optimizers.numbers(one, 9), optimizers.numbers(other, 19)
  first, second = (run(params, n) for n in numbers)
  assert np.abs(first - second).min() > 1e-4


def of_optax(c, num_steps):
  """The same schedule, made of optax's with numbers in the program."""
  peak, warmup, decay = c.learning_rate, c.warmup_steps, c.decay_steps
  rest = num_steps - warmup
  if c.schedule == "constant":
    after = optax.constant_schedule(peak)
  elif c.schedule == "cosine":
    after = optax.cosine_decay_schedule(
      peak, max(rest - 1, 1), c.final_fraction
    )
  elif c.schedule == "rsqrt":
    return optax.join_schedules(
      [
        optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1)),
        lambda s: peak * (decay / jnp.maximum(s + warmup + 1.0, decay)) ** 0.5,
      ],
      [warmup],
    )
  else:
    final = peak * c.final_fraction
    start = peak * (1 - 1 / decay) + final / decay
    after = optax.join_schedules(
      [
        optax.constant_schedule(peak),
        optax.linear_schedule(start, final, max(decay - 1, 1)),
      ],
      [rest - decay],
    )
  warm = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
  return optax.join_schedules([warm, after], [warmup])


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_of_arguments_and_of_constants(name):
  """They differ by no more than two roundings of the peak, at the ends too.

  Some processors round a product and a sum once, and whether the compiler uses
  that depends on what is constant. jaxlib 0.12 also rounds the angle of the
  cosine otherwise where it is constant.
  """

  @jax.jit
  def ours(numbers, steps):
    return jax.lax.map(schedules.rate(numbers), steps)

  for peak, warmup, decay, num_steps in (
    (1e-2, 50, 17, 500),
    (7.8e-4, 1000, 113, 5651),
    (3e-3, 0, 1, 1),
  ):
    c = options("adamw", learning_rate=peak, schedule=name, decay_steps=decay)
    c.warmup_steps = warmup
    if name == "rsqrt":  # It falls after the warm-up.
      c.decay_steps = max(decay, warmup)
    steps = jnp.arange(num_steps + 1)
    theirs = jax.jit(lambda s, c=c, n=num_steps: jax.lax.map(of_optax(c, n), s))
    np.testing.assert_allclose(
      ours(schedules.numbers(c, num_steps), steps),
      theirs(steps),
      rtol=0,
      atol=2 * peak * np.finfo(np.float32).eps,
    )


def schedule(num_steps, **options):
  c = tiny.get_config().optim
  c.update(learning_rate=1.0, **options)
  rate = schedules.rate(schedules.numbers(c, num_steps))
  return jax.vmap(rate)(jnp.arange(num_steps + 1)).tolist()


def test_warm_up_is_linear_and_moves_at_once():
  rates = schedule(10, warmup_steps=4, schedule="constant")
  np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
  assert rates[4:] == [1.0] * 7


def test_cosine():
  rates = schedule(12, warmup_steps=2, schedule="cosine", final_fraction=0.2)
  t = np.arange(10) / 9
  want = 0.2 + 0.8 * (1 + np.cos(np.pi * t)) / 2
  np.testing.assert_allclose(rates[2:12], want, rtol=1e-5)


def test_warm_up_stable_decay():
  rates = schedule(
    12, warmup_steps=2, schedule="wsd", decay_steps=4, final_fraction=0.2
  )
  assert rates[2:8] == [1.0] * 6
  np.testing.assert_allclose(rates[8:12], [0.8, 0.6, 0.4, 0.2], rtol=1e-5)


# On a mesh.


@pytest.mark.long
@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_three_steps_on_a_mesh(name):
  """The same losses as without one; moments lie where their parameters do."""
  c = config()
  c.model.update(d_model=16)
  c.model.moe.update(num_experts=8)
  c.optim.update(optimizer={"name": name}, learning_rate=1e-2)
  c.train.ema = 0.5
  numbers = train_step.numbers(c, models.build(c.model, vocab_size=V))
  rng = np.random.default_rng(0)
  batch = {
    "inputs": rng.integers(0, V, (2, ROWS, L)).astype(np.int32),
    "targets": rng.integers(0, V, (2, ROWS, L)).astype(np.int32),
    "mask": np.ones((2, ROWS, L), bool),
  }

  def losses(mesh):
    model = models.build(c.model, vocab_size=V, mesh=mesh)
    init, step = training(c, model, task(mesh=mesh))
    boxed = jax.eval_shape(init, jax.random.key(0))
    placed = {}
    if mesh is not None:
      placed = {"out_shardings": train_step.shardings(boxed, mesh)}
    state = jax.jit(lambda rng: nn.unbox(init(rng)), **placed)(
      jax.random.key(0)
    )
    if mesh is not None:
      _check_places(state, mesh)
    if mesh is not None:  # As a program asks for.
      placed = {"out_shardings": (placed["out_shardings"], None)}
    step = jax.jit(step, **placed).lower(state, batch, numbers)
    step = step.compile()
    losses, average = [], np.float64(up_of(state.params))
    for _ in range(3):
      state, sums = step(state, batch, numbers)
      losses.append(float(sums["loss"].value()))
      average = 0.5 * average + 0.5 * np.float64(up_of(state.params))
    np.testing.assert_allclose(up_of(state.ema), average, rtol=1e-5, atol=1e-7)
    return losses

  alone = losses(None)
  np.testing.assert_allclose(
    losses(mesh_cases.make_mesh((1, 2, 4, 1))), alone, atol=1e-4
  )
  assert alone[2] < alone[0]


def _check_places(state, mesh):
  experts = jax.NamedSharding(mesh, jax.P(None, "expert"))
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
  for p, e in zip(jax.tree.leaves(state.params), jax.tree.leaves(state.ema)):
    assert e.sharding == p.sharding
