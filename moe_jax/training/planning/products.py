"""The FLOPs of a step: of a compiled program's products, or in closed form."""

import functools
import math
import re
from typing import NamedTuple

import numpy as np

from moe_jax import models
from moe_jax.core import parallel
from moe_jax.moe import kernels
from moe_jax.training.planning import costs, hlo

_INSTRUCTION = re.compile(
  r"^\s*(?:ROOT )?%?([\w.-]+) = (\w+)\[([\d,]*)\]\S* (.*)"
)
_PRODUCT = re.compile(r"(dot|convolution|custom-call)\(([^)]*)\)(.*)")
_KERNEL = 'custom_call_target="tpu_custom_call"'
# Operands of a kernel, which the rest of its line declares.
_OPERANDS = re.compile(r"operand_layout_constraints=\{(.*?)\}, (?=[a-z_]+=)")
# jax's name of an operation of the experts' networks (see `layer.moe_ffn`) has the
# path of their layer and then _SCOPE; _AROUND may stand between names of modules.
_SCOPE = "/experts/"
_AROUND = re.compile(r"/(?:(?:checkpoint|rematted_computation|shard_map)/)+")
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")


class Product(NamedTuple):
  """A product of matrices in a compiled program.

  flops: of one time.
  times: how often a call of the program runs it.
  rows: of a kernel that multiplies ragged rows; None for other products.
  name: jax's name of the operation.
  """

  flops: int
  times: int
  rows: int | None
  name: str

  @property
  def again(self) -> bool:
    """Whether the backward pass computes it again (`model.remat`)."""
    return "rematted_computation" in self.name


def products(text: str) -> list[Product]:
  """Returns all products of matrices in a program.

  Args:
    text: `jax.jit(f).lower(...).compile().as_text()`, for a TPU.
  """
  found = []
  bodies, times = hlo.computations(text)
  for name, lines in bodies.items():
    shapes = {}
    for line in lines:
      match = _INSTRUCTION.match(line)
      if not match:
        continue
      instruction, _, shape, rest = match.groups()
      shapes[instruction] = _numbers(shape)
      call = _PRODUCT.match(rest)
      if call and times[name]:
        one = _product(shapes[instruction], *call.groups(), shapes)
        if one is not None:
          label = re.search(r'op_name="([^"]*)"', rest)
          found.append(Product(*one[:1], times[name], one[1], _or(label)))
  return found


def _or(match):
  return match[1] if match else ""


def _product(out, kind, operands, rest, shapes):
  """(FLOPs, rows of a kernel or None); None for other instructions."""
  if kind == "custom-call":
    return _of_kernel(out, rest) if _KERNEL in rest else None
  x, w = (shapes[name] for name in re.findall(r"%([\w.-]+)", operands))
  if kind == "dot":
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
    sizes = (x[i] for i in _numbers(contracted[1]))
    return 2 * math.prod(out) * math.prod(sizes), None
  return _of_convolution(out, x, w, rest), None


