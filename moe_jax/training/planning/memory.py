"""The memory of a step, estimated in closed form for candidates of a search."""

from typing import NamedTuple

from moe_jax.training.planning import costs

# How many arrays of a size are there at the same time, in compiled programs.
_ARRAYS = {"scores": 2.0, "hidden": 6.0, "rows": 2.0, "logits": 2.0}
_ARRAYS |= {"vectors": 3.0}


def temporaries(
  step: costs.Step, model, found: list[costs.Matrix], remat: str
) -> float:
  """Bytes that a training step needs besides its arguments; an estimate.

  They are gradients in float32 and weights in the compute dtype, as a device
  stores them; what the forward pass keeps for the backward pass; and what the
  backward pass of one block, or the output layer, needs meanwhile. `_ARRAYS`
  counts arrays that are there at the same time, in compiled programs.

  Args:
    step: its sizes.
    model: a decoder.
    found: its matrices.
    remat: `model.remat`.
  """
  arch, tensor = model.arch, step.mesh.shape["tensor"]
  gradients = costs.FLOAT * (1 if step.micro_batches == 1 else 2)
  stored = costs.held(step.mesh, found) * (gradients + step.width)
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
  kept = len(kinds) * vectors
  if remat != "block":
    kept += sum(each.sent for each in experts)
  if remat == "none":
    kept += len(kinds) * (_ARRAYS["scores"] * scores + of_a_block)
    kept += sum(each.hidden for each in experts)
  inside = max(_ARRAYS["scores"] * scores, scores + largest)
  inside += _ARRAYS["vectors"] * of_a_block
  logits = (
    _ARRAYS["logits"] * step.tokens * arch.vocab_size / tensor * costs.FLOAT
  )
  vocabulary = arch.vocab_size * arch.d_model * (2 * step.width + costs.FLOAT)
  return stored + kept + max(inside, logits) + vocabulary


class _OfExperts(NamedTuple):
  """Bytes of the layers of a sublayer: inside: that one layer's backward pass
  needs; sent, hidden: of what all layers keep."""

  inside: float
  sent: float
  hidden: float


def _of_experts(step, model, sublayer, home, room):
  row = model.arch.d_model * step.width
  hidden = room * sublayer.recipe.experts.width * step.width
  hidden /= step.mesh.shape["tensor"]
  layers = len(sublayer.numbers)
  return _OfExperts(
    _ARRAYS["hidden"] * hidden + _ARRAYS["rows"] * room * row,
    layers * (home + room) * row,
    layers * _ARRAYS["hidden"] / 2 * hidden,
  )
