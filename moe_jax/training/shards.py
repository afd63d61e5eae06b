"""Who holds what in a training run, without allocating any of it."""

import functools
import math

import jax

from moe_jax.core import parallel
from moe_jax.training import optimizers, program, train_step


def describe(config) -> str:
  """A line for every parameter, and the bytes that a device holds of it all.

  Args:
    config: see `configs/base.py`.

  Raises:
    ConfigError: what the mesh cannot hold, and other impossible values.
  """
  program.check(config)
  mesh = parallel.mesh_or_none(config.mesh)
  task = program.build_task(config, mesh, prepare=False)
  model = program.build_model(config, task, mesh)
  init = functools.partial(
    train_step.init_state,
    model=model,
    task=task,
    optimizer=functools.partial(
      optimizers.build,
      optimizers.load(config.optim, config.plugins).direction,
    ),
    numbers=train_step.numbers(config, model),
  )
  boxed = jax.eval_shape(init, jax.random.key(0))
  shapes = program.abstract_state(boxed, mesh)
  shardings = jax.tree.map(lambda x: x.sharding, shapes)
  held = jax.tree.map(_held, shapes, shardings)
  rows = _rows(shapes.params, shardings.params, held.params)
  for name, part in (
    ("parameters", "params"),
    *[("moving average", "ema")] * (shapes.ema is not None),
    ("optimizer", "opt_state"),
    ("balancers", "balance"),
  ):
    own, whole = (_bytes(getattr(state, part)) for state in (held, shapes))
    rows.append((name, "", "", "", own, whole))
  return "\n".join([_mesh(mesh, config), "", *_aligned(rows)])


def _held(x, sharding):
  """What one device has of an array."""
  return jax.ShapeDtypeStruct(sharding.shard_shape(x.shape), x.dtype)


def _mesh(mesh, config):
  """What the axes are, and how many sequences each device gets."""
  micro = config.data.batch_size // config.train.accumulation
  shards = parallel.token_shards(mesh)
  sizes = dict(mesh.shape) if mesh else dict.fromkeys(parallel.AXES, 1)
  axes = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
  return (
    f"mesh: {axes}; {math.prod(sizes.values())} devices in"
    f" {jax.process_count()} processes; {micro // shards} of {micro} sequences"
    f" of a micro-batch on each of {shards} token shards"
  )


def _rows(shapes, shardings, held):
  """(name, shape, axes, shape on a device, bytes there, bytes in all)."""
  rows = [("", "whole", "over", "on a device", "bytes", "of")]
  leaves = jax.tree_util.tree_leaves_with_path(shapes)
  others = map(jax.tree.leaves, (shardings, held))
  for (path, x), sharding, own in zip(leaves, *others, strict=True):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    shapes = _text(x.shape), _axes(sharding), _text(own.shape)
    rows.append((name, *shapes, _bytes(own), _bytes(x)))
  return rows


def _bytes(tree):
  arrays = jax.tree.leaves(tree)
  return f"{sum(x.size * x.dtype.itemsize for x in arrays):,}"


def _axes(sharding):
  """Mesh axes that an array is split over; - for none."""
  found = []
  for part in getattr(sharding, "spec", ()):
    found += [part] if isinstance(part, str) else (part or ())
  return " ".join(found) or "-"


def _text(shape):
  return "x".join(map(str, shape)) or "1"


def _aligned(rows):
  """Columns as wide as they need: three of words, then numbers to the right."""
  widths = [max(map(len, column)) for column in zip(*rows)]
  for row in rows:
    cells = [
      cell.rjust(width) if i > 3 else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths))
    ]
    yield "  ".join(cells).rstrip()
