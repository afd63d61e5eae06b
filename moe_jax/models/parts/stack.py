"""Layers one after another, dense or MoE in any pattern."""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.core import parallel
from moe_jax.core.errors import ConfigError
from moe_jax.core.options import integer, items, number, optional, word
from moe_jax.models import attention
from moe_jax.models.parts import dense, dropout, modulation, norms
from moe_jax.models.parts.layers import Layer
from moe_jax.moe import dispatchers, exchange, linen
from moe_jax.moe.types import Array, Sublayer

_only = jax.checkpoint_policies.save_only_these_names
REMAT = {
  "none": None,
  "dispatch": _only(*dispatchers.SAVED, *exchange.SAVED),
  "block": _only(*dispatchers.SAVED),
}
_OUTSIDE = 2**20  # Stands for a layer's number in dropout outside of layers.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stack:
  """Everything about some layers but their parameters. Hashable.

  num_layers: how many layers there are.
  kinds: (kind, Layer) of every kind in prefix and pattern.
  prefix, pattern: kinds of the first layers, and of those that repeat after
    them: "dense", "moe", or "moe+dense", a dense network after the experts
    (ST-MoE, 2202.08906); with keys of its own "dense@VARIANT" and so on.
  norm, norm_eps: see `norms.Norm`.
  remat: the values of a block that the backward pass computes again. "block":
    all but the plan's integers; "dispatch": all but these and the rows that
    experts got and gave, so that nothing is sent twice; "none": nothing.
  dropout: chance that a number of a sublayer's output is 0 in training (T5).
  attention_dropout: of attention's weights; None: as `dropout`.
  hidden_dropout: of the hidden units of dense networks; None: as `dropout`.
  allow_noncausal: build a decoder though its routing looks ahead.
  mesh: the devices to run on; None: one device.
  names: of the parameters of prefix and pattern.
  sequence: the array of a batch whose tokens pass these layers.
  first_number: number of the first of these layers in the model.
  causal: whether a token must not depend on later ones.
  axes: of the grid that tokens stand in; 1: they stand in a row.

  Raises:
    ConfigError: options that do not fit together, with the remedy.
  """

  num_layers: integer(1, 10_000)
  kinds: tuple[tuple[str, Layer], ...]
  prefix: items(str)
  pattern: items(str)
  norm: word(*norms.KINDS)
  norm_eps: number(above=0)
  remat: word(*REMAT)
  dropout: number(0, below=1) = 0.0
  attention_dropout: optional(number(0, below=1)) = None
  hidden_dropout: optional(number(0, below=1)) = None
  allow_noncausal: bool = False
  mesh: jax.sharding.Mesh | None = None
  names: tuple[str, str] = ("prefix", "decoder")
  sequence: str = "inputs"
  first_number: int = 0
  causal: bool = True
  axes: int = 1

  def __post_init__(self):
    rest = self.num_layers - len(self.prefix)
    if not self.pattern or rest < 0 or rest % len(self.pattern):
      raise ConfigError(
        f"num_layers = {self.num_layers} is not the prefix {self.prefix} plus a"
        f" whole number of patterns {self.pattern}"
      )
    for kind, parts in self.kinds:
      axes = getattr(parts.attention, "rope_axes", 1)
      if axes not in (1, self.axes):
        raise ConfigError(
          f'attention of layers "{kind}" has rope_axes = {axes}, and the tokens of this'
          f" model stand in a grid of {self.axes}; set it to 1 or {self.axes}"
        )
    tables = {
      parts.attention.bias_table
      for _, parts in self.kinds
      if parts.attention.position_bias == "shared"
    }
    if len(tables) > 1:
      raise ConfigError(
        'layers with attention.position_bias = "shared" share one table, but differ'
        ' in num_heads, bias_buckets or bias_distance; use "layer"'
      )

  def check_features(self, given: Mapping[str, int | tuple | None]) -> None:
    """Raises ConfigError for a router that looks at features not given.

    Args:
      given: {feature: number of its values, None: any; or (lowest, highest)}.
    """
    for kind, parts in self.kinds:
      wanted = parts.recipe.router.features if parts.recipe else {}
      for feature, known in wanted.items():
        if feature not in given:
          raise ConfigError(
            f'the router of layers "{kind}" looks at the feature "{feature}", which'
            f" this model does not have; it has: {', '.join(sorted(given))}"
          )
        _check_feature(kind, feature, known, given[feature])

  @property
  def segments(self) -> tuple[tuple[str, tuple[str, ...], int, int], ...]:
    """(name, pattern, repeats, index of its first layer) of each segment."""
    first = len(self.prefix)
    repeats = (self.num_layers - first) // len(self.pattern)
    prefix, rest = self.names
    begin = self.first_number
    found = ((prefix, self.prefix, 1, begin),) if first else ()
    more = ((rest, self.pattern, repeats, begin + first),) if repeats else ()
    return found + more

  @property
  def layers(self) -> tuple[str, ...]:
    """The kind of every layer, from the first to the last."""
    return sum((p * repeats for _, p, repeats, _ in self.segments), ())

  @property
  def each_layer(self) -> tuple[Layer, ...]:
    """The parts of every layer, from the first to the last."""
    return tuple(map(self.layer, self.layers))

  @property
  def flops_per_pair(self) -> int:
    """Operations of all layers for one query and one key."""
    return sum(parts.attention.flops_per_pair for parts in self.each_layer)

  @property
  def sublayers(self) -> dict[str, Sublayer]:
    """{"SEGMENT/POSITION/moe": Sublayer}: the places of the MoE layers."""
    return {
      f"{segment}/{i}/moe": Sublayer(
        parts.recipe,
        parts.grouping,
        tuple(first + i + r * len(pattern) for r in range(repeats)),
        sequence=self.sequence,
      )
      for segment, pattern, repeats, first in self.segments
      for i, parts in enumerate(map(self.layer, pattern))
      if parts.recipe is not None
    }

  def drops(self, rate: float | None) -> float:
    """Returns a rate of dropout; None stands for `dropout`."""
    return self.dropout if rate is None else rate

  def seeing_all(self) -> "Stack":
    """Returns these layers with attention to later tokens too."""
    kinds = (
      (kind, parts._replace(attention=parts.attention.seeing_all()))
      for kind, parts in self.kinds
    )
    return dataclasses.replace(self, kinds=tuple(kinds))

  def layer(self, kind: str) -> Layer:
    """Returns the layer of this kind."""
    return dict(self.kinds)[kind]

  def check_causal(self, length: int, train: bool) -> None:
    """Raises ConfigError for layers that look at later tokens.

    Args:
      length, train: tokens of a sequence; whether capacity is that of training.
    """
    if not self.causal or self.allow_noncausal:
      return
    for kind, parts in self.kinds:
      if not parts.attention.causal:
        raise ConfigError(
          f'attention of layers "{kind}" has causal = False and shows a decoder what'
          " it is to predict; set attention.causal = True, or"
          " model.allow_noncausal = True"
        )
      if parts.recipe is None:
        continue
      _, recipe = parts.grouping.resolve(parts.recipe, length, train)
      if not recipe.looking_ahead:
        continue
      key, spec = recipe.looking_ahead[0], recipe.router.spec
      remedy = f"choose another {key} that is causal (docs/routing.md)"
      if key == "dispatcher":
        remedy = 'set dispatcher.order = "token"'
      elif key == "router" and spec and "priority" in spec.options:
        remedy = 'set router.priority = "none"'
      raise ConfigError(
        f'{key} of the MoE layers "{kind}" lets the choice of a token depend on later'
        f" tokens, which a decoder must not see; {remedy}, or set"
        " model.allow_noncausal = True"
      )


