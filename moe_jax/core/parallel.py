"""The mesh, and how arrays lie on it: sharded, replicated, or varying."""

import functools
import math

import flax.linen as nn
import jax
import numpy as np
from jax import Array

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import either, integer, items

AXES = ("data", "fsdp", "expert", "tensor")
SIZES = items(either(integer(1), integer(-1, -1)), len(AXES))
TOKENS = ("data", "fsdp", "expert")

# A matrix outside of the experts is stored split over these axes, and gathered
# just in time.
STORED = ("fsdp", "expert")
# Logical axis of a parameter or activation -> mesh axes. One table for all.
RULES = {
  "batch": TOKENS,
  "shards": ("data", "fsdp"),
  "expert": ("expert",),
  "embed": STORED,
  "latent": STORED,
  "mlp": ("tensor",),
  "heads": ("tensor",),
  "kv_heads": ("tensor",),
  "vocab": ("tensor",),
}


def make_mesh(sizes: tuple[int, ...], devices=None) -> jax.sharding.Mesh:
  """Returns the mesh (data, fsdp, expert, tensor); unused axes have length 1.

  Args:
    sizes: length of each axis, >= 1; -1 for one of them takes the devices that
      are left.
    devices: the devices to use; None: all of them.

  Raises:
    ConfigError: invalid lengths, or their product is not the number of devices.
  """
  SIZES.check(tuple(sizes), "mesh")
  more = ", or on CPU set XLA_FLAGS=--xla_force_host_platform_device_count=N"
  if devices is None:
    devices = jax.devices()
  else:
    more = ""  # The devices are those of a topology.
  try:
    devices_DFET = np.reshape(devices, sizes)
  except ValueError:
    raise ConfigError(
      f"mesh = {tuple(sizes)} over {AXES} is not possible with {len(devices)}"
      f" devices; change the mesh, of which one length may be -1{more}"
    ) from None
  return of_automatic_axes(jax.sharding.Mesh(devices_DFET, AXES))


def check_axes(mesh: jax.sharding.Mesh) -> None:
  """Raises ConfigError for a mesh that has not the axes of `make_mesh`."""
  if mesh.axis_names != AXES:
    raise ConfigError(
      f"the mesh has the axes {mesh.axis_names}, and must have {AXES}; make it"
      " with parallel.make_mesh, or jax.make_mesh, with length 1 for axes that"
      " are not used"
    )


def of_automatic_axes(mesh: jax.sharding.Mesh | None):
  """Returns the mesh with automatic axes, where it had explicit ones.

  Args:
    mesh: a mesh, or None, which is returned.

  Raises:
    ConfigError: it has not the axes of `make_mesh`.
  """
  if mesh is None:
    return None
  check_axes(mesh)
  automatic = (jax.sharding.AxisType.Auto,) * len(AXES)
  return mesh.update(axis_types=automatic)


def grid(mesh):
  """Returns `mesh`; for None, a mesh of the one device that is used."""
  return mesh or make_mesh((1, 1, 1, 1), jax.devices()[:1])


def mesh_or_none(sizes, devices=None) -> jax.sharding.Mesh | None:
  """Returns `make_mesh`, or None for one device of this machine.

  Args:
    sizes, devices: as in `make_mesh`.

  Raises:
    ConfigError: as in `make_mesh`.
  """
  mesh = make_mesh(tuple(sizes), devices)
  return mesh if mesh.size > 1 or devices is not None else None


def platform(mesh: jax.sharding.Mesh | None) -> str:
  """The platform of a mesh's devices: "cpu", "gpu" or "tpu"."""
  return mesh.devices.flat[0].platform if mesh else jax.default_backend()


def token_shards(mesh: jax.sharding.Mesh | None) -> int:
  """Returns the number of devices that the batch is split over."""
  return 1 if mesh is None else math.prod(mesh.shape[a] for a in TOKENS)


def local_rows(mesh: jax.sharding.Mesh | None, batch: int) -> np.ndarray:
  """Returns the rows of a batch that this process's devices hold, ascending.

  Args:
    mesh: from `make_mesh`; None: one device, which holds all rows.
    batch: number of rows in the global batch.

  Returns:
    Indices into the global batch, int, [rows of this process].
  """
  if mesh is None:
    return np.arange(batch)
  sharding = jax.NamedSharding(mesh, jax.P(TOKENS))
  parts = sharding.addressable_devices_indices_map((batch,)).values()
  return np.unique([np.arange(batch)[rows] for (rows,) in parts])


def global_batch(local: np.ndarray, mesh, batch: int, axis: int = 0) -> Array:
  """Makes an array over all processes, each of which holds its own rows.

  Args:
    local: the rows of this process, see `local_rows`.
    mesh: from `make_mesh`; None returns `local`.
    batch: number of rows in the global batch.
    axis: the axis of the rows.
  """
  if mesh is None:
    return local
  sharding = jax.NamedSharding(mesh, jax.P(*(None,) * axis, TOKENS))
  shape = (*local.shape[:axis], batch, *local.shape[axis + 1 :])
  return jax.make_array_from_process_local_data(sharding, local, shape)


