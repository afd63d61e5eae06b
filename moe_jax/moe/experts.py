"""The expert networks, and the dense network they replace."""

import functools

import jax
import jax.numpy as jnp

from moe_jax.core.errors import ConfigError, did_you_mean
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
def build(
  d_expert: int,
  activation: str = "swiglu",
  use_bias: bool = False,
  init_scale: float = 1.0,
  backend: str | None = None,
) -> Experts:
  """E networks down(act(gate x) * up x), or down(act(up x)) if not gated.

  Args:
    d_expert: F, the hidden width of one expert.
    activation: "relu", "gelu" (two matrices), "swiglu", "geglu" (three;
      2002.05202) or "clamped_swiglu" (gpt-oss, 2508.10925).
    use_bias: a bias after each matrix.
    init_scale: variance of the weights times fan-in (Switch takes 0.1).
    backend: of `grouped_matmul`, for ragged rows.
  """
  check(activation)
  if backend is not None:
    kernels.check(backend)

  def init(rng, num_experts, d_model):
    one = lambda rng: init_mlp(  # noqa: E731
      rng, d_model, d_expert, activation, use_bias, init_scale
    )
    return jax.vmap(one)(jax.random.split(rng, num_experts))

  def apply(params, rows: Rows) -> Rows:
    if rows.tokens_per_expert_GE is None:
      return slotted(params, rows)
    return ragged(params, rows)

  def slotted(params, rows):
    groups, _, slots, _ = rows.x.shape
    # One batch axis, so that each expert is one matrix product.
    x_END = rows.x.swapaxes(0, 1).reshape(rows.x.shape[1], groups * slots, -1)

    def linear(params, name, x_END):
      y_ENF = jnp.einsum("END,EDF->ENF", x_END, params[name])
      bias_EF = params.get(f"{name}_bias")
      return y_ENF if bias_EF is None else y_ENF + bias_EF[:, None]

    y_END = mlp(params, x_END, activation, linear)
    y_EGCD = y_END.reshape(y_END.shape[0], groups, slots, -1)
    return Rows(y_EGCD.swapaxes(0, 1))

  def ragged(params, rows):
    y_ND = kernels.grouped_network(
      parts(activation),
      params,
      rows.x,
      rows.tokens_per_expert_GE.sum(0),
      backend=backend,
    )
    return Rows(y_ND, rows.tokens_per_expert_GE)

  axes = mlp_axes(activation, use_bias)
  axes = {k: ("expert", *v) for k, v in axes.items()}
  return Experts(init, axes, apply, activation)


@functools.cache
def dense(
  hidden: int,
  activation: str = "swiglu",
  use_bias: bool = False,
  init_scale: float = 1.0,
) -> Mlp:
  """One network of any hidden width, for dense layers and shared experts."""
  check(activation)
  return Mlp(
    init=lambda rng, d_model: init_mlp(
      rng, d_model, hidden, activation, use_bias, init_scale
    ),
    axes=mlp_axes(activation, use_bias),
    apply=lambda params, x: mlp(params, x, activation),
    activation=activation,
  )


@functools.cache
def gated(network: Mlp) -> Mlp:
  """Times sigmoid(x w), a number for each token (Qwen2-MoE, 2407.10671)."""

  def init(rng, d_model):
    rng, of_gate = jax.random.split(rng)
    initializer = jax.nn.initializers.truncated_normal(d_model**-0.5)
    return network.init(rng, d_model) | {
      "token_gate": initializer(of_gate, (d_model, 1))
    }

  def apply(params, x):
    gate = jax.nn.sigmoid(kernels.linear(params, "token_gate", x))
    return gate * network.apply(params, x)

  axes = {**network.axes, "token_gate": ("embed", None)}
  return Mlp(init, axes, apply, network.activation)


def mlp(params, x, activation, linear=kernels.linear):
  """One dense network, or with another `linear` many at once."""
  hidden, output = parts(activation)
  return output(linear, params, hidden(linear, params, x))


@functools.cache
def parts(activation: str):
  """The network in two: see `kernels.grouped_network`."""
  names, combine = ACTIVATIONS[activation]

  def hidden(linear, params, x):
    return [linear(params, name, x) for name in names]

  def output(linear, params, hidden):
    return linear(params, "down", combine(*hidden))

  return hidden, output


def init_mlp(rng, d_model, hidden, activation, use_bias, init_scale=1.0):
  """The parameters of one network: {gate,} up, down and their biases."""
  initializer = jax.nn.initializers.variance_scaling(
    init_scale, "fan_in", "truncated_normal"
  )
  names, _ = ACTIVATIONS[activation]
  shapes = {name: (d_model, hidden) for name in names}
  shapes["down"] = (hidden, d_model)
  rngs = dict(zip(sorted(shapes), jax.random.split(rng, len(shapes))))
  params = {name: initializer(rngs[name], shapes[name]) for name in shapes}
  if use_bias:
    params |= {f"{k}_bias": jnp.zeros(s[1]) for k, s in shapes.items()}
  return params


def mlp_axes(activation: str, use_bias: bool) -> dict[str, tuple[str, ...]]:
  """Logical axes of the parameters of one network."""
  names, _ = ACTIVATIONS[activation]
  axes = {name: ("embed", "mlp") for name in names}
  axes["down"] = ("mlp", "embed")
  if use_bias:
    axes |= {f"{k}_bias": v[1:] for k, v in axes.items()}
  return axes


def check(activation: str) -> None:
  """Raises ConfigError unless there is such an activation."""
  if activation not in ACTIVATIONS:
    raise ConfigError(
      f'there is no activation "{activation}"'
      + did_you_mean(activation, ACTIVATIONS)
    )
