"""Routers and balancers of every form train, on a mesh as without one.

They are in the plugin model and on the plugin task, which do not care that later
tokens decide; a decoder does.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from moe_jax import models
from moe_jax.core import parallel, registry
from moe_jax.core.errors import ConfigError
from moe_jax.models.generation import decoding
from moe_jax.moe import exchange, experts, layer
from moe_jax.moe.types import Bound, Side
from moe_jax.training import program, train_step
from tests import house, mesh_cases, oracle, small, tiers

PLUGINS = house.ROOT / "tests" / "plugins"
FOLDER = (str(PLUGINS),)
E, K = 8, 2
MESH = (2, 1, 4, 1)
STEPS = 2
# Keys of `model.moe` of the plugin model's layers. Two images are a group of
# expert choice.
LAYERS = {
  "expert_choice": {
    "router": {"name": "expert_choice"},
    "tokens_per_group": 32,
  },
  "soft": {"router": {"name": "soft", "normalize": True}},
  "quantile": {
    "router": {"name": "top_k"},
    "balancers": {"q": {"name": "quantile", "bins": 64}},
  },
  "noisy": {
    "router": {"name": "noisy_top_k"},
    "balancers": {
      "load": {"name": "cv_squared", "of": "load", "coefficient": 0.1},
      "importance": {
        **{"name": "cv_squared", "scope": "sequence", "coefficient": 0.1},
      },
    },
  },
  "relu": {
    "router": {"name": "relu", "average": 1.5},
    "top_k": 4,
    "balancers": {"l1": {"name": "l1", "experts": 1.5, "start": 1e-2}},
  },
  "threshold": {
    "router": {"name": "expert_threshold", "average": 2.0},
    "top_k": 4,
    "balancers": {"t": {"name": "threshold", "share": 0.25}},
  },
  "tiles": {
    "router": {"name": "tile_rounded", "tile": 3},
    "balancers": {"apart": {"name": "orthogonality", "coefficient": 1e-2}},
  },
  "sinkhorn": {
    "router": {"name": "sinkhorn"},
    "balancers": {"a": {"name": "adaptive", "target": 0.3, "start": 0.1}},
  },
  "bip": {
    "router": {"name": "top_k", "cosine": True, "expert_scale": True},
    "balancers": {
      "bip": {"name": "bip", "top_k": 2},
      "sent": {
        **{"name": "device", "of": "tokens", "scope": "group"},
        **{"coefficient": 0.1, "devices": 4},
      },
    },
  },
  "place": {
    "router": {
      **{"name": "by_feature", "feature": "position"},
      **{"num_values": 2, "boundaries": (8.0,)},
    },
    "balancers": {"load": {"name": "switch", "coefficient": 0.1}},
  },
  "hierarchical": {
    "router": {"name": "hierarchical", "num_groups": 4, "top_groups": 2},
    "balancers": {"entropy": {"name": "entropy", "coefficient": 0.1}},
  },
  "top_p": {
    "router": {"name": "top_p"},
    "balancers": {"devices": {"name": "device", "devices": 2}},
    "top_k": 4,
  },
  "hash": {
    "router": {"name": "hash", "vocab_size": 257},
    "balancers": {"z": {"name": "z_loss", "coefficient": 0.1}},
  },
  "random": {"router": {"name": "random"}},
  "forced": {"router": {"name": "forced", "exponent": 0.5}},
  "latent": {
    **{"router": {"name": "top_k"}, "d_latent": 6},
    "balancers": {
      "pid": {
        **{"name": "bias", "rule": "pid"},
        **{"rate": 0.01, "gain": 0.1, "damping": 0.1},
      },
    },
  },
}
LAYERS["top_p"]["balancers"]["devices"]["coefficient"] = 0.1
# The long tier has a model of the other layers.
QUICK = (
  *("expert_choice", "soft", "quantile", "noisy", "relu", "threshold", "bip"),
)
OTHERS = tuple(name for name in LAYERS if name not in QUICK)
NONCAUSAL = dict.fromkeys(
  ("expert_choice", "soft", "tiles", "sinkhorn"), "router"
)
NONCAUSAL["bip"] = "balancers.bip"


def config(names=QUICK):
  """A model with one layer of each of these kinds that classifies images."""
  c = tiny.get_config()
  c.plugins = FOLDER
  c.task.name = "digits"
  c.data.batch_size = 32
  c.eval.batch_size = 16
  c.model.update(name="patches", d_model=16, num_layers=len(names))
  c.model.moe.update(num_experts=E, top_k=K, d_expert=8)
  c.model.variants = {name: {"moe": LAYERS[name]} for name in names}
  c.model.pattern = tuple(f"moe@{name}" for name in names)
  c.optim.update(optimizer={"name": "sgd"}, learning_rate=0.5, warmup_steps=0)
  c.train.accumulation = 2
  return c


@functools.cache
def start(names=QUICK):
  """(boxed shapes, a state of random parameters) in float64."""
  c = config(names)
  task = program.build_task(c)
  init, _ = small.training(c, program.build_model(c, task), task)
  boxed = jax.eval_shape(init, jax.random.key(0))
  rng = np.random.default_rng(0)

  def draw(path, shape):
    name = path[0].name
    if name == "params":
      return rng.normal(size=shape.shape) / 3
    if name == "rng":
      return jax.random.key(0)
    wide = shape.dtype == np.float32
    return np.zeros(shape.shape, float if wide else shape.dtype)

  return boxed, jax.tree_util.tree_map_with_path(draw, nn.unbox(boxed))


@functools.cache
def trained(sizes, kind="all_to_all", names=QUICK):
  """(model, the state after some steps, the sums of the last) in float64."""
  c = config(names)
  c.model.moe.exchange = kind
  c.train.reduce_experts_once = kind == "all_gather"
  mesh = None if sizes is None else mesh_cases.make_mesh(sizes)
  boxed, state = start(names)
  with jax.enable_x64(True):
    task = program.build_task(c, mesh)
    model = program.build_model(c, task, mesh)
    _, step = small.training(c, model, task, mesh)
    batches, numbers = task.train(0), train_step.numbers(c, model)
    if mesh is not None:
      state = jax.device_put(state, train_step.shardings(boxed, mesh))
    run = jax.jit(step).lower(state, put(batches[0], mesh), numbers)
    run = run.compile()
    for i in range(STEPS):
      state, sums = run(state, put(batches[i], mesh), numbers)
    return model, *jax.device_get((state, sums))


def put(batch, mesh):
  """A training batch where the mesh has it."""
  if mesh is None:
    return batch
  rows = jax.NamedSharding(mesh, jax.P(None, parallel.TOKENS))
  return jax.device_put(batch, rows)


def layer_of(name):
  names = QUICK if name in QUICK else OTHERS
  return f"layer_{names.index(name)}"


@pytest.mark.parametrize("name", tiers.only(QUICK, LAYERS))
@pytest.mark.long
def test_they_train_on_a_mesh_as_without_one(name):
  """Two steps of SGD with two micro-batches each; and every part has learnt."""
  names = QUICK if name in QUICK else OTHERS
  _, before = start(names)
  (model, alone, sums), (_, on_mesh, sums_on_mesh) = (
    trained(None, names=names),
    trained(MESH, "all_to_all", names),
  )
  path = f"{layer_of(name)}/moe"
  found, expected = (
    {
      "params": models.at(state.params, layer_of(name)),
      "balance": models.at(state.balance, path),
      "stats": of_step["stats"][path],
    }
    for state, of_step in ((on_mesh, sums_on_mesh), (alone, sums))
  )
  distance, leaf = mesh_cases.worst(found, expected)
  assert distance <= 1e-9, leaf
  moe = models.at(before.params, path)
  for a, b in zip(
    *map(jax.tree.leaves, (models.at(alone.params, path), moe)), strict=True
  ):
    assert a.dtype == float
    assert np.linalg.norm(a - b) > 1e-5 * np.linalg.norm(b)
  parts = {"router", "experts", *(["latent"] if name == "latent" else [])}
  assert set(moe) | {"router"} == parts and path in model.sublayers


@pytest.mark.parametrize("kind", tiers.only(["all_to_all"], exchange.KINDS))
def test_the_whole_step_is_the_same_on_a_mesh(kind):
  """However the tokens that experts choose, or mix, get to them.

  With "all_gather", the gradients of experts are added up once a step, too.
  """
  _, alone, sums = trained(None)
  _, on_mesh, sums_on_mesh = trained(MESH, kind)
  for found, expected in (
    (on_mesh.params, alone.params),
    (on_mesh.balance, alone.balance),
    (sums_on_mesh["loss"], sums["loss"]),
    (sums_on_mesh["task"], sums["task"]),
  ):
    distance, leaf = mesh_cases.worst(found, expected)
    assert distance <= 1e-9, leaf


def test_loads_are_those_of_the_papers():
  """Experts that choose are all full; slots that mix hold all tokens."""
  _, _, sums = trained(None)
  tokens = 32 * 16
  stats = sums["stats"][f"{layer_of('expert_choice')}/moe"]
  assert stats.tokens.sum() == tokens
  assert (stats.count_E.reshape(-1) == tokens * K // E).all()
  stats = sums["stats"][f"{layer_of('soft')}/moe"]
  # Each expert has K slots in each group of 16 tokens.
  np.testing.assert_allclose(stats.count_E.reshape(-1), 32 * K)
  np.testing.assert_allclose(stats.weight_E.sum(), tokens)


# The layer by itself.

G, T, D, F = 2, 8, 6, 5


@pytest.mark.parametrize("name", ["expert_choice", "soft"])
def test_a_layer_is_what_the_paper_writes(name):
  """Loops over experts and slots, in numpy, with padding among the tokens."""
  recipe = recipe_of(name, F, Bound(1, E))
  rng = np.random.default_rng(0)
  params = {
    "router": recipe.router.init(jax.random.key(0), D, E),
    "experts": {
      "up": rng.normal(size=(E, D, F)),
      "down": rng.normal(size=(E, F, D)),
    },
  }
  params = jax.tree.map(lambda w: np.asarray(w, np.float32) / 2, params)
  x_GTD = rng.normal(size=(G, T, D)).astype(np.float32)
  mask_GT = np.arange(T) < np.array([[T], [T - 3]])

  @jax.jit
  def run(params, x_GTD):
    return layer.moe_ffn(recipe, params, {}, x_GTD, Side(mask_GT))[0]

  want_GTD = np.zeros((G, T, D))
  for g in range(G):
    by_hand = {"expert_choice": choose_by_hand, "soft": mix_by_hand}[name]
    real = mask_GT[g]
    kernel = np.float64(params["router"]["kernel"])
    networks = params["experts"]
    want_GTD[g, real] = by_hand(np.float64(x_GTD[g, real]), kernel, networks)
  np.testing.assert_allclose(run(params, x_GTD), want_GTD, atol=1e-5)


def softmax(x, axis):
  e = np.exp(x - x.max(axis, keepdims=True))
  return e / e.sum(axis, keepdims=True)


def choose_by_hand(x_TD, kernel_DE, networks):
  """2202.09368: S = softmax(x W) over experts; expert e takes its best C."""
  score_TE, y_TD = softmax(x_TD @ kernel_DE, axis=1), np.zeros_like(x_TD)
  for e in range(E):
    for t in np.argsort(-score_TE[:, e])[: max(1, len(x_TD) * K // E)]:
      y_TD[t] += score_TE[t, e] * oracle.experts(networks, e, x_TD[t], "relu")
  return y_TD


def mix_by_hand(x_TD, kernel_DEC, networks):
  """2308.00951, eq. 1 to 3: D over tokens, C over all slots."""
  logits_TEC = np.einsum("TD,DEC->TEC", x_TD, kernel_DEC)
  flat_TS = logits_TEC.reshape(len(x_TD), -1)
  dispatch_TS, combine_TS = softmax(flat_TS, axis=0), softmax(flat_TS, axis=1)
  y_TD = np.zeros_like(x_TD)
  for s in range(E * K):
    slot_D = dispatch_TS[:, s] @ x_TD
    out_D = oracle.experts(networks, s // K, slot_D, "relu")
    y_TD += combine_TS[:, s : s + 1] * out_D
  return y_TD


def recipe_of(name, d_expert, bound):
  """A layer with this router, the experts' slots being those of a bound."""
  return layer.Recipe(
    num_experts=E,
    router=registry.load("routers", name, plugins=FOLDER, top_k=K),
    dispatcher=registry.load("dispatchers", "gather"),
    experts=experts.build(d_expert, "relu"),
    bound=bound,
  )


