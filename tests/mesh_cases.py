"""Whole training steps on a mesh and without one, and how they compare.

`parallel_test` runs a covering set of these cases, `mesh_product` all of them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from configs import base
from moe_jax import models
from moe_jax.core import parallel
from moe_jax.moe import exchange, layer
from moe_jax.moe.types import Router, Side
from moe_jax.training import balancing, train_step
from tests import oracle, small

# (data, fsdp, expert, tensor).
MESHES = (
  (1, 1, 1, 1),
  (2, 1, 4, 1),
  (1, 2, 2, 2),
  (1, 1, 8, 1),
  (8, 1, 1, 1),
)
SCOPES = ("sequence", "group", "micro_batch", "global_batch")
# Layouts and bounds of rows. Buckets of experts divide over expert = 8.
LAYOUTS = {
  "einsum": ("einsum", "token", 1.0, None),
  "gather": ("gather", "token", 1.0, None),
  "sorted": ("sorted", "token", 1.0, None),
  "buckets": ("sorted", "token", 0.75, 8),
  "dropless": ("sorted", "token", None, None),
  "choice": ("gather", "choice", 1.0, None),
}
# Bounds on the distance of a leaf over its norm.
# The distance of two scores that another order of sums could exchange.
TIE = {"float64": 1e-6, "float32": 2e-5}
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}
V, L, E = 32, 8, 16
BIAS_RATE, Z_COEFFICIENT = 1e-2, 1e-2


@dataclasses.dataclass(frozen=True)
class Case:
  """A training step: all but the mesh, on which nothing may depend.

  layout: key of LAYOUTS.
  scopes: of the switch losses; the second scope of SCOPES has twice the
    coefficient of the first, and so on.
  z_loss: whether there is one.
  num_experts, top_k: E, which 8 divides, and K.
  tokens_per_group: "sequence", 2 * L (two sequences) or L // 2 (half a one).
  router: options of the router top_k.
  prefix, pattern, repeats: kinds of the layers.
  other: key of OTHERS, of layers "moe@other".
  remat: "none" or "block".
  exchange: of `exchange.KINDS`.
  once: whether the gradients of experts are added up once a step.
  shared: number of shared experts.
  use_bias: a bias after each matrix of the experts.
  rule: of the selection bias, which starts away from zero.
  skew: how strongly the router prefers a few experts.
  padding: rows of different lengths, one of them empty.
  accumulation: micro-batches.
  dtype: of parameters and activations.
  """

  layout: str
  scopes: tuple[str, ...] = ("micro_batch",)
  z_loss: bool = True
  num_experts: int = E
  top_k: int = 2
  tokens_per_group: int | str = "sequence"
  router: tuple[tuple[str, object], ...] = (("renormalize", True),)
  prefix: tuple[str, ...] = ()
  pattern: tuple[str, ...] = ("moe",)
  repeats: int = 2
  other: str | None = None
  remat: str = "block"
  exchange: str = "all_to_all"
  once: bool = False
  activation: str = "swiglu"
  shared: int = 0
  use_bias: bool = False
  rule: str = "sign"
  skew: float = 1.0
  padding: bool = True
  accumulation: int = 2
  dtype: str = "float64"
  seed: int = 0

  def __str__(self):
    group = str(self.tokens_per_group)
    layers = "+".join((*self.prefix, *self.pattern * self.repeats))
    options = ",".join(f"{k}={v}" for k, v in self.router)
    return (
      f"{self.dtype} {self.layout} {','.join(self.scopes)}"
      f" E={self.num_experts} K={self.top_k} group={group}"
      f" {layers} remat={self.remat} {self.exchange} shared={self.shared}"
      f" bias={self.use_bias} {options}"
    )


# Settings that vary besides the layout and the scope.
VARIATIONS = (
  dict(prefix=("dense",), shared=1, use_bias=True),
  dict(
    tokens_per_group=2 * L,
    router=(("score", "sigmoid"), ("scale", 2.5)),
    skew=3.0,
    rule="proportional",
  ),
  dict(
    tokens_per_group=L // 2,
    router=(("jitter", 0.1), ("noise", 0.3)),
    pattern=("dense", "moe"),
    repeats=1,
    use_bias=True,
    activation="gelu",
  ),
  dict(
    router=(
      ("score_before_top_k", False),
      ("apply_to", "input"),
      ("noise", 0.5),
    ),
    skew=5.0,
    shared=2,
    pattern=("moe", "dense"),
    activation="geglu",
  ),
)


# Keys of `model.moe` that layers "moe@other" have of their own.
OTHERS = {
  "few": {
    "num_experts": 4,
    "top_k": 1,
    "tokens_per_group": L // 2,
    "router": {"name": "top_k", "noise": 0.3},
    "dispatcher": {"name": "sorted"},
    "balancers": {"load": {"name": "switch", "coefficient": 0.1}},
  }
}

# Experts, and experts per token.
NUMBERS = ((16, 2), (8, 1), (64, 8), (64, 2))


def product(dtypes=("float64", "float32")):
  """All layouts x scopes, the other settings in turn; float32 once a layout."""
  cases = []
  for i, layout in enumerate(LAYOUTS):
    for j, scope in enumerate(SCOPES):
      num_experts, top_k = NUMBERS[(i + 2 * j) % len(NUMBERS)]
      settings = VARIATIONS[(i + j) % len(VARIATIONS)] | {
        "num_experts": num_experts,
        "top_k": top_k,
        "exchange": exchange.KINDS[(i + j // 2) % 2],
      }
      if top_k == 1:  # A renormalised top-1 weight is always 1.
        settings["router"] = tuple(
          option
          for option in settings.get("router", ())
          if option[0] != "score_before_top_k"
        )
      for dtype in dtypes:
        if dtype == "float32" and j != i % len(SCOPES):
          continue
        numbers = {}
        if dtype == "float32" and num_experts * top_k > 64:
          # So many scores lie near each other that some are always almost ties.
          numbers = {"num_experts": 16, "top_k": 2}
        case = Case(layout, (scope,), dtype=dtype, seed=i, **settings)
        cases.append(dataclasses.replace(case, **numbers))
  return cases


def coefficient(scope: str) -> float:
  """The coefficient of the switch loss of a scope."""
  return 0.1 * (1 + SCOPES.index(scope))


def micro_rows(case: Case) -> int:
  """Enough for each of 8 token shards to have a whole group."""
  return 16 if case.tokens_per_group == 2 * L else 8


def config(case: Case):
  """The config of a case."""
  c = base.get_config()
  dispatcher, order, factor, buckets = LAYOUTS[case.layout]
  c.model.update(
    d_model=16,
    num_layers=len(case.prefix) + len(case.pattern) * case.repeats,
    prefix=case.prefix,
    pattern=case.pattern,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    d_ff=16,
    remat=case.remat,
    dtype=case.dtype,
    allow_noncausal=order == "choice",
  )
  m = c.model.moe
  if factor is not None:
    tokens = {"sequence": L}.get(case.tokens_per_group, case.tokens_per_group)
    one_slot = (buckets or case.num_experts) / (tokens * case.top_k)
    factor = max(factor * (2 if tokens < L else 1), one_slot)
  m.update(
    num_experts=case.num_experts,
    top_k=case.top_k,
    d_expert=8,
    num_shared_experts=case.shared,
    activation=case.activation,
    use_bias=case.use_bias,
    capacity_factor=factor,
    expert_buckets=buckets,
    tokens_per_group=case.tokens_per_group,
    exchange=case.exchange,
  )
  m.router = {"name": "top_k", **dict(case.router)}
  m.dispatcher = {"name": dispatcher, "order": order}
  m.balancers = {
    "bias": {"name": "bias", "rate": BIAS_RATE, "rule": case.rule},
  }
  if case.z_loss:
    m.balancers["z"] = {"name": "z_loss", "coefficient": Z_COEFFICIENT}
  for scope in case.scopes:
    m.balancers[f"switch_{scope}"] = {
      "name": "switch",
      "coefficient": coefficient(scope),
      "scope": scope,
    }
  if case.other is not None:
    c.model.variants = {"other": {"moe": OTHERS[case.other]}}
  return c


def plain_model(case: Case, mesh):
  """The model of a case on a mesh; None: one device."""
  model = models.build(config(case).model, vocab_size=V, mesh=mesh)
  rows = {"rows": micro_rows(case)}
  models.check(model, lengths={"inputs": L}, batches=rows, mesh=mesh)
  return model


def build(case: Case, mesh):
  """The parts that `train_step` takes; the model reports ties."""

  def reporting(recipe):
    assert recipe.experts.checked is True
    return dataclasses.replace(recipe, router=watched(recipe.router))

  sgd = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
  return {
    "model": with_recipes(plain_model(case, mesh), reporting),
    "task": small.task(np.ones(V, np.int32), L, mesh),
    "optimizer": lambda *_: recording(sgd),
  }


def with_recipes(model, change):
  """The same decoder with `change(recipe)` in all its MoE layers."""
  kinds = tuple(
    (kind, parts._replace(recipe=parts.recipe and change(parts.recipe)))
    for kind, parts in model.arch.kinds
  )
  return model.clone(arch=dataclasses.replace(model.arch, kinds=kinds))


@functools.cache
def watched(router: Router) -> Router:
  """A router that reports which tokens had almost made another choice."""

  def route(params, x_TD, *, select, side, **kwargs):
    seen = []

    def selected(score_TE):
      seen.append(select(score_TE))
      return seen[-1]

    routing = router.route(params, x_TD, select=selected, side=side, **kwargs)
    best_TE = -jnp.sort(-jax.lax.stop_gradient(seen[0]), axis=-1)
    gap_TK = -jnp.diff(best_TE[:, : router.top_k + 1], axis=-1)
    tie = TIE[gap_TK.dtype.name]
    ties_T = (gap_TK.min(-1) < tie).astype(gap_TK.dtype)
    return routing.replace(extra={"ties": ties_T})

  return dataclasses.replace(router, route=route)


def recording(optimizer):
  """The same optimizer, whose state also holds the gradient it was given."""

  def update(gradient, state, params):
    updates, inner = optimizer.update(gradient, state[1], params)
    return updates, (gradient, inner)

  init = lambda params: (params, optimizer.init(params))  # noqa: E731
  return optax.GradientTransformation(init, update)


def draw_state(case: Case, boxed):
  """A TrainState of random numbers: biases and balancers are not zero."""
  rng = np.random.default_rng(case.seed)

  def leaf(path, shape):
    names = [getattr(p, "key", getattr(p, "name", "")) for p in path]
    if names[0] == "rng":
      return jax.random.key(case.seed)
    if names[0] not in ("params", "balance"):
      return np.zeros(shape.shape, shape.dtype)
    value = rng.normal(size=shape.shape)
    if names[-1] == "scale":
      value = 1 + value / 4
    elif names[-1] == "bias_E":
      value /= 20
    elif names[-1].endswith("_bias"):
      value /= 4
    elif "router" in names:
      towards = np.linspace(-1, 1, shape.shape[-1])
      value = (value + case.skew * towards) / shape.shape[-2] ** 0.5
    else:
      value /= 3
    return value.astype(case.dtype)

  state = jax.tree_util.tree_map_with_path(leaf, nn.unbox(boxed))
  return state


def initial_state(case: Case):
  """The state that `measure` starts from."""
  with jax.enable_x64(case.dtype == "float64"):
    return draw_state(case, _program(case, None)[0])


def draw_batch(case: Case):
  """Random tokens [A, rows, L], rows of different lengths."""
  rng = np.random.default_rng(100 + case.seed)
  shape = (case.accumulation, micro_rows(case), L)
  mask = np.ones(shape, bool)
  if case.padding:
    length = rng.integers(1, L + 1, shape[:2])
    length[0, 1] = 0
    length[:, 0] = L
    mask = np.arange(L) < length[..., None]
  return {
    "inputs": rng.integers(0, V, shape).astype(np.int32),
    "targets": rng.integers(0, V, shape).astype(np.int32),
    "mask": mask,
  }


def measure(case: Case, sizes, *, state=None, batch=None):
  """Everything that must not depend on the mesh, as numpy arrays.

  Args:
    case: what to run.
    sizes: of the mesh; None: no mesh.
    state, batch: other than `draw_state` and `draw_batch` make.

  Returns:
    {"logits", "stats" of every group of the first micro-batch, "gradient",
    "params" and "balance" after one step of SGD, "sums" of the step}, and the
    number of choices that were almost ties.
  """
  with jax.enable_x64(case.dtype == "float64"):
    boxed, run = _program(case, sizes)
    state = draw_state(case, boxed) if state is None else state
    batch = draw_batch(case) if batch is None else batch
    if sizes is not None:
      mesh = make_mesh(sizes)
      state = jax.device_put(state, train_step.shardings(boxed, mesh))
      tokens = jax.NamedSharding(mesh, jax.P(None, parallel.TOKENS))
      batch = jax.device_put(batch, tokens)
    found = jax.device_get(run(state, batch))
  return found, take_ties(found)


@functools.lru_cache(maxsize=2)
def _program(case, sizes):
  """The boxed state's shapes, and a function that compiles when called."""
  mesh = None if sizes is None else make_mesh(sizes)
  parts = build(case, mesh)
  numbers = numbers_of(parts["model"])
  init = functools.partial(train_step.init_state, **parts, numbers=numbers)
  boxed = jax.eval_shape(init, jax.random.key(0))
  once = mesh if case.once else None
  step = jax.jit(functools.partial(_everything, parts, once))
  compiled = {}

  def run(state, batch):
    shape = batch["inputs"].shape
    if shape not in compiled:
      lowered = step.lower(state, batch)
      compiled[shape] = lowered.compile()
    return compiled[shape](state, batch)

  return boxed, run


