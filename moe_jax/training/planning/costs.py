"""Costs of a step on each device, in closed form: FLOPs, memory, collectives.

They follow from the shapes of the parameters, their roles, and the config. A
product of N rows with a matrix costs 2 N FLOPs a weight, and its backward pass
twice as much; `model.remat` runs the forward pass of a block once more. Loads
of experts are taken as equal. The file is long: all costs are read off `Step`
and `Matrix`.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.core import parallel, registry, roles
from moe_jax.core.errors import ConfigError
from moe_jax.models import decoder
from moe_jax.moe import exchange
from moe_jax.moe.types import TokenChoice
from moe_jax.training import train_step

FLOAT = 4  # Bytes of a parameter, a moment and a score.
_OF_A_SCORE = 3 * FLOAT  # Bytes that an unfused softmax moves for a score.
_OF_THE_OPTIMIZER = 7  # Arrays that AdamW moves; others are taken alike.
OUTSIDE = ("embedding", "head")  # Parts outside of the blocks.


class Step(NamedTuple):
  """The sizes of a step that its costs depend on, besides the model.

  tokens: of a device in a micro-batch; micro_batches: of a step.
  sequence: tokens of a sequence; length: keys that a token sees.
  forward: how often a block's forward pass runs, 1 or 2.
  backward: whether there is a backward pass.
  exchanges: how often rows go to their experts and back, gradients included.
  once: whether gradients of experts are summed once a step.
  width: bytes of an activation.
  mesh: that it runs on; only its shape is read.
  """

  tokens: int
  micro_batches: int
  sequence: int
  length: int
  forward: int
  backward: bool
  exchanges: int
  once: bool
  width: int
  mesh: Any

  def over(self, axes) -> int:
    """Returns the number of devices along some axes."""
    return math.prod(self.mesh.shape[axis] for axis in axes)


class Sent(NamedTuple):
  """A collective of a stage, all of its uses in a step together.

  what: its purpose, in words; kind: an entry of `hlo.KINDS`.
  arrays: bytes of the whole arrays that are gathered, scattered or summed. For
    an all-to-all: bytes of its results, as they are allocated.
  wire: bytes that a device receives, with equal loads.
  """

  what: str
  kind: str
  axes: tuple[str, ...]
  arrays: float
  wire: float


class Stage(NamedTuple):
  """A part of a step on one device; numbers are of the whole step.

  flops: FLOPs that the mathematics asks for; again: FLOPs that remat adds;
  memory: bytes read and written, without the scores of attention; spilled: bytes
  of those scores, which a fused kernel does not write; sent: its collectives.
  """

  name: str
  flops: float = 0
  again: float = 0
  memory: float = 0
  spilled: float = 0
  sent: tuple[Sent, ...] = ()


class Matrix(NamedTuple):
  """A parameter that is a matrix, or one for each layer and expert.

  part: of the model, see `roles`.
  numbers: that a device uses, once they are gathered.
  active: the numbers that multiply a token, with equal loads.
  sides: input and output width of all layers together, for rows of one token.
  stored: mesh axes that it is gathered over.
  sublayer: path of the MoE layer, for a matrix of routed experts; else "".
  lanes: the length of the last dimension, as a device stores it.
  last: whether it gives the output of its network.
  """

  part: str
  numbers: float
  active: float
  sides: float
  stored: tuple[str, ...]
  sublayer: str
  lanes: int
  last: bool


def check(config) -> None:
  """Raises ConfigError for a model whose costs have no closed form here."""
  name, plugins = config.model.name, config.plugins
  made = registry.find("models", name, plugins, "model.name").build
  if made is not decoder.build:
    raise ConfigError(
      f"a plan is of decoders, and model.name = {name} is none; change it"
    )


def of_train_step(config, task, mesh) -> Step:
  """Returns the sizes of the training step of a config.

  Args:
    config, task: see `configs/base.py` and `tasks.Task`.
    mesh: that it runs on.
  """
  remat, micro_batches = config.model.remat, config.train.accumulation
  sequences = config.data.batch_size // micro_batches
  tokens = sequences * sum(task.lengths.values())
  return Step(
    tokens=tokens // parallel.token_shards(mesh),
    micro_batches=micro_batches,
    sequence=task.lengths["inputs"],
    length=task.lengths["inputs"],
    forward=1 if remat == "none" else 2,
    backward=True,
    exchanges=3 if remat == "block" else 2,
    once=train_step.once(config, mesh) is not None,
    width=jnp.dtype(config.model.dtype).itemsize,
    mesh=mesh,
  )


def of_decoding(config, mesh) -> Step:
  """Returns the sizes of a step that makes one token for each sequence.

  Args:
    config, mesh: as in `of_train_step`.
  """
  return Step(
    tokens=config.eval.batch_size // parallel.token_shards(mesh),
    micro_batches=1,
    sequence=1,
    length=config.data.seq_len,
    forward=1,
    backward=False,
    exchanges=1,
    once=False,
    width=jnp.dtype(config.model.dtype).itemsize,
    mesh=mesh,
  )


def matrices(model, boxed, mesh) -> list[Matrix]:
  """Returns the matrices of a model.

  Args:
    model, mesh: a decoder, and the mesh that it lies on.
    boxed: shapes of its parameters, boxed with their roles.
  """
  leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(boxed))
  found = []
  for (path, leaf), role in zip(leaves, jax.tree.leaves(roles.of(boxed))):
    if role.matrix_axes:
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      found.append(_matrix(model, name, role, leaf.shape, mesh))
  return found


def _matrix(model, path, role, shape, mesh):
  """The Matrix of the parameter at a path."""
  spec = parallel.spec(role.axes, shape, mesh)
  stored, sizes, lanes = (), list(shape), shape[-1]
  for i, (name, axes) in enumerate(zip(role.axes, spec)):
    axes = parallel.names(axes)
    lanes = shape[i] // math.prod(mesh.shape[axis] for axis in axes)
    if parallel.RULES.get(name) == parallel.STORED:
      stored += axes
    else:
      sizes[i] //= math.prod(mesh.shape[axis] for axis in axes)
  numbers, taken, sublayer = math.prod(sizes), 1.0, ""
  layers = math.prod(
    size for size, name in zip(sizes, role.axes) if name == "layers"
  )
  if role.part == "experts":
    sublayer = next(k for k in model.sublayers if path.startswith(f"{k}/"))
    recipe = model.sublayers[sublayer].recipe
    taken = recipe.experts_per_token
    active = numbers * taken * mesh.shape["expert"] / recipe.num_experts
  else:
    active = numbers
  sides = (math.prod(sizes[i] for i in side) for side in role.matrix_axes)
  used = tuple(axis for axis in stored if mesh.shape[axis] > 1)
  sides = layers * taken * sum(sides)
  last = role.axes[role.matrix_axes[1][-1]] == "embed"
  return Matrix(role.part, numbers, active, sides, used, sublayer, lanes, last)


def stages(step: Step, model, found: list[Matrix]) -> list[Stage]:
  """Returns the stages of a step, in the order of the parts of the model.

  Args:
    step, model, found: its sizes, a decoder, and the decoder's matrices.
  """
  parts = dict.fromkeys(m.part for m in found)
  by_part = {part: _products(step, model, part, found) for part in parts}
  pairs = zip(by_part["attention"][1:], _mixing(step, model)[1:])
  by_part["attention"] = Stage("attention", *(a + b for a, b in pairs))
  exchanges = tuple(_exchanges(step, model))
  rest = [Stage("exchange", sent=exchanges)] if exchanges else []
  if step.mesh.shape["tensor"] > 1:
    rest.append(Stage("sums over tensor", sent=(_over_tensor(step, model),)))
  if step.backward:
    size = _OF_THE_OPTIMIZER * FLOAT * held(step.mesh, found)
    rest.append(Stage("optimizer", memory=size))
  return [*by_part.values(), *rest]


def _products(step, model, part, found):
  """The stage of all matrices of a part."""
  own = [m for m in found if m.part == part]
  repeats = 1 if part in OUTSIDE else step.forward
  once = 2 * step.tokens * step.micro_batches * sum(m.active for m in own)
  if part == "embedding" and not model.arch.tie_embeddings:
    once = 0  # Rows are looked up.
  backward = 2 * step.backward
  touched = sum(m.numbers + step.tokens * m.sides for m in own)
  touched *= step.micro_batches * step.width * (repeats + backward)
  sent = [s for m in own for s in _weights_sent(step, m, repeats)]
  kept = 0.0
  if part == "experts" and step.exchanges < 3:  # Their results are kept.
    kept = 2 * step.tokens * step.micro_batches
    kept *= sum(m.active for m in own if m.last)
  return Stage(
    part,
    flops=once * (1 + backward),
    again=(once - kept) * (repeats - 1),
    memory=touched,
    sent=_merged(sent),
  )


def _weights_sent(step, matrix, repeats):
  """The gathers of a matrix, and the sums of its gradient."""
  part, stored = matrix.part, matrix.stored
  size = matrix.numbers * step.micro_batches
  weights = repeats * size * (FLOAT if part == "router" else step.width)
  if part in OUTSIDE:  # They are gathered before the loop over micro-batches.
    weights /= step.micro_batches
  # The gradient of a lookup is a sum of rows in float32.
  wide = part in ("router", "embedding")
  gradient = size * (FLOAT if wide else step.width)
  if part == "experts" and step.once:
    gradient = matrix.numbers * FLOAT
  if stored:
    yield _gathered(step, f"weights of {part}", "all-gather", stored, weights)
  if not step.backward:
    return
  # Other devices hold copies of the weight. They sum some gradients as wholes,
  # and then each takes its part.
  whole = part == "router" or part in OUTSIDE
  others = tuple(
    axis
    for axis in parallel.TOKENS
    if step.mesh.shape[axis] > 1
    and (whole or axis not in stored)
    and not (part == "experts" and axis == "expert")
  )
  what = f"gradients of {part}"
  if stored and not whole:
    yield _gathered(step, what, "reduce-scatter", stored, gradient)
    gradient /= step.over(stored)
  if others:
    away = 2 * gradient * (1 - 1 / step.over(others))
    yield Sent(what, "all-reduce", others, gradient, away)


def _gathered(step, what, kind, axes, size):
  return Sent(what, kind, axes, size, size * (1 - 1 / step.over(axes)))


def _merged(sent):
  """The collectives with the same purpose, kind and axes, added up."""
  sums = {}
  for one in sent:
    old = sums.get(one[:3], (0, 0))
    sums[one[:3]] = old[0] + one.arrays, old[1] + one.wire
  return tuple(Sent(*key, *size) for key, size in sums.items())


def _mixing(step, model):
  """Scores and their sums of values, of all layers."""
  layers = [model.arch.layer(kind) for kind in model.arch.layers]
  tensor = step.mesh.shape["tensor"]
  pairs = step.tokens * step.micro_batches * step.length / tensor
  once = pairs * sum(layer.attention.flops_per_pair for layer in layers)
  scores = pairs * sum(layer.attention.num_heads for layer in layers)
  backward = 2 * step.backward
  cache = 0.0
  if not step.backward:  # Keys and values of all places are read.
    cached = sum(layer.attention.cached_per_token for layer in layers)
    cache = step.tokens * step.length * cached * step.width / tensor
  return Stage(
    "attention",
    flops=once * (1 + backward),
    again=once * (step.forward - 1),
    memory=cache,
    spilled=scores * _OF_A_SCORE * (step.forward + backward),
  )


def held(mesh, found: list[Matrix]) -> float:
  """Returns how many numbers of the matrices a device of a mesh stores.

  Args:
    mesh, found: see `stages`.
  """
  return sum(
    m.numbers / math.prod(mesh.shape[axis] for axis in m.stored) for m in found
  )


def buffers(step: Step, model):
  """Yields (Sublayer, rows of a device's tokens, rows with room) of its layers.

  Args:
    step, model: see `stages`; rows are of a layer and micro-batch, as
      allocated.
  """
  devices = step.mesh.shape["expert"]
  for sublayer in model.sublayers.values():
    tokens, recipe = sublayer.grouping.resolve(
      sublayer.recipe, step.sequence, step.backward
    )
    if recipe.router.form is not TokenChoice:  # Its slots are always filled.
      rows = round(step.tokens * recipe.experts_per_token)
      yield sublayer, rows, rows
      continue
    count = max(1, step.tokens // tokens)
    home, room = (
      exchange.buffer_rows(recipe, tokens, count * (devices // n), n)
      for n in (1, devices)
    )
    yield sublayer, home // devices, room


def _exchanges(step, model):
  """The exchanges of all layers, there and back."""
  n = step.mesh.shape["expert"]
  for sublayer, home, room in buffers(step, model) if n > 1 else ():
    row = sublayer.recipe.row_width(model.arch.d_model)
    row *= step.width * step.micro_batches
    row *= len(sublayer.numbers)
    if sublayer.recipe.exchange == "all_gather":
      size = n * step.tokens * row
      # A sum over devices need not be computed again.
      times = {
        "all-gather": step.exchanges,
        "reduce-scatter": 1 + step.backward,
      }
      for kind, number in times.items():
        yield _gathered(step, "tokens", kind, ("expert",), number * size)
      continue
    row *= step.exchanges
    ragged = sublayer.recipe.dispatcher.ragged
    kind = "ragged-all-to-all" if ragged else "all-to-all"
    # Only ragged rows with a token are sent, but also slots that stay empty.
    real = min(home, step.tokens * sublayer.recipe.experts_per_token)
    wire = 2 * (real if ragged else home) * row * (1 - 1 / n)
    yield Sent("rows", kind, ("expert",), (home + room) * row, wire)


def _over_tensor(step, model):
  """The sums of attention's and of the networks' results, and of gradients."""
  n = step.mesh.shape["tensor"]
  # The backward pass needs the results of attention again, but not the network's.
  again = step.forward - 1
  times = (2 + again + 2 * step.backward) * len(model.arch.layers)
  if (
    model.arch.vocab_size % n == 0
  ):  # Rows of the embedding's lookup, and of the head.
    times += 1 + step.backward
  size = times * step.tokens * model.arch.d_model
  size *= step.micro_batches * step.width
  away = 2 * size * (n - 1) / n
  return Sent("activations", "all-reduce", ("tensor",), size, away)
