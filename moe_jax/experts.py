"""The expert networks, and the dense network they replace."""

import functools

import jax
import jax.numpy as jnp

from moe_jax import grouped_matmul
from moe_jax.errors import ConfigError, did_you_mean
from moe_jax.types import Experts, Mlp, Rows

# Activation, and whether a second matrix gates it.
ACTIVATIONS = {
  "relu": (jax.nn.relu, False),
  "gelu": (jax.nn.gelu, False),
  "swiglu": (jax.nn.silu, True),
  "geglu": (jax.nn.gelu, True),
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
    activation: "relu", "gelu" (two matrices), "swiglu" or "geglu" (three;
      2002.05202).
    use_bias: a bias after each matrix.
    init_scale: variance of the weights times fan-in (Switch takes 0.1).
    backend: of `grouped_matmul`, for ragged rows.
  """
  check(activation)
  if backend is not None:
    grouped_matmul.check(backend)

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
    y_ND = grouped_matmul.grouped_network(
      parts(activation),
      params,
      rows.x,
      rows.tokens_per_expert_GE.sum(0),
      backend=backend,
    )
    return Rows(y_ND, rows.tokens_per_expert_GE)

  axes = mlp_axes(activation, use_bias)
  return Experts(init, {k: ("expert", *v) for k, v in axes.items()}, apply)


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
  )


def mlp(params, x, activation, linear=grouped_matmul.linear):
  """One dense network, or with another `linear` many at once."""
  hidden, output = parts(activation)
  return output(linear, params, hidden(linear, params, x))


@functools.cache
def parts(activation: str):
  """The network in two: see `grouped_matmul.grouped_network`."""
  act, gated = ACTIVATIONS[activation]

  def hidden(linear, params, x):
    names = ("gate", "up") if gated else ("up",)
    return [linear(params, name, x) for name in names]

  def output(linear, params, hidden):
    first, *up = hidden
    return linear(params, "down", act(first) * up[0] if gated else act(first))

  return hidden, output


def init_mlp(rng, d_model, hidden, activation, use_bias, init_scale=1.0):
  """The parameters of one network: {gate,} up, down and their biases."""
  initializer = jax.nn.initializers.variance_scaling(
    init_scale, "fan_in", "truncated_normal"
  )
  shapes = {"up": (d_model, hidden), "down": (hidden, d_model)}
  if ACTIVATIONS[activation][1]:
    shapes["gate"] = (d_model, hidden)
  rngs = dict(zip(sorted(shapes), jax.random.split(rng, len(shapes))))
  params = {name: initializer(rngs[name], shapes[name]) for name in shapes}
  if use_bias:
    params |= {f"{k}_bias": jnp.zeros(s[1]) for k, s in shapes.items()}
  return params


def mlp_axes(activation: str, use_bias: bool) -> dict[str, tuple[str, ...]]:
  """Logical axes of the parameters of one network."""
  axes = {"up": ("embed", "mlp"), "down": ("mlp", "embed")}
  if ACTIVATIONS[activation][1]:
    axes["gate"] = ("embed", "mlp")
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