def numbers_of(model):
  """Numbers of a step whose optimizer takes none, without a moving average."""
  balancers = balancing.numbers(model.sublayers)
  return {"optim": None, "balancers": balancers, "ema": None}


# Compiled, which takes less time than one operation after the other.
moe_ffn = jax.jit(
  layer.moe_ffn, static_argnums=0, static_argnames=("mesh", "collect")
)


def assert_same_on_a_mesh(recipe, params, x_GTD, mask_GT, sizes) -> None:
  """Values, gradients and counts of a layer, with a mesh and without one."""
  r_GTD = np.random.default_rng(2).normal(size=x_GTD.shape)

  def value(params, x_GTD, mesh):
    y_GTD, stats, _ = layer.moe_ffn(
      recipe, params, {}, x_GTD, Side(mask_GT), mesh=mesh
    )
    return (y_GTD * r_GTD).sum(), (stats.count_E, stats.kept_E)

  def run(mesh):
    run = functools.partial(value, mesh=mesh)
    program = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))
    return jax.device_get(program(params, x_GTD))

  with jax.enable_x64(True):
    distance, leaf = worst(run(make_mesh(sizes)), run(None))
  assert distance <= 1e-9, leaf


def assert_gradient(recipe, params, x_GTD, mask_GT, by_hand, eps) -> None:
  """A layer's gradient is that of `by_hand(params)`, its values in numpy."""
  rng = np.random.default_rng(4)
  r_GTD = rng.normal(size=x_GTD.shape)
  leaves, tree = jax.tree.flatten(params)
  towards = [rng.normal(size=x.shape) for x in leaves]
  norm = np.sqrt(sum((x**2).sum() for x in towards))
  towards = [x / norm for x in towards]

  def numeric(leaves):
    return (r_GTD * by_hand(jax.tree.unflatten(tree, leaves))).sum()

  def value(leaves):
    params, side = jax.tree.unflatten(tree, leaves), Side(jnp.asarray(mask_GT))
    y_GTD = layer.moe_ffn(recipe, params, {}, jnp.asarray(x_GTD), side)[0]
    return (y_GTD * r_GTD).sum()

  expected = oracle.gradient_along(numeric, leaves, towards, eps=eps)
  with jax.enable_x64(True):
    gradients = jax.jit(jax.grad(value))([jnp.asarray(x) for x in leaves])
    found = sum(float((g * x).sum()) for g, x in zip(gradients, towards))
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def make_mesh(sizes):
  return parallel.make_mesh(sizes, jax.devices()[: np.prod(sizes)])


