"""The expert networks, and the dense network they replace."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.core.options import integer, number, optional, word
from moe_jax.moe import kernels
from moe_jax.moe.types import Experts, Mlp, Rows


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
  expert = network(activation)

  def init(rng, num_experts, d_model):
    rngs = jax.random.split(rng, num_experts)
    return jax.vmap(lambda rng: dense_one.init(rng, d_model))(rngs)

  def apply(params, rows, rng_GE):
    count_GE = rows.tokens_per_expert_GE
    if count_GE is not None:
      y_ND = kernels.grouped_network(
        expert, params, rows.x, count_GE.sum(0), backend=backend
      )
      return Rows(y_ND, count_GE)
    groups, num_experts, slots, _ = rows.x.shape
    # Groups and slots are one axis, so that each expert is one matrix product.
    x_END = rows.x.swapaxes(0, 1).reshape(num_experts, groups * slots, -1)
    y_END = jax.vmap(functools.partial(expert, kernels.linear))(params, x_END)
    y_EGCD = y_END.reshape(num_experts, groups, slots, -1)
    return Rows(y_EGCD.swapaxes(0, 1))

  return Experts(
    init,
    axes={k: ("expert", *v) for k, v in dense_one.axes.items()},
    apply=apply,
    added_once=dense_one.added_once,
    checked=backend is None or kernels.is_checked(backend),
    width=d_expert,
    resized=lambda f: build(f, activation, use_bias, init_scale, backend),
    activation=activation,
  )


@functools.cache
def dense(
  hidden: int, activation="swiglu", use_bias=False, init_scale=1.0
) -> Mlp:
  """One network of any hidden width, for dense layers and shared experts.

  Args: hidden: F; the others are those of `build`.
  """
  names, _ = ACTIVATIONS[activation]
  axes = {name: ("embed", "mlp") for name in names}
  axes["down"] = ("mlp", "embed")
  if use_bias:
    axes |= {f"{k}_bias": v[1:] for k, v in axes.items()}

  def init(rng, d_model):
    sizes = {"embed": d_model, "mlp": hidden}
    shapes = {k: tuple(sizes[name] for name in v) for k, v in axes.items()}
    matrices = sorted(k for k in shapes if len(shapes[k]) == 2)
    initializer = jax.nn.initializers.variance_scaling(
      init_scale, "fan_in", "truncated_normal"
    )
    params = {k: jnp.zeros(shape) for k, shape in shapes.items()}
    for k, key in zip(matrices, jax.random.split(rng, len(matrices))):
      params[k] = initializer(key, shapes[k])
    return params

  return Mlp(
    init,
    axes,
    apply=functools.partial(network(activation), kernels.linear),
    added_once=("down_bias",) if use_bias else (),
    width=hidden,
    resized=lambda width: dense(width, activation, use_bias, init_scale),
    activation=activation,
  )


@functools.cache
def gated(mlp: Mlp) -> Mlp:
  """Times sigmoid(x w), a number for each token (Qwen2-MoE, 2407.10671)."""

  def init(rng, d_model):
    rng, of_gate = jax.random.split(rng)
    initializer = jax.nn.initializers.truncated_normal(d_model**-0.5)
    token_gate = initializer(of_gate, (d_model, 1))
    return mlp.init(rng, d_model) | {"token_gate": token_gate}

  def apply(params, x):
    gate = jax.nn.sigmoid(kernels.linear(params, "token_gate", x))
    return gate * mlp.apply(params, x)

  return dataclasses.replace(
    mlp,
    init=init,
    axes={**mlp.axes, "token_gate": ("embed", None)},
    apply=apply,
    resized=lambda width: gated(mlp.resized(width)),
  )
