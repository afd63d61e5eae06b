"""Meshes, remat and micro-batches for some devices, ranked in closed form."""

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from moe_jax.core import parallel
from moe_jax.core.errors import ConfigError
from moe_jax.models.parts import stack
from moe_jax.moe import exchange
from moe_jax.training import program
from moe_jax.training.planning import chips, costs, plan, topologies

# Numbers of arrays of a kind at the same time, seen in compiled programs.
_ARRAYS = {"scores": 2.0, "hidden": 6.0, "rows": 2.0, "logits": 2.0}
_ARRAYS |= {
  "vectors": 3.0,
  "weights": 2.0,
  "tokens": 2.0,
  "floats": 7.0,
  "masks": 0.5,
}
# The memory that arrays kept for the backward pass take, over their sizes.
_PACKING = 1.1
# The last dimension of an array on a TPU is stored in multiples of this.
_LANES = 128
# The share of memory that a candidate may take, for the error of the estimate.
_ROOM = 0.95
# More shards of F and of heads make narrow products, and sum too often.
_MOST_TENSOR = 8
_MOST_MICRO_BATCHES = 8


# The keys of a config that a search sets.
_KEYS = ("mesh", "model.moe.exchange", "train.accumulation")
_KEYS += ("train.reduce_experts_once", "model.remat")


class Candidate(NamedTuple):
  """A way to run a config, and its costs in closed form.

  settings: {key of the config: value}.
  memory: bytes on a device.
  low, high: seconds of a step, if all overlaps and if nothing does.
  """

  settings: dict[str, object]
  memory: float
  low: float
  high: float

  @property
  def flags(self) -> str:
    """The settings as flags of the command."""
    mesh = zip(parallel.AXES, self.settings["mesh"])
    mesh = ",".join(f"{axis}:{n}" for axis, n in mesh if n > 1)
    rest = ((k, v) for k, v in self.settings.items() if k != "mesh")
    return " ".join([f"--mesh={mesh}", *(f"--config.{k}={v}" for k, v in rest)])

  def fits(self, chip: chips.Chip) -> bool:
    """Whether it probably fits into the chip's memory."""
    return self.memory <= _ROOM * chip.memory


def ranked(config, chip: chips.Chip, devices, ring: int) -> list[Candidate]:
  """Returns all candidates: first those that fit, by time; others, by size.

  Args:
    config: whose mesh, exchange, remat and micro-batches are replaced.
    chip: of the devices.
    devices: of a topology.
    ring: see `plan.bounds`.
  """
  costs.check(config)
  task = program.build_task(config, prepare=False)
  model = program.build_model(config, task)
  boxed = plan.parameters(task, model)
  per_parameter = plan.state_bytes_per_parameter(config, task, model)
  found = []
  sparse = bool(model.sublayers)
  for settings, one, mesh, model in _possible(config, task, devices, sparse):
    matrices = costs.matrices(model, boxed, mesh)
    state = per_parameter * costs.held(mesh, matrices)
    for remat in stack.REMAT:
      one.model.remat = remat
      step = costs.of_train_step(one, task, mesh)
      bounds = [
        plan.bounds(stage, step, chip, ring)
        for stage in costs.stages(step, model, matrices)
      ]
      seconds = plan.seconds(bounds)
      memory = state + temporaries(step, model, matrices, remat)
      settings = settings | {_KEYS[-1]: remat}
      found.append(Candidate(settings, memory, *seconds))
  return sorted(
    found, key=lambda c: (0, c.high) if c.fits(chip) else (1, c.memory)
  )


def compiled(one: Candidate, config, chip, devices, topology: str) -> plan.Plan:
  """Returns the plan of a candidate.

  Args:
    one: the candidate.
    config, chip, devices: as in `ranked`.
    topology: its name.
  """
  settled = with_settings(config, one.settings)
  return plan.of_train_step(settled, chip, devices, topology)


