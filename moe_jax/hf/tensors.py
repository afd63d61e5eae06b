"""Tensors of a family's files, and the parameters of a model that they hold."""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from moe_jax.core.errors import ConfigError


class Form(NamedTuple):
  """The layout in which a tensor holds a parameter, or several joined ones.

  of_one: shape of a parameter -> shape of its part of the tensor.
  turned: the axes of the part are in the other order. Several axes of the
    parameter may be one axis of the part.
  axis: of the tensor, along which several parameters are joined.
  in_turn: the parameters are interleaved along it, and not one after another.
  stacked: a tensor of several experts has an axis for them; otherwise the rows
    of an expert follow those of the expert before.
  """

  of_one: Callable[[tuple[int, ...]], tuple[int, ...]]
  turned: bool = False
  axis: int = 0
  in_turn: bool = False
  stacked: bool = False

  def shape(self, shapes) -> tuple[int, ...]:
    """Returns the tensor's shape, from the shapes of the parameters."""
    parts = [self.of_one(shape) for shape in shapes]
    joined = [*parts[0]]
    joined[self.axis] = sum(part[self.axis] for part in parts)
    return tuple(joined)

  def views(self, x: np.ndarray, shapes) -> list[np.ndarray]:
    """Returns the parameters that a tensor holds, as views of it.

    Args:
      x: the tensor.
      shapes: of the parameters.
    """
    ends = np.cumsum([self.of_one(shape)[self.axis] for shape in shapes])
    parts = np.split(x, ends[:-1], self.axis)
    if self.in_turn:
      parts = [x[..., i :: len(shapes)] for i in range(len(shapes))]
    parts = [part.T if self.turned else part for part in parts]
    return [part.reshape(shape) for part, shape in zip(parts, shapes)]


SAME = Form(lambda shape: shape)
# All axes of a parameter are one axis there.
FLAT = Form(lambda shape: (math.prod(shape),))
# [inputs, ...] here, [all others, inputs] there.
LINEAR = Form(lambda shape: (math.prod(shape[1:]), shape[0]), turned=True)
# [..., outputs] here, [outputs, all others] there.
OUTPUT = Form(lambda shape: (shape[-1], math.prod(shape[:-1])), turned=True)
# All experts in a tensor; two parameters side by side along its last axis, or
# in turn.
STACKED = SAME._replace(stacked=True)
HALVES = STACKED._replace(axis=-1)
INTERLEAVED = HALVES._replace(in_turn=True)


class Map(NamedTuple):
  """A tensor, and the parameters that are in it.

  It is used where a layer has all these parameters, and no earlier map of the
  table has used them.

  leaves: paths of parameters in a layer, such as "moe/experts/gate".
  tensor: its name in a layer, with "{e}" where each expert has its own.
  form: how it holds them; for experts, how it holds those of one expert.
  given: further parameters that the layer must have.
  """

  leaves: tuple[str, ...]
  tensor: str
  form: Form = LINEAR
  given: tuple[str, ...] = ()


def maps(
  names: str, ours: str = "{}", theirs: str = "{}", form: Form = LINEAR
) -> list[Map]:
  """Returns one `Map` for each tensor in a list of names.

  Args:
    names: pairs of a parameter and the tensor that holds it, "query q, key k";
      or "query+key qk" where one tensor holds several parameters.
    ours, theirs: the paths of the parameters and the names of the tensors, with
      "{}" where the names from the pairs are put in.
    form: how each of the tensors holds its parameters.
  """
  mappings = []
  for left, right in map(str.split, names.split(",")):
    leaves = tuple(ours.replace("{}", leaf) for leaf in left.split("+"))
    mappings.append(Map(leaves, theirs.replace("{}", right), form))
  return mappings


# The three matrices of a gated network.
gated = functools.partial(maps, "gate gate_proj, up up_proj, down down_proj")

_ATTENTION = "attention/{}", "self_attn.{}_proj.weight"
_BIAS = "attention/{}_bias", "self_attn.{}_proj.bias"
_QK_NORM = "attention/{}_norm/scale", "self_attn.{}_norm.weight"
_NORMS = "attention_norm input_layernorm, ffn_norm post_attention_layernorm"
_EMBEDDING = "embedding embed_tokens, final_norm/scale norm"
# Most families' names for the parameters of a layer, and for those outside of
# layers. The table of a family takes precedence.
LAYER = (
  *maps(_NORMS, "{}/scale", "{}.weight", SAME),
  *maps("query q, key k, value v", *_ATTENTION),
  *maps("out o", *_ATTENTION, OUTPUT),
  *maps("query q, key k, value v, out o", *_BIAS, FLAT),
  *maps("query q, key k", *_QK_NORM, SAME),
  *gated("mlp/{}", "mlp.{}.weight"),
  *maps("moe/router/kernel mlp.gate.weight"),
  *gated("moe/experts/{}", "mlp.experts.{e}.{}.weight"),
)
OUTER = (
  *maps(_EMBEDDING, "{}", "model.{}.weight", SAME),
  *maps("head lm_head.weight"),
)


