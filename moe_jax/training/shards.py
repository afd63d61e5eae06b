"""Memory and sharding per device of a run, without allocating anything."""

import functools
import itertools
import math

import jax

from moe_jax.core import parallel
from moe_jax.training import program, train_step


def describe(config) -> str:
  """A line for every parameter, and the bytes that a device holds of it all.

  Args:
    config: see `configs/base.py`.

  Raises:
    ConfigError: what the mesh cannot hold, and other impossible values.
  """
  mesh, task, model = program.build(config, prepare=False)
  init = functools.partial(
    train_step.init_state,
    **train_step.parts(config, model, task),
    numbers=train_step.numbers(config, model),
  )
  boxed = jax.eval_shape(init, jax.random.key(0))
  state = program.abstract_state(boxed, mesh)
  heads = "mesh axes", "shape on a device", "bytes on a device", "bytes in all"
  rows = [("", "shape", *heads)]
  for path, x in jax.tree_util.tree_leaves_with_path(state.params):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    own = x.sharding.shard_shape(x.shape)
    rows.append((name, _text(x.shape), _axes(x, mesh), _text(own), *_bytes(x)))
  parts = {"parameters": state.params, "moving average": state.ema}
  parts |= {"optimizer": state.opt_state, "balancers": state.balance}
  for name, part in parts.items():
    rows.append((name, "", "", "", *_bytes(part)))
  lines = ["{:48}{:>16}  {:24}{:>16}{:>18}{:>18}".format(*row) for row in rows]
  return "\n".join([_mesh(mesh, config), "", *lines])


def _mesh(mesh, config):
  """The mesh axes, and the sequences per device."""
  micro = config.data.batch_size // config.train.accumulation
  shards, sizes = parallel.token_shards(mesh), program.grid(mesh).shape
  axes = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
  return (
    f"mesh: {axes}; {math.prod(sizes.values())} devices in"
    f" {jax.process_count()} processes; {micro // shards} of {micro} sequences"
    f" of a micro-batch on each of {shards} token shards"
  )


def _text(shape):
  return "x".join(map(str, shape)) or "1"


def _axes(x, mesh):
  """Mesh axes that an array is split over; - for none."""
  parts = [p if isinstance(p, tuple) else (p,) for p in x.sharding.spec if p]
  return " ".join(itertools.chain(*parts)) if mesh and parts else "-"


def _bytes(tree):
  """Those on one device, and those of the whole arrays."""
  arrays = jax.tree.leaves(tree)
  own = [x.sharding.shard_shape(x.shape) for x in arrays]
  for shapes in (own, [x.shape for x in arrays]):
    sizes = zip(map(math.prod, shapes), arrays)
    yield f"{sum(size * x.dtype.itemsize for size, x in sizes):,}"
