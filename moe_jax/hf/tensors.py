"""How the tensors of a file hold the parameters of a layer, as tables."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Form(NamedTuple):
  """How one tensor holds one or several parameters.

  shape: (shapes of the parameters) -> shape of the tensor.
  read: (tensor, shapes of the parameters) -> parameters.
  write: (parameters) -> tensor.
  """

  shape: Callable
  read: Callable
  write: Callable


def _split(x, shapes):
  sizes = [math.prod(shape[1:]) for shape in shapes]
  parts = np.split(x, np.cumsum(sizes)[:-1])
  return [part.T.reshape(shape) for part, shape in zip(parts, shapes)]


def _doubled(shapes):
  return (*shapes[0][:-1], 2 * shapes[0][-1])


# The same array.
SAME = Form(lambda shapes: shapes[0], lambda x, _: [x], lambda parts: parts[0])
# One axis there.
FLAT = Form(
  lambda shapes: (math.prod(shapes[0]),),
  lambda x, shapes: [x.reshape(shapes[0])],
  lambda parts: parts[0].ravel(),
)
# [inputs, ...] here, [all others, inputs] there, several one after another.
LINEAR = Form(
  lambda shapes: (sum(math.prod(s[1:]) for s in shapes), shapes[0][0]),
  _split,
  lambda parts: np.concatenate([p.reshape(len(p), -1).T for p in parts]),
)
# [..., outputs] here, [outputs, all others] there.
OUTPUT = Form(
  lambda shapes: (shapes[0][-1], math.prod(shapes[0][:-1])),
  lambda x, shapes: [x.T.reshape(shapes[0])],
  lambda parts: parts[0].reshape(-1, parts[0].shape[-1]).T,
)
# Two along the last axis, in turn.
INTERLEAVED = Form(
  _doubled,
  lambda x, _: [x[..., ::2], x[..., 1::2]],
  lambda parts: np.stack(parts, -1).reshape(*parts[0].shape[:-1], -1),
)
# Two along the last axis, one after another.
HALVES = Form(
  _doubled,
  lambda x, _: np.split(x, 2, -1),
  lambda parts: np.concatenate(parts, -1),
)
# [experts, a, b] here, [experts * a, b] there.
ROWS = Form(
  lambda shapes: (math.prod(shapes[0][:-1]), shapes[0][-1]),
  lambda x, shapes: [x.reshape(-1, *shapes[0][1:])],
  lambda parts: parts[0].reshape(-1, parts[0].shape[-1]),
)
# [experts, b, a] here, [experts * a, b] there.
TURNED_ROWS = Form(
  lambda shapes: (shapes[0][0] * shapes[0][2], shapes[0][1]),
  lambda x, shapes: [x.reshape(-1, *shapes[0][:0:-1]).swapaxes(1, 2)],
  lambda parts: parts[0].swapaxes(1, 2).reshape(-1, parts[0].shape[1]),
)


class Map(NamedTuple):
  """A tensor of a layer, and the parameters that are in it.

  It is used where the layer has all these parameters.

  leaves: paths of parameters in a layer, such as "moe/experts/gate".
  tensor: its name in a layer, with "{e}" where each expert has its own, whose
    parameters are without their axis of experts then.
  form: how it holds them.
  given, unless: a parameter that the layer has to have, or not to have.
  """

  leaves: tuple[str, ...]
  tensor: str
  form: Form = LINEAR
  given: str = ""
  unless: str = ""

  @property
  def stacked(self) -> bool:
    """Whether the tensor's rows are those of one expert after another."""
    return "/experts/" in self.leaves[0] and "{e}" not in self.tensor


def maps(ours: str, theirs: str, names: str, form=LINEAR, **more) -> list[Map]:
  """Several maps.

  Args:
    ours, theirs: paths of parameters and names of tensors, with a "{}".
    names: what takes its place, as in "query q, key k", or "query+key qk" where
      a tensor has several parameters.
    form, **more: see `Map`.
  """
  found = []
  for left, right in map(str.split, names.split(",")):
    leaves = tuple(ours.replace("{}", x) for x in left.split("+"))
    found.append(Map(leaves, theirs.replace("{}", right), form, **more))
  return found


def gated(ours: str, theirs: str) -> list[Map]:
  """The three matrices of a gated network."""
  return maps(ours, theirs, "gate gate_proj, up up_proj, down down_proj")


_QKV = "query q, key k, value v"
_NORMS = "attention_norm input_layernorm, ffn_norm post_attention_layernorm"
NORMS = maps("{}/scale", "{}.weight", _NORMS, SAME)
HEADS = (
  *maps("attention/{}", "self_attn.{}_proj.weight", _QKV),
  *maps("attention/{}_bias", "self_attn.{}_proj.bias", _QKV, FLAT),
  *maps("attention/{}_norm/scale", "self_attn.{}_norm.weight", _QKV, SAME),
)
OUT = (
  *maps("attention/{}", "self_attn.{}_proj.weight", "out o", OUTPUT),
  *maps("attention/{}_bias", "self_attn.{}_proj.bias", "out o", SAME),
)
ATTENTION = (*NORMS, *HEADS, *OUT)
# A dense network, and a router with a network for each expert.
SPARSE = (
  *gated("mlp/{}", "mlp.{}.weight"),
  *maps("{}", "{}", "moe/router/kernel mlp.gate.weight"),
  *gated("moe/experts/{}", "mlp.experts.{e}.{}.weight"),
)
