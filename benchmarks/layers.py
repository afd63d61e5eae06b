"""Ways of computing one MoE layer, and the dense layer beside them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import peers
from benchmarks.shapes import Shape
from moe_jax.core import registry
from moe_jax.moe import experts, groups, layer, types


def implementations(
  shape: Shape,
  tokens_per_group: int = 256,
  backends: tuple[str, ...] = ("cpu", "reference"),
  dtype=jnp.float32,
) -> dict:
  """{name: (f(params, x_TD) -> y_TD, params, x_TD)}.

  Args:
    shape: of the layer.
    tokens_per_group: of the one-hot dispatcher, whose cost grows with it.
    backends: of grouped_matmul, for the dispatcher sorted.
    dtype: of tokens and of all weights but the router's.
  """
  sparse, wide, x_TD = inputs(shape, dtype)
  one = {k: w[None] for k, w in wide.items()}
  ours = functools.partial(_ours, shape)
  found = {
    "dense": (lambda p, x: _dense(shape).apply(p, x), wide),
    "dense/cpu": (functools.partial(_blocked, shape), one),
    **{f"sorted/{b}": (ours("sorted", b), sparse) for b in backends},
    "gather, capacity 1.25": (ours("gather", capacity_factor=1.25), sparse),
    "einsum, capacity 1.25": (
      ours("einsum", capacity_factor=1.25, tokens_per_group=tokens_per_group),
      sparse,
    ),
    "scatter, capacity 1.25": (
      functools.partial(peers.scatter, shape, 1.25),
      sparse,
    ),
    "ragged_dot": (functools.partial(peers.ragged_dot, shape), sparse),
    "all experts": (functools.partial(peers.all_experts, shape), sparse),
    "experts alone, batched": (
      functools.partial(peers.experts_alone, shape),
      sparse,
    ),
  }
  return {name: (f, params, x_TD) for name, (f, params) in found.items()}


def inputs(shape: Shape, dtype=jnp.float32) -> tuple[dict, dict, types.Array]:
  """Parameters of the layer, those of the dense one, and tokens."""
  rngs = jax.random.split(jax.random.key(0), 3)
  router = registry.load("routers", "top_k", top_k=shape.top_k)
  one = experts.build(shape.d_expert)
  sparse = {
    "router": router.init(rngs[2], shape.d_model, shape.num_experts),
    "experts": one.init(rngs[1], shape.num_experts, shape.d_model),
  }
  wide = _dense(shape).init(rngs[1], shape.d_model)
  x_TD = jax.random.normal(rngs[0], (shape.tokens, shape.d_model))
  sparse["experts"], wide, x_TD = jax.tree.map(
    lambda x: x.astype(dtype), (sparse["experts"], wide, x_TD)
  )
  return sparse, wide, x_TD


def recipe(
  shape: Shape,
  dispatcher: str = "sorted",
  backend: str | None = None,
  bound: types.Bound | None = None,
) -> layer.Recipe:
  """The layer's parts."""
  return layer.Recipe(
    num_experts=shape.num_experts,
    router=registry.load("routers", "top_k", top_k=shape.top_k),
    dispatcher=registry.load("dispatchers", dispatcher),
    experts=experts.build(shape.d_expert, grouped_matmul=backend),
    bound=bound,
  )


def run(recipe: layer.Recipe, groups: int, params, x_TD):
  """`moe_ffn` on so many equal groups of tokens, without its statistics."""
  x_GTD = x_TD.reshape(groups, -1, x_TD.shape[-1])
  side = types.Side(jnp.ones(x_GTD.shape[:2], bool))
  return layer.moe_ffn(recipe, params, {}, x_GTD, side)[0].reshape(x_TD.shape)


class Call(NamedTuple):
  """A compiled function with its arguments; calling it takes none."""

  compiled: jax.stages.Compiled
  args: tuple

  def __call__(self):
    return self.compiled(*self.args)

  @property
  def made_bytes(self) -> int:
    """Upper limit of the bytes that it allocates, results included."""
    plan = self.compiled.memory_analysis()
    return plan.temp_size_in_bytes + plan.output_size_in_bytes


def directions(f, params, x_TD) -> dict[str, Call]:
  """{direction: a call}: forward alone, and forward with the gradients of the
  parameters and of the tokens."""
  dy_TD = jax.random.normal(jax.random.key(9), x_TD.shape, x_TD.dtype)
  both = functools.partial(forward_backward, f)

  def compiled(f, *args):
    return Call(jax.jit(f).lower(*args).compile(), args)

  return {
    "forward": compiled(f, params, x_TD),
    "forward_backward": compiled(both, params, x_TD, dy_TD),
  }


def forward_backward(f, params, x_TD, dy_TD):
  """(y, gradients of the parameters and of x)."""
  y_TD, pull = jax.vjp(f, params, x_TD)
  return y_TD, pull(dy_TD)


def _ours(
  shape, dispatcher, backend=None, capacity_factor=None, tokens_per_group=0
):
  bound = None
  tokens = min(tokens_per_group or shape.tokens, shape.tokens)
  if capacity_factor is not None:
    bound = groups.capacity(
      capacity_factor, tokens, shape.top_k, shape.num_experts
    )
  made = recipe(shape, dispatcher, backend, bound)
  return functools.partial(run, made, shape.tokens // tokens)


def _dense(shape):
  return experts.dense(shape.top_k * shape.d_expert)


def _blocked(shape, params, x_TD):
  """The dense layer as one expert that all rows go to."""
  one = experts.build(shape.top_k * shape.d_expert, grouped_matmul="cpu")
  rows = types.Rows(x_TD, jnp.array([[len(x_TD)]], jnp.int32))
  return one.apply(params, rows, None).x