def test_expert_choice_costs_its_slots():
  """Its FLOPs are those of token choice by `gather` with the same slots."""
  groups, tokens, width = 2, 64, 64
  slots = tokens * K // E
  flops = {}
  for name in ("expert_choice", "top_k"):
    recipe = recipe_of(name, width, Bound(slots, E))
    params = {
      "router": jax.ShapeDtypeStruct((width, E), np.float32),
      "experts": {
        k: jax.ShapeDtypeStruct((E, width, width), np.float32)
        for k in ("up", "down")
      },
    }
    params["router"] = {"kernel": params["router"]}
    x_GTD = jax.ShapeDtypeStruct((groups, tokens, width), np.float32)

    def total(params, x_GTD, recipe=recipe):
      side = Side(jnp.ones(x_GTD.shape[:2], bool))
      return layer.moe_ffn(recipe, params, {}, x_GTD, side)[0].sum()

    run = jax.jit(jax.grad(total, (0, 1))).lower(params, x_GTD)
    run = run.compile()
    flops[name] = run.cost_analysis()["flops"]
  # Two matrices, forward and twice as much backward, for every slot.
  products = 3 * 2 * (2 * width * width) * groups * E * slots
  assert products <= flops["top_k"] < 1.2 * products
  assert flops["expert_choice"] == pytest.approx(flops["top_k"], rel=0.05)


