"""The expert networks, and the dense network they replace."""

import functools

import jax
import jax.numpy as jnp

from moe_jax.core.options import integer, number, optional, word
from moe_jax.moe import kernels
from moe_jax.moe.types import Array, Experts, Mlp, Rows


def _clamped_swiglu(gate, up):
  """gpt-oss (2508.10925): limits of 7, a steeper gate, and up + 1."""
  gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
  return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)


# The matrices of the hidden layer, and the function of their results.
ACTIVATIONS = {
  "relu": (("up",), jax.nn.relu),
  "gelu": (("up",), jax.nn.gelu),
  "swiglu": (("gate", "up"), lambda gate, up: jax.nn.silu(gate) * up),
  "geglu": (("gate", "up"), lambda gate, up: jax.nn.gelu(gate) * up),
  "clamped_swiglu": (("gate", "up"), _clamped_swiglu),
}


@functools.cache
def latent(width: int) -> Mlp:
  """Projections to a narrower width, in which experts work, and back.

  LatentMoE (2601.18089): y = (sum over chosen e of w_e expert_e(x "into")) "out_of",
  with a router that sees all of x. Experts cost width / D of what they would, and so
  do the rows that are sent between devices.

  Args:
    width: of the rows of the experts.
  """
  axes = {"into": ("embed", None), "out_of": (None, "embed")}

  def init(rng, d_model):
    normal = jax.nn.initializers.variance_scaling(
      1.0, "fan_in", "truncated_normal"
    )
    shapes = {"into": (d_model, width), "out_of": (width, d_model)}
    rngs = jax.random.split(rng)
    return {k: normal(key, shapes[k]) for k, key in zip(shapes, rngs)}

  return Mlp(init, axes, apply=kernels.linear, width=width)


def network(activation: str, linear, params, x) -> Array:
  """down(act(gate x) * up x), or down(act(up x)).

  The one network of dense layers, slots and grouped rows, which differ in `linear`.

  Args:
    activation: a key of `ACTIVATIONS`.
    linear: (params, name, x) -> x @ params[name] + params[name_bias].
    params: weights by name.
    x: what `linear` takes.
  """
  return linear(params, "down", _hidden(activation, linear, params, x))


def _hidden(activation, linear, params, x):
  names, combine = ACTIVATIONS[activation]
  return combine(*(linear(params, name, x) for name in names))


def _dropping(activation, rate, width, linear, params, rows) -> Array:
  """The network of rows with seeds, whose hidden units drop out; see `build`.

  Args:
    activation, linear, params: see `network`.
    rate, width: the dropout, and F of all shards.
    rows: (x [N, D], seed [N, 1]).
  """
  x, seed_N1 = rows
  hidden = _hidden(activation, linear, params, x)
  seed_N = jax.lax.stop_gradient(seed_N1)[:, 0].astype(jnp.uint32)

  def kept(seed):
    return jax.random.bernoulli(jax.random.key(seed), 1 - rate, (width,))

  kept_NF, here = jax.vmap(kept)(seed_N), hidden.shape[-1]
  if here != width:  # This device has a shard of F.
    first = jax.lax.axis_index("tensor") * here
    kept_NF = jax.lax.dynamic_slice_in_dim(kept_NF, first, here, axis=1)
  hidden = jnp.where(kept_NF, hidden / (1 - rate), 0)
  return linear(params, "down", hidden)


def _seeds(rng_GE, rows: Rows) -> Array:
  """A seed for each row, of its group, its expert and its place there.

  The same on every mesh. A float32 holds it exactly.

  Returns:
    [G, E, C, 1] for slots, [N, 1] for ragged rows.
  """

  def seed(rng, place):
    bits = jax.random.bits(jax.random.fold_in(rng, place))
    return (bits >> 8).astype(jnp.float32)

  count_GE = rows.tokens_per_expert_GE
  if count_GE is None:
    places_C = jnp.arange(rows.x.shape[2])
    of_slots = jax.vmap(
      jax.vmap(jax.vmap(seed, (None, 0)), (0, None)), (0, None)
    )
    return of_slots(rng_GE, places_C)[..., None]
  count_S, total = count_GE.T.reshape(-1), rows.x.shape[0]
  repeated = functools.partial(
    jnp.repeat, repeats=count_S, total_repeat_length=total
  )
  place_N = jnp.arange(total) - repeated(jnp.cumsum(count_S) - count_S)
  return jax.vmap(seed)(repeated(rng_GE.T.reshape(-1)), place_N)[:, None]


