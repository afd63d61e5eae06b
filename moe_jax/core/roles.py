"""Roles of parameters, declared where a parameter is made.

A matrix has two sides, its input and its output; each is one or more axes.
Leading axes of repeated layers and of experts are batch axes: such a parameter
is one matrix for each layer and expert.
"""

import dataclasses
import itertools

import flax.linen as nn
import flax.struct
import jax

# Parts of a model that may have learning-rate and weight-decay factors of their
# own; "rest" stands for all other parts.
FACTORS = ("router", "experts", "shared", "latent", "cheap", "attention", "dense")
FACTORS += ("norm", "embedding", "head", "rest")
_BATCH = ("layers", "expert")
_HEADS = ("heads", "kv_heads")


class Declared(nn.LogicallyPartitioned):
  """A parameter in a box that tells its logical axes and its part of the model.

  part: "router", "experts" (the routed ones), "shared", "latent", "attention",
    "dense", "norm", "embedding", "head" or a name of the model's own.
  """

  part: str = flax.struct.field(default="other", pytree_node=False)

  # A generated __eq__ would compare arrays.
  __eq__ = nn.LogicallyPartitioned.__eq__


@dataclasses.dataclass(frozen=True)
class Role:
  """The part of a parameter and its axes.

  part: see `Declared`.
  axes: the logical name of every axis, or None.
  """

  part: str
  axes: tuple[str | None, ...]

  @property
  def batch_axes(self) -> tuple[int, ...]:
    """The indices of the leading axes over layers and experts."""
    batch = itertools.takewhile(_BATCH.__contains__, self.axes)
    return tuple(range(len([*batch])))

  @property
  def matrix_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(input axes, output axes); None for a vector or a scalar.

    If there are more than two sides, the last one is the output.
    """
    sides = []
    for i in range(len(self.batch_axes), len(self.axes)):
      if i and self.axes[i] is None and self.axes[i - 1] in _HEADS:
        sides[-1] += (i,)  # The width of a head belongs to the heads.
      else:
        sides.append((i,))
    return (sum(sides[:-1], ()), sides[-1]) if len(sides) > 1 else None

  @property
  def is_decayed(self) -> bool:
    """Whether weight decay shrinks this: a matrix, but not the embedding."""
    return self.matrix_axes is not None and self.part != "embedding"

  @property
  def is_hidden(self) -> bool:
    """Whether this is a matrix inside the model, without a vocabulary."""
    return self.matrix_axes is not None and "vocab" not in self.axes

  @property
  def factor(self) -> str:
    """The name in `FACTORS` whose factors apply to the parameter."""
    return self.part if self.part in FACTORS else "rest"


def declared(init, axes: tuple[str | None, ...], part: str):
  """Returns an initializer whose result is `Declared`.

  Args:
    init: (rng, ...) -> array.
    axes: logical axis names, see `parallel.RULES`.
    part: see `Declared`.
  """
  return lambda *args: Declared(init(*args), axes, part=part)


def of(boxed):
  """Returns the tree of `Role` of a tree of parameters.

  Args:
    boxed: parameters as `model.init` returns them. A parameter that is not
      declared has the part "other", and its axes have no names.
  """

  def is_box(x):
    return isinstance(x, nn.Partitioned)

  def role(x):
    names = x.names if is_box(x) else (None,) * x.ndim
    return Role(getattr(x, "part", "other"), tuple(names))

  return jax.tree.map(role, boxed, is_leaf=is_box)