def _of_kernel(out, rest):
  """Rows [N, K] times matrices [E, K, F], or [E, K, F] of rows and rows.

  In both, two arrays have N rows, and the third has E matrices.
  """
  declared = _OPERANDS.search(rest)
  arrays = [out, *map(_numbers, _SHAPE.findall(declared[1]))]
  matrices = [a for a in arrays if len(a) == 3]
  of_rows = [a for a in arrays if len(a) == 2 and a[0] > 1 and a[1] > 1]
  if len(matrices) != 1 or len(of_rows) != 2:
    return None  # This kernel is no product of rows.
  one = math.prod(matrices[0][1:])
  rows = math.isqrt(math.prod(map(math.prod, of_rows)) // one)
  return 2 * rows * one, rows


def _of_convolution(out, x, w, rest):
  """FLOPs of a product that the compiler has written as a convolution.

  Letters of a dimension: b and f of x and of the result, i and o of the
  weights, and digits for the dimensions of the window.
  """
  of_x, of_w, of_out = re.search(
    r"dim_labels=(\w+)_(\w+)->(\w+)", rest
  ).groups()
  flops = 2 * out[of_out.index("b")] * out[of_out.index("f")]
  flops *= w[of_w.index("i")]
  window = re.search(r"window=\{([^}]*)\}", rest)
  fields = dict(re.findall(r"(\w+)=([\d_x-]+)", _or(window)))
  digits = sorted(filter(str.isdigit, of_x), key=int)
  for place, digit in enumerate(digits):
    own = {k: v.split("x")[place] for k, v in fields.items()}
    pad = tuple(map(int, own.get("pad", "0_0").split("_")))
    flops *= _taps(
      x[of_x.index(digit)],
      out[of_out.index(digit)],
      int(own.get("size", 1)),
      pad[0],
      *(int(own.get(k, 1)) for k in ("stride", "lhs_dilate", "rhs_dilate")),
    )
  return flops


@functools.cache
def _taps(size, out, window, before, stride, spread, apart):
  """Counts pairs of a result and a place in the window that meet an input."""
  place = stride * np.arange(out)[:, None] + apart * np.arange(window) - before
  return int(
    ((place % spread == 0) & (place >= 0) & (place // spread < size)).sum()
  )


def _numbers(text):
  return [int(x) for x in text.split(",")] if text else []


class Rows(NamedTuple):
  """Rows of the experts of one kind of layer, on a device in a micro-batch.

  flops: of these layers in a step, if loads are equal, without recomputation.
  used: rows that they compute for.
  room: rows of their buffer.
  tiles: rows that kernels compute, because of the size of their tiles, over those
    of the experts, if loads are equal; None: unknown, as on a GPU.
  """

  flops: float
  used: float
  room: int
  tiles: float | None


def count(found, step, model, matrices, stages, wanted) -> dict[str, float]:
  """Counts FLOPs in a compiled program, or else in closed form.

  Args:
    found: `products` of the program; None: they are not known.
    step, model, matrices, stages: see `costs.stages`.
    wanted: by `counts.flops_per_token`.

  Returns:
    model: `wanted`.
    useful: those of the program, without recomputation, empty rows of buffers,
      and rows that are computed in vain.
    recomputed: FLOPs that `model.remat` adds to the useful ones.
    padded: useful, with the rows that tiles of kernels hold in vain, when loads
      are equal; None: unknown.
    static: useful, with all rows of the buffers.
    compiled: whether useful, recomputed and static are counted in the program.
  """
  experts = rows(step, model, matrices)
  if found is None:
    useful = sum(stage.flops for stage in stages)
    again = sum(stage.again for stage in stages)
    empty = (each.room / each.used - 1 for each in experts.values())
    static = useful + _weighed(experts, empty)
  else:
    useful, again, static = _of_program(found, experts)
  in_vain = [each.tiles and each.tiles - 1 for each in experts.values()]
  return {
    "model": wanted,
    "useful": useful,
    "recomputed": again,
    "padded": None if None in in_vain else useful + _weighed(experts, in_vain),
    "static": static,
    "compiled": found is not None,
  }


def _weighed(experts, ratios):
  """The FLOPs of experts times a ratio for each kind of layer."""
  return sum(e.flops * ratio for e, ratio in zip(experts.values(), ratios))


def rows(step: costs.Step, model, matrices) -> dict[str, Rows]:
  """Returns the rows of experts, by the path of their layer.

  Args:
    step, model, matrices: see `costs.stages`.
  """
  found = {}
  for path, (sublayer, home, room) in zip(
    models.sublayers(model), costs.buffers(step, model)
  ):
    used = min(home, step.tokens * sublayer.recipe.experts_per_token)
    own = sum(m.active for m in matrices if m.sublayer == path)
    flops = 2 * step.tokens * step.micro_batches * own * (1 + 2 * step.backward)
    tiles = _in_tiles(step, model, sublayer.recipe, used, room)
    found[path] = Rows(flops, used, room, tiles)
  return found


def _of_program(found, experts):
  """(useful, recomputed, static) FLOPs of the products in a program."""
  useful = again = static = 0.0
  for one in found:
    size = one.flops * one.times
    own = _layer_of(one, experts)
    real = size * own.used / (one.rows or own.room) if own else size
    if one.again:
      again += real
    else:
      useful, static = useful + real, static + size
  return useful, again, static


def _layer_of(product, experts):
  """The Rows of the experts that a product belongs to; None: of no experts."""
  name = _AROUND.sub("/", product.name)
  return next((e for path, e in experts.items() if path + _SCOPE in name), None)


def _in_tiles(step, model, recipe, used, room) -> float | None:
  """Rows that kernels compute over rows of the experts, for equal loads."""
  platform = parallel.platform(step.mesh)
  if not recipe.dispatcher.ragged:
    return 1.0
  if platform == "gpu":  # A run chooses its kernels on the device.
    return None
  here = recipe.num_experts // step.mesh.shape["expert"]
  each = math.ceil(used / here)
  width = recipe.experts.width // step.mesh.shape["tensor"]
  work = kernels.estimate(
    [each] * here,
    room,
    (recipe.row_width(model.arch.d_model), width),
    model.arch.dtype,
    backend=kernels.backend_for(platform),
  )
  return sum(w.rows for w in work.values()) / (len(work) * each * here)