class Call(NamedTuple):
  """The arguments that all layers of a stack get in a forward pass.

  context: of self-attention, see `attention.context`.
  experts: arguments of `linen.MoE` beside x.
  cross: of attention to another stack's output; None: there is none.
  condition_BND: of the modulation of sublayers, see `modulation`, or None.
  rng_B: keys of the rows, for dropout; None: no dropout.
  """

  context: attention.context.Context
  experts: Mapping
  cross: attention.context.Context | None = None
  condition_BND: Array | None = None
  rng_B: Array | None = None


class Block(nn.Module):
  """x + f(norm(x)) for each f in turn: attention, cross, experts, dense.

  kind, stack: the kind of layer, and the stack that it belongs to.
  train, collect: as in `linen.MoE`.
  """

  kind: str
  stack: Stack
  train: bool
  collect: str | None

  @nn.compact
  def __call__(self, x_BLD, layer_index, call):
    """Returns (x_BLD after the layer, aux), see `run`.

    Args:
      x_BLD, layer_index, call: vectors, the layer's number in the model,
        `Call`.
    """
    m, parts, aux = self.stack, self.stack.layer(self.kind), {}

    def rng_B(place):
      return dropout.keys(call.rng_B, layer_index, place)

    modulated = modulation.of_block(self, call.condition_BND)

    def norm(name):
      own = modulated.get(name)
      kind = m.norm if own is None else "plain"
      y = norms.Norm(kind, m.norm_eps, name=f"{name}_norm")(x_BLD)
      return y if own is None else own.entered(y)

    def add(name, y, of=""):
      y = modulated[of].left(y) if of in modulated else y
      y = dropout.drop(y, m.dropout, rng_B(name))
      names = ("batch", None, None)
      return parallel.constrain(x_BLD + y, names, m.mesh)

    def attend(name, options, context):
      rate = m.drops(m.attention_dropout)
      more = {"dropout": rate} if rate else {}
      module = options.module(options, m.mesh, name=name, **more)
      context = context._replace(rng_B=rng_B(f"{name}_weights"))
      return add(name, module(norm(name), context), name)

    x_BLD = attend("attention", parts.attention, call.context)
    if call.cross is not None:
      x_BLD = attend("cross", parts.attention.as_cross(), call.cross)
    if parts.recipe is not None:
      moe = linen.MoE(parts.recipe, parts.grouping, m.mesh, name="moe")
      more = {"train": self.train, "collect": self.collect}
      more |= {"layer_index": layer_index, **call.experts}
      y, stats, collected = moe(norm("ffn"), **more)
      aux["moe"] = {"stats": stats, **collected}
      x_BLD = add("moe", y, "ffn")
    if parts.mlp is not None:
      name = "ffn" if parts.recipe is None else "mlp"
      mlp = dense.Dense(
        parts.mlp, m.mesh, m.drops(m.hidden_dropout), name="mlp"
      )
      x_BLD = add("mlp", mlp(norm(name), rng_B("hidden")), name)
    return x_BLD, aux


