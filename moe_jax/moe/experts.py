"""The expert networks, and the dense network they replace."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.core.options import integer, number, optional, word
from moe_jax.moe import kernels
from moe_jax.moe.types import Array, Experts, Mlp, Rows


def _clamped_swiglu(gate, up):
  """gpt-oss (2508.10925): limits of 7, a steeper gate, and up + 1."""
  gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
  return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)


# The matrices of the hidden layer, and what becomes of their results.
ACTIVATIONS = {
  "relu": (("up",), jax.nn.relu),
  "gelu": (("up",), jax.nn.gelu),
  "swiglu": (("gate", "up"), lambda gate, up: jax.nn.silu(gate) * up),
  "geglu": (("gate", "up"), lambda gate, up: jax.nn.gelu(gate) * up),
  "clamped_swiglu": (("gate", "up"), _clamped_swiglu),
}


@functools.cache
def network(activation: str) -> Callable:
  """expert(linear, params, x): down(act(gate x) * up x), or down(act(up x)).

  The one network of dense layers, slots and grouped rows, which differ in
  `linear(params, name, x)` = x @ params[name] + params[name_bias].
  """
  names, combine = ACTIVATIONS[activation]

  def expert(linear, params, x):
    hidden = combine(*(linear(params, name, x) for name in names))
    return linear(params, "down", hidden)

  return expert


@functools.cache
def build(
  d_expert: integer(1),
  activation: word(*ACTIVATIONS) = "swiglu",
  use_bias: bool = False,
  init_scale: number(above=0) = 1.0,
  backend: optional(word(*kernels.BACKENDS)) = None,
) -> Experts:
  """E networks of the same width.

  Args:
    d_expert: F, the hidden width of one expert.
    activation: "relu", "gelu" (two matrices), "swiglu", "geglu" (three;
      2002.05202) or "clamped_swiglu" (gpt-oss, 2508.10925).
    use_bias: a bias after each matrix.
    init_scale: variance of the weights times fan-in (Switch takes 0.1).
    backend: a file of `kernels`, for ragged rows; None: the platform's.
  """
  dense_one = dense(d_expert, activation, use_bias, init_scale)

  def init(rng, num_experts, d_model):
    rngs = jax.random.split(rng, num_experts)
    return jax.vmap(lambda rng: dense_one.init(rng, d_model))(rngs)

  return Experts(
    init,
    axes={k: ("expert", *v) for k, v in dense_one.axes.items()},
    apply=lambda params, rows, rng_GE: apply(
      network(activation), params, rows, backend
    ),
    added_once=dense_one.added_once,
    checked=backend is None or kernels.is_checked(backend),
    width=d_expert,
    resized=lambda width: build(
      width, activation, use_bias, init_scale, backend
    ),
    activation=activation,
  )


def apply(
  expert: Callable, params, rows: Rows, backend: str | None = None
) -> Rows:
  """Each expert's network on its own rows.

  Args:
    expert: as `network` returns it.
    params: {name: [E, ...]}.
    rows: slots or ragged rows.
    backend: of `kernels`, for ragged rows.
  """
  count_GE = rows.tokens_per_expert_GE
  if count_GE is not None:
    y_ND = kernels.grouped_network(
      expert, params, rows.x, count_GE.sum(0), backend=backend
    )
    return Rows(y_ND, count_GE)
  groups, num_experts, slots, _ = rows.x.shape
  # One batch axis, so that each expert is one matrix product.
  x_END = rows.x.swapaxes(0, 1).reshape(num_experts, groups * slots, -1)

  def linear(params, name, x_END):
    y_ENF = jnp.einsum("END,EDF->ENF", x_END, params[name])
    bias_EF = params.get(f"{name}_bias")
    return y_ENF if bias_EF is None else y_ENF + bias_EF[:, None]

  y_END = expert(linear, params, x_END)
  y_EGCD = y_END.reshape(num_experts, groups, slots, -1)
  return Rows(y_EGCD.swapaxes(0, 1))


def row_keys(rows: Rows, rng_GE: Array) -> Array:
  """A random key for each row, the same on any mesh: [G, E, C] or [N].

  Args:
    rows: slots or ragged rows.
    rng_GE: as `Experts.apply` gets it.
  """
  count_GE = rows.tokens_per_expert_GE
  if count_GE is None:
    slot_C = jnp.arange(rows.x.shape[2])
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(jax.vmap(fold, (0, None)), (0, None))(rng_GE, slot_C)
  count = count_GE.T.reshape(-1)  # Rows are sorted by expert, then by group.
  starts, size = jnp.cumsum(count) - count, rows.x.shape[0]
  block_N = jnp.repeat(jnp.arange(count.size), count, total_repeat_length=size)
  rng = rng_GE.T.reshape(-1)[block_N]
  return jax.vmap(jax.random.fold_in)(rng, jnp.arange(size) - starts[block_N])


@functools.cache
def dense(
  hidden: int,
  activation: str = "swiglu",
  use_bias: bool = False,
  init_scale: float = 1.0,
) -> Mlp:
  """One network of any hidden width, for dense layers and shared experts."""
  names, _ = ACTIVATIONS[activation]
  axes = {name: ("embed", "mlp") for name in names}
  axes["down"] = ("mlp", "embed")
  if use_bias:
    axes |= {f"{k}_bias": v[1:] for k, v in axes.items()}
  return Mlp(
    init=lambda rng, d_model: _init(
      rng, d_model, hidden, names, use_bias, init_scale
    ),
    axes=axes,
    apply=functools.partial(network(activation), kernels.linear),
    added_once=("down_bias",) if use_bias else (),
    width=hidden,
    resized=lambda width: dense(width, activation, use_bias, init_scale),
    activation=activation,
  )


def _init(rng, d_model, hidden, names, use_bias, init_scale):
  """The parameters of one network: the hidden matrices, down and biases."""
  initializer = jax.nn.initializers.variance_scaling(
    init_scale, "fan_in", "truncated_normal"
  )
  shapes = {name: (d_model, hidden) for name in names}
  shapes["down"] = (hidden, d_model)
  rngs = dict(zip(sorted(shapes), jax.random.split(rng, len(shapes))))
  params = {name: initializer(rngs[name], shapes[name]) for name in shapes}
  if use_bias:
    params |= {f"{k}_bias": jnp.zeros(s[1]) for k, s in shapes.items()}
  return params


@functools.cache
def gated(mlp: Mlp) -> Mlp:
  """Times sigmoid(x w), a number for each token (Qwen2-MoE, 2407.10671)."""

  def init(rng, d_model):
    rng, of_gate = jax.random.split(rng)
    initializer = jax.nn.initializers.truncated_normal(d_model**-0.5)
    return mlp.init(rng, d_model) | {
      "token_gate": initializer(of_gate, (d_model, 1))
    }

  def apply(params, x):
    gate = jax.nn.sigmoid(kernels.linear(params, "token_gate", x))
    return gate * mlp.apply(params, x)

  axes = {**mlp.axes, "token_gate": ("embed", None)}
  return Mlp(
    init,
    axes,
    apply,
    mlp.added_once,
    mlp.width,
    lambda width: gated(mlp.resized(width)),
    mlp.activation,
  )
