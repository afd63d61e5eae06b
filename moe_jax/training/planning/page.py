"""A plan as a page of text, and as JSON."""

import math

import jax

from moe_jax.core import parallel
from moe_jax.training.planning import costs
from moe_jax.training.planning.plan import Plan, seconds


def values(plan: Plan) -> dict:
  """Returns the plan for `--json`; bytes, FLOPs and seconds of one device."""
  low, high = seconds(plan.stages)
  return {
    "program": plan.program,
    "topology": plan.topology,
    "mesh": plan.mesh,
    "tokens_per_step": plan.tokens,
    "fits": plan.fits,
    "memory_bytes_per_device": plan.memory
    | {"total": sum(plan.memory.values())},
    "even_bytes_per_device": plan.even,
    "hbm_limit_bytes": plan.limit,
    "flops": plan.flops,
    "buffers": buffers(plan),
    "collectives": collectives(plan),
    "stages": [
      {
        **cost.stage._asdict(),
        "sent": [sent._asdict() for sent in cost.stage.sent],
        "roofline_seconds": seconds([cost]),
      }
      for cost in plan.stages
    ],
    "roofline_seconds": [low, high] if plan.chip.flops else None,
    "model_flops_utilization_at_most": utilization(plan),
    "compile_seconds": plan.compile_seconds,
    "notes": notes(plan),
  }


def notes(plan: Plan) -> list[str]:
  """Returns sentences that a reader of the plan should know."""
  if plan.chip.platform != "gpu":
    return []
  found = [
    "jax gives a run 75% of the memory of a GPU, unless the environment variable"
    " XLA_PYTHON_CLIENT_MEM_FRACTION says more."
  ]
  sublayers = plan.model.sublayers.values()
  if any(each.recipe.dispatcher.ragged for each in sublayers):
    found.append(
      "Temporary memory is that of XLA's ragged_dot, which the kernels of a run"
      " replace; so whether the step fits is not certain."
    )
  return found


def utilization(plan: Plan) -> float | None:
  """Returns model FLOPs over the chip's FLOPs in the least time of a step."""
  if not plan.chip.flops:
    return None
  return plan.flops["model"] / (seconds(plan.stages)[0] * plan.chip.flops)


def buffers(plan: Plan) -> list[dict]:
  """Returns the rows of a device's experts' buffers, by kind of layer."""
  d_model, size = plan.model.arch.d_model, plan.step.width
  return [
    {
      "layers": sublayer.numbers,
      "balanced_rows": plan.step.tokens * sublayer.recipe.experts_per_token,
      "rows": room,
      "bytes": room * sublayer.recipe.row_width(d_model) * size,
    }
    for sublayer, _, room in costs.buffers(plan.step, plan.model)
  ]


def collectives(plan: Plan) -> list[dict]:
  """Returns the compiled collectives, each beside the closed form's bytes.

  A compiler may gather by an all-reduce of parts, or scatter by an all-reduce
  whose result it cuts: only the sizes of the arrays over some axes agree.

  Args:
    plan: with collectives, if its program was compiled.
  """
  formula = {}
  for cost in plan.stages:
    for sent in cost.stage.sent:
      formula[sent.axes] = formula.get(sent.axes, 0) + sent.arrays
  total = {}
  for (_, axes), moved in (plan.moved or {}).items():
    total[axes] = total.get(axes, 0) + moved.arrays
  return [
    {
      "kind": kind,
      "axis": ",".join(axes),
      "count": moved.count,
      "bytes": moved.arrays,
      "result_bytes": moved.results,
      "axis_bytes": total[axes],
      "formula_bytes": formula.get(axes, 0),
    }
    for (kind, axes), moved in (plan.moved or {}).items()
  ]


def text(plan: Plan) -> str:
  """Returns the plan for people."""
  parts = [_head(plan), _memory(plan)]
  parts.append(_flops(plan))
  if plan.moved:
    parts.append(_sent(plan))
  if plan.chip.flops:
    parts.append(_stages(plan))
  return "\n\n".join([*parts, *notes(plan)])


def parameters(plan: Plan) -> str:
  """Returns a line for every parameter: how it lies on the mesh."""
  heads = "shape", "mesh axes", "shape on a device", "on a device", "in all"
  rows = ["", "{:48}{:>20}  {:20}{:>20}{:>12}{:>12}".format("", *heads)]
  for path, x in jax.tree_util.tree_leaves_with_path(plan.params):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    own = x.sharding.shard_shape(x.shape)
    axes = [a for part in x.sharding.spec for a in parallel.names(part)]
    sizes = (
      quantity(math.prod(n) * x.dtype.itemsize, "B") for n in (own, x.shape)
    )
    shapes = ("x".join(map(str, n)) or "1" for n in (x.shape, own))
    whole, part = shapes
    rows.append(
      "{:48}{:>20}  {:20}{:>20}{:>12}{:>12}".format(
        name, whole, " ".join(axes) or "-", part, *sizes
      )
    )
  return "\n".join(rows)


def candidates(found: list, chip, most: int = 10) -> str:
  """Returns the best candidates of a search, for people.

  Args:
    found: from `search.ranked`.
    chip: of the devices.
    most: number of candidates that are shown.
  """
  fitting = sum(one.fits(chip) for one in found)
  rows = [
    f"{len(found)} candidates, of which {fitting} fit by the closed form:"
  ]
  for one in found[:most]:
    rows.append(
      f"  {quantity(one.high, 's')} without overlap, {quantity(one.low, 's')} with"
      " all,"
      f" {quantity(one.memory, 'B')}: {one.flags}"
    )
  return "\n".join(rows)