# Models and commands that take these parts.


def decoder(name):
  """The config of a decoder with this kind of layer."""
  c = small.config()
  c.plugins = FOLDER
  with c.unlocked():
    c.model.moe.balancers = {}
    c.model.moe.update(LAYERS[name])
  c.model.moe.update(num_experts=E, tokens_per_group="sequence")
  return c


@pytest.mark.parametrize("name", LAYERS)
def test_a_decoder_refuses_what_sees_later_tokens(name):
  c, task = decoder(name), small.task()
  if name not in NONCAUSAL:
    program.build_model(c, task)
    return
  words = 'of the MoE layers "moe".*choose another {0} that is causal.*or set'
  with pytest.raises(
    ConfigError, match=("^{0} " + words).format(NONCAUSAL[name])
  ):
    program.build_model(c, task)
  c.model.allow_noncausal = True
  program.build_model(c, task)


def test_a_balancer_sees_its_own_sums():
  """Under its own label, though another one observes too."""
  c = config(("quantile",))
  balancers = c.model.variants.quantile.moe.balancers
  loss = {"name": "device", "coefficient": 1.0, "devices": 2}
  balancers.other = loss | {"of": "tokens", "scope": "group"}
  task = program.build_task(c)
  model = program.build_model(c, task)
  with jax.enable_x64(False):
    parts = train_step.parts(c, model, task)
    numbers = train_step.numbers(c, model)
    state = train_step.init_state(jax.random.key(0), **parts, numbers=numbers)
    batch = task.train(0, None)[0]
    batch = {k: jnp.asarray(batch[k]) for k in task.spec}
    new, sums = jax.jit(functools.partial(train_step.train_step, **parts))(
      nn.unbox(state), batch, numbers
    )
  path = "layer_0/moe"
  assert models.at(new.balance, path)["q"]["bias_E"].any()
  # f and P of two devices: 1 where these are equal, 2 where one has all.
  assert 0.9 < sums["aux_loss"] < 2