def spec(
  names: tuple[str | None, ...], shape: tuple[int, ...], mesh
) -> jax.sharding.PartitionSpec:
  """Returns the PartitionSpec of an array with these logical axes.

  An axis is split over the mesh axes that `RULES` has for its name, in turn. A
  mesh axis is left out where it does not divide the size, or where an earlier
  axis of the array is split over it.

  Args:
    names: logical name of each axis, or None.
    shape: of the whole array.
    mesh: from `make_mesh`.
  """
  free, parts = dict(mesh.shape), []
  for name, size in zip(names, shape, strict=True):
    axes = []
    for axis in RULES.get(name, ()):
      if axis in free and size % free[axis] == 0:
        size //= free.pop(axis)
        axes.append(axis)
    parts.append(tuple(axes) or None)
  return jax.P(*parts)


def names(part) -> tuple[str, ...]:
  """Returns the mesh axes in an entry of a PartitionSpec, however many."""
  return (part,) if isinstance(part, str) else part or ()


def constrain(x: Array, names, mesh: jax.sharding.Mesh | None) -> Array:
  """Returns x with its sharding pinned, as in `spec`; x itself without a mesh.

  Args:
    x: an array inside jit.
    names: logical name of each of its axes, or None.
    mesh: from `make_mesh`, or None.
  """
  if mesh is None:
    return x
  sharding = jax.NamedSharding(mesh, spec(names, x.shape, mesh))
  return jax.lax.with_sharding_constraint(x, sharding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(w: Array, names, mesh: jax.sharding.Mesh | None) -> Array:
  """Returns a weight outside of the experts, whole over the axes of `STORED`.

  All its uses share the one gather that this asks for. Its gradient is summed
  to where the weight is stored.

  Args:
    w: the weight, in the dtype of its product.
    names: logical name of each axis, or None.
    mesh: from `make_mesh`; None returns w.
  """
  whole = (None if RULES.get(name) == STORED else name for name in names)
  return constrain(w, tuple(whole), mesh)


gathered.defvjp(
  lambda w, names, mesh: (gathered(w, names, mesh), None),
  lambda names, mesh, _, dw: (constrain(dw, names, mesh),),
)


def shardings(boxed, mesh: jax.sharding.Mesh):
  """Returns the shardings of a tree of parameters, in the same tree.

  Args:
    boxed: parameters in linen's boxes with logical axis names; an array without
      names lies whole on every device.
    mesh: from `make_mesh`.
  """

  def is_box(x):
    return isinstance(x, nn.Partitioned)

  def of(x):
    names, shape = (x.names, x.value.shape) if is_box(x) else ((), ())
    return jax.NamedSharding(mesh, spec(names, shape, mesh))

  return jax.tree.map(of, boxed, is_leaf=is_box)


def shard_map(f, mesh: jax.sharding.Mesh, in_specs, out_specs, **options):
  """`jax.shard_map` for arguments that lie in any way on explicit axes.

  Args:
    f, mesh, in_specs, out_specs: as in `jax.shard_map`.
    **options: more options of `jax.shard_map`.

  Returns:
    A function of the global arrays.
  """
  mesh = _here(mesh)
  run = jax.shard_map(
    f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **options
  )
  if not mesh.explicit_axes:
    return run
  placed = jax.tree.map(functools.partial(jax.NamedSharding, mesh), in_specs)
  return lambda *args: run(*jax.reshard(args, placed))


def automatic(f, out_specs):
  """Returns f with all mesh axes of its arrays automatic inside.

  Args:
    f: a function of arrays, whose axes may be explicit outside.
    out_specs: how its results lie on explicit axes, a prefix of their tree.
  """

  def run(*args):
    mesh = jax.sharding.get_abstract_mesh()
    for x in jax.tree.leaves(args):
      mesh = jax.typeof(x).sharding.mesh if mesh.empty else mesh
    if not mesh.explicit_axes:
      return f(*args)
    place = functools.partial(jax.NamedSharding, mesh)
    out = jax.tree.map(place, out_specs)
    return jax.sharding.auto_axes(f, out_sharding=out)(*args)

  return run


def _here(mesh):
  """The mesh with the types that its axes have at the place of the call."""
  context = jax.sharding.get_abstract_mesh()
  if context.empty or context.axis_names != mesh.axis_names:
    return mesh
  return mesh.update(axis_types=context.axis_types)


def check_widths(mesh: jax.sharding.Mesh, **widths: tuple[int, str]) -> None:
  """Raises ConfigError for a width that its mesh axis does not divide.

  Args:
    mesh: from `make_mesh`.
    **widths: by the name of the config's key, (width, mesh axis).
  """
  for key, (width, axis) in widths.items():
    if width % mesh.shape[axis]:
      raise ConfigError(
        f"{key} = {width} does not divide over the mesh axis {axis} ="
        f" {mesh.shape[axis]}; change one so that the second divides the first"
      )


def alike(tree):
  """Makes all leaves vary over each mesh axis that any leaf varies over.

  The values that a loop carries must vary over the same axes, and so must the
  arguments of a `custom_vjp`. Where a leaf is the same on several devices, the
  transpose adds up their gradients. Outside of a sharded region nothing
  changes.
  """
  wanted = frozenset().union(*map(_varies_over, jax.tree.leaves(tree)))
  return jax.tree.map(lambda x: vary(x, wanted), tree)


def vary(x, axes):
  """Makes x vary over `axes` too; the transpose adds up gradients over them.

  Args:
    x: an array inside a sharded region.
    axes: names of mesh axes.
  """
  missing = tuple(sorted(frozenset(axes) - _varies_over(x)))
  return jax.lax.pcast(x, missing, to="varying") if missing else x


def _varies_over(x):
  return jax.typeof(x).manual_axis_type.varying