def compared(one, plan: Plan) -> str:
  """Returns a sentence about a candidate and its compiled program.

  Args:
    one, plan: the `search.Candidate`, and its plan.
  """
  real = sum(plan.memory.values())
  if not plan.compile_seconds:
    return (
      f"{one.flags}: does NOT fit, by its state alone: {quantity(real, 'B')}"
    )
  verdict = "fits" if plan.fits else "does NOT fit"
  return (
    f"compiled {one.flags}: {verdict}, {quantity(real, 'B')}; the closed form"
    f" has {quantity(one.memory, 'B')} ({one.memory / real - 1:+.1%})"
  )


def quantity(number: float, unit: str) -> str:
  """Returns a number with a prefix, such as 2.92 GB or 31.4 ms.

  Args:
    number: >= 0.
    unit: such as "B" or "s".
  """
  number = float(f"{number:.3g}")  # 999.7 GB is 1 TB.
  for power, prefix in (
    (15, "P"),
    (12, "T"),
    (9, "G"),
    (6, "M"),
    (3, "k"),
    (0, ""),
  ):
    if abs(number) >= 10**power:
      return f"{number / 10**power:.3g} {prefix}{unit}"
  for power, prefix in ((-3, "m"), (-6, "µ"), (-9, "n"), (-12, "p")):
    if abs(number) >= 10**power:
      return f"{number / 10**power:.3g} {prefix}{unit}"
  return f"0 {unit}"


def _head(plan):
  axes = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
  verdict = "fits" if plan.fits else "does NOT fit"
  lines = [
    f"{plan.program} on {plan.topology}, mesh {axes}: {verdict}",
    f"{plan.tokens:,} tokens a step; {_compiled_in(plan)}",
  ]
  if plan.chip.flops:
    low, high = (quantity(x, "s") for x in seconds(plan.stages))
    lines.append(
      f"at least {low} a step if everything overlaps, {high} if nothing does; so at"
      f" most {utilization(plan):.0%} of the peak (MFU)"
    )
  return "\n".join(lines)


def _compiled_in(plan):
  if not plan.compile_seconds:
    return "not compiled, as its state alone does not fit"
  return f"compiled in {quantity(plan.compile_seconds, 's')}"


def _memory(plan):
  rows = [f"{'memory of a device':24}{'bytes':>12}{'split evenly':>16}"]
  for kind, size in plan.memory.items():
    if size:
      even = quantity(plan.even[kind], "B") if kind in plan.even else ""
      rows.append(f"  {kind:22}{quantity(size, 'B'):>12}{even:>16}")
  total = quantity(sum(plan.memory.values()), "B")
  limit = "unknown" if plan.limit is None else quantity(plan.limit, "B")
  rows.append(f"  {'total':22}{total:>12}   of {limit}")
  for one in buffers(plan):
    rows.append(
      f"buffer of the experts of each of {len(one['layers'])} layers:"
      f" {quantity(one['bytes'], 'B')}, {one['rows']:,} rows, where equal loads"
      f" have {one['balanced_rows']:,.0f}"
    )
  return "\n".join(rows)


def _flops(plan):
  where = "counted in the compiled program"
  if not plan.flops["compiled"]:
    where = "in closed form"
  words = {
    "model": "what the mathematics asks for",
    "useful": "of the program, without what follows",
    "recomputed": "again, for the backward pass (model.remat)",
    "padded": "useful, and rows that the tiles of kernels compute in vain",
    "static": "useful, and all rows of the buffers",
  }
  rows = [f"FLOPs of a device in a step, {where}"]
  for key, word in words.items():
    number = plan.flops[key]
    text = "unknown" if number is None else quantity(number, "FLOP")
    rows.append(f"  {key:12}{text:>14}  {word}")
  return "\n".join(rows)


def _sent(plan):
  heads = "collectives of a step", "over", "count", "arrays", "over these axes"
  rows = ["{:24}{:22}{:>7}{:>12}{:>17}{:>12}".format(*heads, "by formula")]
  for one in collectives(plan):
    keys = ("bytes", "axis_bytes", "formula_bytes")
    sizes = (quantity(one[key], "B") for key in keys)
    rows.append(
      "  {:22}{:22}{:7}{:>12}{:>17}{:>12}".format(
        one["kind"], one["axis"], one["count"], *sizes
      )
    )
  return "\n".join(rows)


def _stages(plan):
  heads = "FLOP", "again", "read, written", "received", "at least", "no overlap"
  line = "{:24}{:>12}{:>12}{:>15}{:>12}{:>12}{:>12}"
  rows = [line.format("stages, in closed form", *heads)]
  for cost in plan.stages:
    stage, (low, high) = cost.stage, seconds([cost])
    sent = sum(one.wire for one in stage.sent)
    cells = [quantity(x, "") for x in (stage.flops, stage.again)]
    cells += [quantity(x, "B") for x in (stage.memory + stage.spilled, sent)]
    cells += [quantity(x, "s") for x in (low, high)]
    rows.append(line.format(f"  {stage.name}", *cells))
  return "\n".join(rows)