class Tensor(NamedTuple):
  """A tensor in the files, and the parameters that are in it.

  name, form: its name, and how it holds parameters.
  leaves: {path: parameter, or its shape}.
  places: the indices of their leading axes that are in it: (), (repeat,) or
    (repeat, expert). Its blocks of rows belong to them, one after another.
  """

  name: str
  form: Form
  leaves: Mapping[str, Any]
  places: list[tuple[int, ...]]

  @property
  def shapes(self) -> list[tuple[int, ...]]:
    """The shapes of the parts of the parameters that are at a place."""
    return [x.shape[len(self.places[0]) :] for x in self.leaves.values()]

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the whole tensor."""
    count, (rows, *rest) = len(self.places), self.form.shape(self.shapes)
    return (count, rows, *rest) if self.form.stacked else (count * rows, *rest)

  @property
  def dtype(self) -> np.dtype:
    """The dtype of the parameters."""
    return next(iter(self.leaves.values())).dtype

  def parts(self, rows: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Returns {path: part of the parameter} of blocks of rows, as views."""
    blocks = rows.reshape(-1, *self.form.shape(self.shapes))
    return [
      dict(zip(self.leaves, self.form.views(block, self.shapes)))
      for block in blocks
    ]

  def value(self) -> np.ndarray:
    """Returns the tensor, from the parameters."""
    whole = np.empty(self.shape, self.dtype)
    for place, parts in zip(self.places, self.parts(whole)):
      for leaf, part in parts.items():
        assert np.shares_memory(part, whole), "a form must give views"
        part[...] = self.leaves[leaf][place]
    return whole


def layout(family, stacks, variables: Mapping) -> dict[str, Tensor]:
  """Returns the tensors of a family that hold a model's parameters, by name.

  Args:
    family: of the tensors, see `families.Family`.
    stacks: `arch.stacks` of the model.
    variables: of the model, or their shapes.

  Raises:
    ConfigError: a parameter has no place in the files.
  """
  leaves = traverse_util.flatten_dict(dict(variables), sep="/")
  outer = (*family.outer, *OUTER)
  named = _placed(leaves, "", {(): 0}, family.prefix, outer)
  for stack in stacks:
    name, maps = stack.names[1], (*family.tensors, *LAYER)
    prefix = family.prefix + family.layer.replace("{stack}", name)
    for segment, pattern, repeats, first in stack.segments:
      first -= stack.first_number
      for i in range(len(pattern)):
        layers = {(r,): first + i + r * len(pattern) for r in range(repeats)}
        named |= _placed(leaves, f"{segment}/{i}/", layers, prefix, maps)
  rest = leaves.keys() - {leaf for x in named.values() for leaf in x.leaves}
  if rest:
    raise ConfigError(f"the files have no place for {sorted(rest)}")
  return named


def _placed(leaves, path, layers, prefix, maps):
  """The tensors of equal layers.

  Args:
    leaves: {path: parameter} of the model.
    path: of these layers.
    layers: {place in the parameters: index of the layer}.
    prefix: the beginning of the names of tensors.
    maps: of the tensors.
  """
  here, named = {}, {}
  for full in leaves:
    collection, _, leaf = full.partition(f"/{path}")
    if collection == "balance":  # The balancer may have any label.
      leaf = f"balance/moe/{leaf.rpartition('/')[2]}"
    here[leaf] = full
  for m in maps:
    if not {*m.leaves, *m.given} <= here.keys():
      continue
    own = {full: leaves[full] for full in map(here.pop, m.leaves)}
    experts = [None]
    if "/experts/" in m.leaves[0]:
      experts = range(next(iter(own.values())).shape[1])
    for (place, i), e in itertools.product(layers.items(), experts):
      name = (prefix + m.tensor).format(i=i, e=e)
      place = place if e is None else (*place, e)
      named.setdefault(name, Tensor(name, m.form, own, [])).places.append(place)
  return named