class Repeat(nn.Module):
  """A repeat of a segment's pattern, the body of a scan over repeats.

  pattern: kinds of its layers.
  stack, train, collect: as in `Block`.
  alone: whether it is the only repeat: then XLA makes no loop, and would reuse
    the forward pass where the backward pass is to recompute it.
  """

  pattern: tuple[str, ...]
  stack: Stack
  train: bool
  collect: str | None
  alone: bool

  @nn.compact
  def __call__(self, x_BLD, layer_index, call):
    """Returns (x_BLD after the layers, aux).

    Args:
      x_BLD, layer_index, call: as in `Block`, for the first layer.
    """
    block, policy, aux = Block, REMAT[self.stack.remat], {}
    if policy is not None:
      block = nn.remat(Block, policy=policy, prevent_cse=self.alone)
    for i, kind in enumerate(self.pattern):
      layer = block(kind, self.stack, self.train, self.collect, name=str(i))
      x_BLD, aux[str(i)] = layer(x_BLD, layer_index + i, call)
    return x_BLD, aux


# All repeats of a pattern, as one program over arrays of their parameters.
Segment = nn.scan(
  Repeat,
  variable_axes={"params": 0, "balance": 0, "cache": 0, "memory": 0},
  split_rngs={"params": True},
  in_axes=(0, nn.broadcast),
  metadata_params={nn.PARTITION_NAME: "layers"},
)


def run(module, stack: Stack, x_BLD: Array, call: Call, train, collect):
  """Runs the layers of a stack, as modules of the module that calls this.

  Args:
    module: the linen module whose method this is a part of.
    stack, x_BLD, call: the layers, vectors of their sequence, their arguments.
    train, collect: as in `linen.MoE`.

  Returns:
    x_BLD; {segment: {position in the pattern: {"moe": {"stats": Stats, ...}}}},
    each array with a leading axis of repeats; {} for a dense layer.
  """
  aux, call = {}, _with_bias(module, stack, call)
  for name, pattern, repeats, start in stack.segments:
    segment = Segment(pattern, stack, train, collect, repeats == 1, name=name)
    index_R = start + len(pattern) * jnp.arange(repeats)
    x_BLD, aux[name] = segment(x_BLD, index_R, call)
  return x_BLD, aux


def dropping(stack: Stack, call: Call, rng, first, train: bool):
  """Returns (call with keys for dropout, (x_BLD, place) -> x_BLD with dropout).

  Args:
    stack, call: the layers, with their rates; the call without keys.
    rng, first: as in `linen.MoE`.
    train: outside of training nothing is dropped.
  """
  rates = stack.dropout, stack.attention_dropout, stack.hidden_dropout
  rng_B = None
  if train and any(rates) and rng is not None:
    rng_B = dropout.of_rows(rng, len(call.context.tokens.mask_BL), first)

  def drop(x_BLD, place):
    keys = dropout.keys(rng_B, _OUTSIDE + stack.first_number, place)
    return dropout.drop(x_BLD, stack.dropout, keys)

  return call._replace(rng_B=rng_B), drop


def _with_bias(module, stack, call):
  """The call with the position bias that layers share, if there is any."""
  for _, parts in stack.kinds:
    if parts.attention.position_bias == "shared":
      name = f"{stack.names[1]}_position_bias"
      bias = attention.positions.bias(
        module, name, parts.attention, call.context
      )
      return call._replace(context=call.context._replace(bias=bias))
  return call


def _check_feature(kind, feature, known, values):
  """Raises ConfigError for values of a feature that a router does not know."""
  if isinstance(known, tuple | list):
    if not isinstance(values, tuple):
      values = 0, (values or math.inf) - 1
    if outside := [x for x in known if not values[0] <= x <= values[1]]:
      raise ConfigError(
        f'the router of layers "{kind}" has the boundary {outside[0]} of the feature'
        f' "{feature}", whose values go from {values[0]} to {values[1]}; change it'
      )
    return
  number = math.inf if isinstance(values, tuple) else values or math.inf
  if known is not None and number > known:
    several = "any number of them" if number == math.inf else number
    raise ConfigError(
      f'the router of layers "{kind}" knows {known} values of the feature'
      f' "{feature}", and this model has {several}; raise the router\'s'
      " vocab_size or num_values, or set its boundaries"
    )