@functools.cache
def build(
  d_expert: integer(1),
  activation: word(*ACTIVATIONS) = "swiglu",
  use_bias: bool = False,
  init_scale: number(above=0) = 1.0,
  expert_dropout: optional(number(0, below=1)) = None,
  equal_experts: bool = False,
  grouped_matmul: optional(word(*kernels.BACKENDS)) = None,
) -> Experts:
  """E networks of the same width.

  Args:
    d_expert: F, the hidden width of one expert.
    activation: "relu", "gelu" (two matrices), "swiglu", "geglu" (three;
      2002.05202) or "clamped_swiglu" (gpt-oss, 2508.10925).
    use_bias: a bias after each matrix.
    init_scale: variance of the weights times fan-in (Switch takes 0.1).
    expert_dropout: chance that a hidden unit of a row is 0 in training, and the
      others are larger (2101.03961, 2.4, has 0.4 in fine-tuning); None: 0.
    equal_experts: all of a layer begin with the same weights (V-MoE, 2106.05974).
    grouped_matmul: a file of `kernels`, for ragged rows; None: the platform's.
  """
  options = activation, use_bias, init_scale
  mlp = dense(d_expert, *options)
  expert = functools.partial(network, activation)
  dropping = functools.partial(_dropping, activation, expert_dropout, d_expert)

  def apply(params, rows, rng_GE):
    count_GE, of_rows, x = rows.tokens_per_expert_GE, expert, rows.x
    if rng_GE is not None and expert_dropout:
      of_rows, x = dropping, (rows.x, _seeds(rng_GE, rows))
    if count_GE is not None:
      sizes_E = count_GE.sum(0)
      args = of_rows, params, x, sizes_E
      return Rows(
        kernels.grouped_network(*args, backend=grouped_matmul), count_GE
      )
    # Groups and slots are one axis, so that each expert is one matrix product.
    x_EN = jax.tree.map(_by_expert, x)
    of_slots = functools.partial(of_rows, kernels.linear)
    y_END = jax.vmap(of_slots)(params, x_EN)
    groups, num_experts, slots, width = rows.x.shape
    y_EGCD = y_END.reshape(num_experts, groups, slots, width)
    return Rows(y_EGCD.swapaxes(0, 1))

  return Experts(
    functools.partial(_init, mlp, equal_experts),
    axes={k: ("expert", *v) for k, v in mlp.axes.items()},
    apply=apply,
    added_once=mlp.added_once,
    draws=bool(expert_dropout),
    checked=grouped_matmul is None or kernels.is_checked(grouped_matmul),
    width=d_expert,
    resized=lambda width: build(
      width, *options, expert_dropout, equal_experts, grouped_matmul
    ),
    activation=activation,
  )


def _init(mlp, equal, rng, num_experts, d_model):
  """The parameters of all experts; `equal` ones have the same."""
  rngs = jax.random.split(rng, num_experts)
  if equal:
    rngs = jnp.broadcast_to(rngs[0], rngs.shape)
  return jax.vmap(lambda rng: mlp.init(rng, d_model))(rngs)


def _by_expert(x_GEC):
  """[G, E, C, ...] to [E, G * C, ...]."""
  x_EGC = x_GEC.swapaxes(0, 1)
  return x_EGC.reshape(len(x_EGC), -1, x_EGC.shape[-1])


@functools.cache
def dense(
  width: int,
  activation="swiglu",
  use_bias=False,
  init_scale=1.0,
  shared_gate=False,
) -> Mlp:
  """One network of any hidden width, for dense layers and shared experts.

  Args:
    width: F.
    activation: as in `build`.
    use_bias: as in `build`.
    init_scale: as in `build`.
    shared_gate: times sigmoid(x w), a number for each token (Qwen2-MoE,
      2407.10671).
  """
  options = activation, use_bias, init_scale, shared_gate
  names, _ = ACTIVATIONS[activation]
  axes = {name: ("embed", "mlp") for name in names} | {"down": ("mlp", "embed")}
  matrices = sorted(axes)
  if use_bias:
    axes |= {f"{k}_bias": v[1:] for k, v in axes.items()}
  if shared_gate:
    axes["token_gate"] = ("embed", None)

  def init(rng, d_model):
    sizes = {"embed": d_model, "mlp": width, None: 1}
    shapes = {k: tuple(sizes[name] for name in v) for k, v in axes.items()}
    params = {k: jnp.zeros(shape) for k, shape in shapes.items()}
    if shared_gate:
      rng, of_gate = jax.random.split(rng)
      normal = jax.nn.initializers.truncated_normal(d_model**-0.5)
      params["token_gate"] = normal(of_gate, shapes["token_gate"])
    scaled = jax.nn.initializers.variance_scaling(
      init_scale, "fan_in", "truncated_normal"
    )
    for k, key in zip(matrices, jax.random.split(rng, len(matrices))):
      params[k] = scaled(key, shapes[k])
    return params

  mlp = functools.partial(network, activation, kernels.linear)

  def gated(params, x):
    gate = jax.nn.sigmoid(kernels.linear(params, "token_gate", x))
    return gate * mlp(params, x)

  return Mlp(
    init,
    axes,
    apply=gated if shared_gate else mlp,
    added_once=("down_bias",) if use_bias else (),
    width=width,
    resized=lambda width: dense(width, *options),
    activation=activation,
  )