def _everything(parts, once, state, batch):
  model = parts["model"]
  numbers = numbers_of(model)
  step = functools.partial(train_step.train_step, **parts, once=once)
  new, sums = step(state, batch, numbers)
  # The first micro-batch once more, now with its outputs.
  logits, aux = model.apply(
    {"params": state.params, "balance": state.balance},
    batch["inputs"][0],
    batch["mask"][0],
    jax.random.fold_in(state.rng, state.step),
    train=True,
  )
  return {
    "logits": logits,
    "stats": balancing.statistics(aux, model.sublayers),
    "gradient": new.opt_state[0],
    "params": new.params,
    "balance": new.balance,
    "sums": sums,
  }


def take_ties(found) -> float:
  """The number of tokens with almost tied choices; removes it from `extra`."""
  ties = 0.0
  for by_path in (found["stats"], found["sums"]["stats"]):
    for stats in by_path.values():
      ties += float(stats.extra.pop("ties").sum())
  return ties


def dropped(found) -> int:
  """Assignments of the step without a slot."""
  causes = [s.dropped for s in found["sums"]["stats"].values()]
  return int(sum(c.sum() for c in jax.tree.leaves(causes)))


def worst(found, expected) -> tuple[float, str]:
  """The largest distance of a leaf over its norm, and the leaf's name.

  Integers count as infinitely far unless they are equal.
  """
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  leaves = jax.tree_util.tree_leaves_with_path(found)
  return max(
    _distance(path, a, b)
    for (path, a), b in zip(leaves, jax.tree.leaves(expected))
  )


def _distance(path, a, b):
  name, a, b = jax.tree_util.keystr(path), np.asarray(a), np.asarray(b)
  assert a.dtype == b.dtype and a.shape == b.shape, name
  if not np.issubdtype(a.dtype, np.floating):
    return 0.0 if np.array_equal(a, b) else np.inf, name
  if not (np.isfinite(a).all() and np.isfinite(b).all()):
    return np.inf, name
  a, b = np.float64(a), np.float64(b)
  norm = np.linalg.norm(b)
  return float(np.linalg.norm(a - b) / (norm if norm else 1.0)), name


def check(case: Case, found, expected) -> tuple[float, str]:
  """`worst` of two measurements of a case that decides something."""
  (found, _), (expected, ties) = found, expected
  assert not ties, f"{ties} choices are almost ties; change the seed of {case}"
  assert (dropped(expected) > 0) == (case.layout != "dropless")
  return worst(found, expected)