def test_what_is_for_tokens_alone():
  """Slots of a router's own need no dispatcher, and no token has experts."""
  c = config()
  own = c.model.variants.expert_choice.moe
  own.update(capacity_factor=None, dispatcher={"name": "gather"})
  c.model.update(name="decoder", allow_noncausal=True, prefix=())
  c.model.pattern = ("moe@expert_choice",)
  model = models.build(c.model, vocab_size=16, plugins=FOLDER)
  models.check(model, lengths={"inputs": 32}, batches={"rows": 1}, mesh=None)
  with pytest.raises(ConfigError, match="leave out --experts"):
    decoding.generate(model, {}, [[1]], 1, experts=True)


def test_a_model_and_a_task_that_do_not_fit():
  c = config()
  c.task.name = "next_token"
  with pytest.raises(ConfigError, match='"patches" is not for this task'):
    program.build(c, prepare=False)
  c = config()
  c.model.update(name="decoder", pattern=("moe",))
  with pytest.raises(ConfigError, match='"decoder" is not for this task'):
    program.build(c, prepare=False)


@pytest.mark.parametrize(
  "field,shape,words",
  [
    (
      "weight_TK",
      (6, 1),
      r"returned weight_TK of shape \(6, 1\), not \[T, K\] with T = 6",
    ),
    ("valid_TK", (1, K), r"returned valid_TK of shape \(1, 2\), not \[T, K\]"),
    (
      "prob_TE",
      (6, 2),
      r"returned prob_TE of shape \(6, 2\), not \[T, E\] .* E = 8",
    ),
    ("choice", None, "returned NoneType, and declares .* TokenChoice"),
  ],
)
def test_a_router_of_other_shapes_is_refused(field, shape, words):
  """Otherwise a broadcast would give wrong numbers, and no error."""
  top_k = registry.load("routers", "top_k", top_k=K)

  def route(*args, **options):
    routing = top_k.route(*args, **options)
    made = None if shape is None else jnp.ones(shape)
    if field in vars(routing):
      return routing.replace(**{field: made})
    return routing.replace(choice=routing.choice.replace(**{field: made}))

  recipe, params = _recipe(dataclasses.replace(top_k, route=route))
  x_GTD, side = jnp.ones((1, 6, 4)), Side(jnp.ones((1, 6), bool))
  with pytest.raises(ConfigError, match=f'the router "top_k" {words}'):
    layer.moe_ffn(recipe, params, {}, x_GTD, side)