def remedy(made: plan.Plan, config, devices) -> str:
  """Returns a sentence: by how much a step does not fit, and what would fit.

  Args:
    made: its plan.
    config, devices: the arguments that the plan was made of.
  """
  needed, count = sum(made.memory.values()), len(devices)
  text = (
    f"the {made.program} needs {needed / 1e9:.1f} GB on each of {count} devices of"
    f" {made.topology}, {(needed - made.limit) / 1e9:.1f} GB more than the"
    f" {made.limit / 1e9:.1f} GB that there are; "
  )
  training = made.step.backward
  # The compiler has refused these settings, so they are no remedy.
  own = {key: _value(made, key) for key in _KEYS}
  ring = topologies.ring(made.topology)
  for one in ranked(config, made.chip, devices, ring) if training else ():
    if one.fits(made.chip) and one.settings != own:
      return f"{text}by the closed form this would fit: {one.flags}"
  parts = {k: x for k, x in made.even.items() if training or k == "parameters"}
  if training:
    parts["gradients"] = parts["parameters"]
  state = sum(parts.values()) * count
  least = -(-state // (_ROOM * made.limit))
  if least <= count and not training:
    return f"{text}lower eval.batch_size or data.seq_len, or take more devices"
  if least <= count:
    return (
      f"{text}by the closed form no mesh, remat or number of micro-batches would;"
      " lower data.batch_size or data.seq_len, or take more devices"
    )
  which = "no mesh, remat or number of micro-batches" if training else "no mesh"
  *most, last = parts
  words = f"{', '.join(most)} and {last}" if most else last
  return (
    f"{text}{which} would: {words} alone are"
    f" {state / 1e9:,.0f} GB, those of {least:.0f} such devices; take more of them"
  )


def _value(made, key):
  """The value of a key of a plan's config, a mesh without -1."""
  if key == "mesh":
    return tuple(made.mesh.values())
  return functools.reduce(getattr, key.split("."), made.config)


def temporaries(
  step: costs.Step, model, found: list[costs.Matrix], remat: str
) -> float:
  """Estimates the bytes that a training step needs besides its arguments.

  They are gradients in float32 and weights in the compute dtype, as a device
  stores them; the arrays that the forward pass keeps for the backward pass; and
  those that the backward pass of one block, or the output layer, needs
  meanwhile. `_ARRAYS` counts arrays that are there at the same time, in
  compiled programs.

  Args:
    step: its sizes.
    model: a decoder.
    found: its matrices.
    remat: `model.remat`.
  """
  arch, tensor = model.arch, step.mesh.shape["tensor"]
  gradients = costs.FLOAT * (1 if step.micro_batches == 1 else 2)
  stored = costs.held(step.mesh, found) * (gradients + step.width)
  stored += _rearranged(step, found)
  if step.once:
    stored += costs.FLOAT * sum(m.numbers for m in found if m.part == "experts")
  kinds = [arch.layer(kind) for kind in arch.layers]
  vectors = step.tokens * arch.d_model * step.width
  heads = max(layer.attention.num_heads for layer in kinds)
  scores = step.tokens * step.length * heads / tensor * costs.FLOAT
  outside = (*costs.OUTSIDE, "experts")
  sides = sum(m.sides for m in found if m.part not in outside)
  of_a_block = step.tokens * sides / len(kinds) * step.width
  experts = [
    _of_experts(step, model, *each) for each in costs.buffers(step, model)
  ]
  largest = max((each.inside for each in experts), default=0.0)
  # While the experts' gradients are computed, scores wait in two precisions.
  waiting = (1 + step.width / costs.FLOAT) * scores
  kept = len(kinds) * vectors
  if remat != "block":
    kept += sum(each.sent for each in experts)
  if remat == "none":
    of_floats = _ARRAYS["floats"] * vectors / step.width * costs.FLOAT
    kept += len(kinds) * (waiting + of_a_block + of_floats)
    kept += sum(each.hidden for each in experts)
  inside = max(_ARRAYS["scores"] * scores, waiting + largest)
  inside += _ARRAYS["vectors"] * of_a_block
  weights = sum(m.numbers for m in found if m.part not in costs.OUTSIDE)
  inside += _ARRAYS["weights"] * weights / len(kinds) * step.width
  logits = (
    _ARRAYS["logits"] * step.tokens * arch.vocab_size / tensor * costs.FLOAT
  )
  vocabulary = arch.vocab_size * arch.d_model * (2 * step.width + costs.FLOAT)
  return stored + _PACKING * kept + max(inside, logits) + vocabulary


def _rearranged(step, found):
  """Bytes of copies with other dimensions last, which fill whole lanes."""
  if parallel.platform(step.mesh) != "tpu":
    return 0.0
  odd = [m for m in found if m.part == "experts" and m.lanes % _LANES]
  return costs.held(step.mesh, odd) * (costs.FLOAT + step.width)


class _OfExperts(NamedTuple):
  """Bytes of the layers of a sublayer.

  inside: that the backward pass of one layer needs.
  sent, hidden: that all layers keep of rows, and of hidden units.
  """

  inside: float
  sent: float
  hidden: float


def _of_experts(step, model, sublayer, home, room):
  row = sublayer.recipe.row_width(model.arch.d_model) * step.width
  hidden = room * sublayer.recipe.experts.width * step.width
  hidden /= step.mesh.shape["tensor"]
  layers = len(sublayer.numbers)
  # Results are gathered to their tokens; all_gather has those of all devices.
  ring = sublayer.recipe.exchange == "all_gather"
  tokens = step.tokens * (step.mesh.shape["expert"] if ring else 1)
  gathered = (sublayer.recipe.router.top_k or 0) + _ARRAYS["tokens"]
  inside = _ARRAYS["hidden"] * hidden + _ARRAYS["rows"] * room * row
  return _OfExperts(
    inside + gathered * tokens * row,
    layers * (home + room) * row,
    layers
    * (
      _ARRAYS["hidden"] * hidden
      + _ARRAYS["masks"] * room * (row + 2 * hidden / room)
    ),
  )


def with_settings(config, settings: dict):
  """Returns a copy of a config with other values.

  Args:
    config: stays unchanged.
    settings: {key: value}.
  """
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(settings)
  return config


def _possible(config, task, devices, sparse: bool) -> Iterator[tuple]:
  """Yields (settings, config, mesh, model) of all that a run would accept."""
  for sizes, kind, number, once in itertools.product(
    _meshes(len(devices)),
    exchange.KINDS,
    range(1, _MOST_MICRO_BATCHES + 1),
    (False, True),
  ):
    alone = sizes[2] == 1 or not sparse
    if (alone and kind != exchange.KINDS[0]) or config.data.batch_size % number:
      continue
    if once and (number == 1 or not sparse):
      continue
    settings = dict(zip(_KEYS, (sizes, kind, number, once)))
    one = with_settings(config, settings)
    mesh = parallel.make_mesh(sizes, devices)
    with contextlib.suppress(ConfigError):
      yield settings, one, mesh, program.build_model(one, task, mesh)


def _meshes(count: int) -> Iterator[tuple[int, ...]]:
  """Yields all lengths (data, fsdp, expert, tensor) whose product is count."""
  divisors = [n for n in range(1, count + 1) if count % n == 0]
  for fsdp, expert, tensor in itertools.product(divisors, repeat=3):
    known = fsdp * expert * tensor
    if count % known == 0 and tensor <= _MOST_TENSOR:
      yield count // known, fsdp, expert, tensor
