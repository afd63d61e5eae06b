"""Forms in which the tensors of a file hold the parameters of a layer."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Form(NamedTuple):
  """The layout in which a tensor holds a parameter, or several joined ones.

  write: parameter -> tensor; only reshapes and transposes.
  read: (tensor, shape of the parameter) -> parameter.
  axis: of the tensor, along which several parameters are joined.
  in_turn: they take turns along it, and do not follow one after another.
  """

  write: Callable
  read: Callable
  axis: int = 0
  in_turn: bool = False

  def shape(self, shapes) -> tuple[int, ...]:
    """The tensor's shape, from the shapes of the parameters."""
    written = [self.write(np.broadcast_to(0, s)).shape for s in shapes]
    joined = [*written[0]]
    joined[self.axis] = sum(shape[self.axis] for shape in written)
    return tuple(joined)

  def split(self, x: np.ndarray, shapes, which: int) -> np.ndarray:
    """A parameter that a tensor holds.

    Args:
      x: the tensor.
      shapes: of all its parameters.
      which: the index of the parameter among them.
    """
    ends = np.cumsum([self.shape([s])[self.axis] for s in shapes])
    parts = np.split(x, ends[:-1], self.axis)
    if self.in_turn:
      parts = [x[..., i :: len(shapes)] for i in range(len(shapes))]
    return self.read(parts[which], shapes[which])

  def join(self, parameters) -> np.ndarray:
    """The tensor that holds these parameters."""
    written = [self.write(x) for x in parameters]
    if self.in_turn:
      return np.stack(written, -1).reshape(*written[0].shape[:-1], -1)
    return np.concatenate(written, self.axis)


SAME = Form(lambda x: x, lambda x, shape: x)
# All axes are one there.
FLAT = Form(lambda x: x.reshape(-1), np.reshape)
# [inputs, ...] here, [all others, inputs] there.
LINEAR = Form(
  lambda x: x.reshape(len(x), -1).T, lambda x, shape: x.T.reshape(shape)
)
# [..., outputs] here, [outputs, all others] there.
OUTPUT = Form(lambda x: x.reshape(-1, x.shape[-1]).T, LINEAR.read)
# Two side by side along the last axis, or in turn.
HALVES = SAME._replace(axis=-1)
INTERLEAVED = HALVES._replace(in_turn=True)
# [experts, a, b] here, [experts * a, b] there. A tensor may have fewer experts
# than the parameter, as a device reads its own.
ROWS = Form(
  lambda x: x.reshape(-1, x.shape[-1]),
  lambda x, shape: x.reshape(-1, *shape[1:]),
)
# [experts, b, a] here, [experts * a, b] there.
TURNED_ROWS = Form(
  lambda x: ROWS.write(x.swapaxes(1, 2)),
  lambda x, shape: x.reshape(-1, *shape[:0:-1]).swapaxes(1, 2),
)


class Map(NamedTuple):
  """A tensor, and the parameters that are in it.

  It is used where a layer has all these parameters, and no earlier map of the
  table has used them.

  leaves: paths of parameters in a layer, such as "moe/experts/gate".
  tensor: its name in a layer, with "{e}" where each expert has its own, whose
    parameters are without their axis of experts then.
  form: how it holds them.
  given: a parameter that the layer has to have beside.
  """

  leaves: tuple[str, ...]
  tensor: str
  form: Form = LINEAR
  given: str = ""

  @property
  def stacked(self) -> bool:
    """Whether the tensor's rows are those of one expert after another."""
    return "/experts/" in self.leaves[0] and "{e}" not in self.tensor


def maps(
  names: str, form=LINEAR, ours: str = "{}", theirs: str = "{}", given: str = ""
) -> list[Map]:
  """Several maps.

  Args:
    names: of parameters and tensors, as in "query q, key k", or "query+key qk"
      where a tensor has several parameters.
    form, given: see `Map`.
    ours, theirs: what stands around these names, which take the place of "{}".
  """
  found = []
  for left, right in map(str.split, names.split(",")):
    leaves = tuple(ours.replace("{}", leaf) for leaf in left.split("+"))
    found.append(Map(leaves, theirs.replace("{}", right), form, given))
  return found


def gated(ours: str, theirs: str) -> list[Map]:
  """The three matrices of a gated network."""
  return maps(
    "gate gate_proj, up up_proj, down down_proj", LINEAR, ours, theirs
  )


_ATTENTION = "attention/{}", "self_attn.{}_proj.weight"
_BIAS = "attention/{}_bias", "self_attn.{}_proj.bias"
_QK_NORM = "attention/{}_norm/scale", "self_attn.{}_norm.weight"
_NORMS = "attention_norm input_layernorm, ffn_norm post_attention_layernorm"
NORMS = maps(_NORMS, SAME, "{}/scale", "{}.weight")
OUT = maps("out o", OUTPUT, *_ATTENTION)
ATTENTION = (
  *NORMS,
  *maps("query q, key k, value v", LINEAR, *_ATTENTION),
  *maps("query q, key k, value v", FLAT, *_BIAS),
  *maps("query q, key k", SAME, *_QK_NORM),
  *OUT,
  *maps("out o", SAME, *_BIAS),
)
# A dense network, and a router with a network for each expert.
SPARSE = (
  *gated("mlp/{}", "mlp.{}.weight"),
  *maps("moe/router/kernel mlp.gate.weight"),
  *gated("moe/experts/{}", "mlp.experts.{e}.{}.weight"),
)
# The parameters that are in no layer.
OUTER = (
  *maps("embedding model.embed_tokens.weight", SAME),
  *maps("final_norm/scale model.norm.weight", SAME),
  *maps("head lm_head.weight"),
)