def test_a_balancer_without_its_state_is_named():
  router = registry.load("routers", "top_k", top_k=K)
  balancers = (("b", registry.load("balancers", "bias", rate=0.1)),)
  recipe, params = _recipe(router, balancers)
  side = Side(jnp.ones((1, 6), bool))
  with pytest.raises(ConfigError, match='no state of the balancer "b"'):
    layer.moe_ffn(recipe, params, {}, jnp.ones((1, 6, 4)), side)


def test_a_router_may_leave_open_how_many_experts_a_token_gets():
  recipe, params = _recipe(_without_top_k())
  side = Side(jnp.ones((1, 6), bool))
  y_GTD, *_ = layer.moe_ffn(recipe, params, {}, jnp.ones((1, 6, 4)), side)
  assert np.isfinite(y_GTD).all()


def _without_top_k():
  top_k = registry.load("routers", "top_k", top_k=K)
  return dataclasses.replace(top_k, top_k=None, fixed=False)


def _recipe(router, balancers=()):
  """(a small dropless recipe, its parameters)."""
  recipe = layer.Recipe(
    num_experts=E,
    router=router,
    dispatcher=registry.load("dispatchers", "sorted"),
    experts=experts.build(4),
    balancers=balancers,
  )
  rng = jax.random.key(0)
  params = {
    "router": router.init(rng, 4, E),
    "experts": recipe.experts.init(rng, E, 4),
  }
  return recipe, params
