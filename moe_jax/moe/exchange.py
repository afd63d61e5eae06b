"""Rows to the devices of their experts and back: every collective of a layer.

Nothing is dropped here; every bound was applied in the plan, group by group.
Without a mesh (`mesh=None`) nothing is sent anywhere.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from moe_jax.core import parallel
from moe_jax.moe.types import Array, Bound, Mlp, Rows

_EXPERTS = 0x45  # Folded into the keys of a group for its experts.
# Names that a remat policy keeps so that no rows are sent twice.
SAVED = ("rows_at_experts", "rows_back", "sizes")


def exchange(rows: Rows, bound: Bound | None, mesh: Mesh | None):
  """Sends rows to their experts' devices.

  Args:
    rows: slots [g, E, C, D] or ragged rows [n, D] of this device's groups.
    bound: the plan's bound; it sizes the buffer that receives ragged rows.
    mesh: see `layer.moe_ffn`.

  Returns:
    Rows of all groups of the expert axis for this device's experts, and the
    function that brings such rows back.
  """
  if mesh is None:
    there, back = rows, lambda result: result
  elif rows.tokens_per_expert_GE is None:
    there, back = _fixed(rows)
  else:
    there, back = _ragged(rows, bound, mesh)
  at_experts, at_home, _ = SAVED
  return _named(there, at_experts), lambda result: _named(back(result), at_home)


def _named(rows, name):
  return rows.replace(x=checkpoint_name(rows.x, name))


def read(
  params, specs: Mapping | None, dtype, part: str, network: Mlp
) -> dict[str, Array]:
  """Weights as the experts see them: in the compute dtype, and all of D.

  They are gathered just in time. The transpose sums their gradients, leaves each
  device the part of the weight that it stores, and then adds up over the other
  axes that tokens are split over.

  Args:
    params: of the layer, or this device's parts of them.
    specs: {part: {parameter: its PartitionSpec}}; None: one device.
    dtype: of the result.
    part: of the parameters, "experts" or "shared".
    network: the experts, or the shared experts.
  """
  weights = {k: w.astype(dtype) for k, w in params[part].items()}
  if specs is None:
    return weights

  def gather(name, w):
    w = parallel.vary(w, parallel.TOKENS)
    for dim, logical in enumerate(network.axes[name]):
      axes = specs[part][name][dim]
      if axes and parallel.RULES[logical] == parallel.STORED:
        w = jax.lax.all_gather(w, axes, axis=dim, tiled=True)
    return once(w) if name in network.added_once else w

  return {k: gather(k, w) for k, w in weights.items()}


def once(w):
  """The parameter w on the first shard of F and zero on the others.

  Every shard adds it to its part of a sum over F, which must count it once.
  """
  return jnp.where(jax.lax.axis_index("tensor") == 0, w, 0)


def expert_keys(experts, rng_G, num_experts: int, mesh: Mesh | None):
  """A key for each group and each expert that this device's rows are of.

  Args:
    experts: `Experts`; None is returned unless they draw.
    rng_G: keys of this device's groups, or None.
    num_experts: E.
    mesh: see `layer.moe_ffn`.
  """
  if rng_G is None or not experts.draws:
    return None
  first, here = 0, num_experts
  if mesh is not None:
    rng_G = jax.lax.all_gather(rng_G, "expert", axis=0, tiled=True)
    here //= mesh.shape["expert"]
    first = jax.lax.axis_index("expert") * here
  of_group = jax.vmap(jax.random.fold_in, (None, 0))
  # Apart from the keys that a router splits from the same ones.
  rng_G = jax.vmap(lambda rng: jax.random.fold_in(rng, _EXPERTS))(rng_G)
  return jax.vmap(of_group, (0, None))(rng_G, first + jnp.arange(here))


def enter_tensor(x, mesh: Mesh | None):
  """x as each shard of F takes it; the transpose adds their gradients, once."""
  return x if mesh is None else parallel.vary(x, ("tensor",))


def sum_tensor(y, mesh: Mesh | None):
  """Adds the shards of F."""
  return y if mesh is None else jax.lax.psum(y, "tensor")


def _fixed(rows):
  def move(rows, split, concat):
    x = jax.lax.all_to_all(rows.x, "expert", split, concat, tiled=True)
    return Rows(x)

  return move(rows, 1, 0), lambda result: move(result, 0, 1)


def _ragged(rows, bound, mesh):
  x_ND, count_gE = rows.x, rows.tokens_per_expert_GE
  devices = mesh.shape["expert"]
  groups = count_gE.shape[0]

  def transpose(per_peer):
    there = jax.lax.all_to_all(per_peer, "expert", 0, 0, tiled=True)
    return checkpoint_name(there, "sizes")

  def move(x_ND, num_rows, start, send, start_there, receive):
    out = jnp.zeros((num_rows, x_ND.shape[1]), x_ND.dtype)
    landing = transpose(start_there)
    return ragged_all_to_all(x_ND, out, start, send, landing, receive, mesh)

  # [sender, e, g]: what each device sends to this one.
  count_ieg = transpose(count_gE.T).reshape(devices, -1, groups)
  send = count_gE.reshape(groups, devices, -1).sum((0, 2))
  receive = count_ieg.sum((1, 2))
  send_start, receive_start = _starts(send), _starts(receive)
  buffer = devices * x_ND.shape[0]
  if bound is not None:
    buffer = min(buffer, groups * bound.expert_buckets * bound.slots)

  x_MD = move(x_ND, buffer, send_start, send, receive_start, receive)
  count_ie = count_ieg.sum(2)
  by_sender = _transposed(count_ie, buffer)
  by_expert = _transposed(count_ie.T, buffer)
  count_Ge = count_ieg.transpose(0, 2, 1).reshape(devices * groups, -1)

  def back(result):
    rows_back = jnp.take(result.x, by_sender, axis=0, fill_value=0)
    y_ND = move(
      rows_back, x_ND.shape[0], receive_start, receive, send_start, send
    )
    return Rows(y_ND, count_gE)

  x_MD = jnp.take(x_MD, by_expert, axis=0, fill_value=0)
  return Rows(x_MD, count_Ge), back


def _starts(sizes):
  return jnp.cumsum(sizes) - sizes


def _transposed(size_ij, num_rows):
  """Maps rows of blocks in the order [i, j] to their rows in the order [j, i].

  Returns:
    int32 [num_rows]; num_rows for rows of no block.
  """
  here = _starts(size_ij.reshape(-1))
  there = _starts(size_ij.T.reshape(-1)).reshape(size_ij.T.shape).T.reshape(-1)
  block = jnp.repeat(
    jnp.arange(size_ij.size), size_ij.reshape(-1), total_repeat_length=num_rows
  )
  row = jnp.arange(num_rows)
  target = there[block] + row - here[block]
  return jnp.where(row < size_ij.sum(), target, num_rows)


def ragged_all_to_all(
  x_ND, out_ND, start, send, start_there, receive, mesh: Mesh
) -> Array:
  """`jax.lax.ragged_all_to_all` over the expert axis, on any platform.

  Slice i of x, send[i] rows from start[i], goes to device i, which places it at
  row start_there[i] of its output, and gets receive[j] rows of device j. XLA has
  no such collective for CPU, where all rows are gathered and the right ones
  kept.
  """
  if parallel.platform(mesh) != "cpu":
    sizes = start, send, start_there, receive
    return jax.lax.ragged_all_to_all(x_ND, out_ND, *sizes, axis_name="expert")
  gather = lambda x: jax.lax.all_gather(x, "expert")  # noqa: E731
  me = jax.lax.axis_index("expert")
  sent_from, sent, landed = (
    gather(x)[:, me] for x in (start, send, start_there)
  )
  row = jnp.arange(out_ND.shape[0])
  end = (landed + sent)[None, :]
  hit = (row[:, None] >= landed[None, :]) & (row[:, None] < end)
  source = jnp.argmax(hit, axis=1)
  index = source * x_ND.shape[0] + sent_from[source]
  index = index + row - landed[source]
  everything = gather(x_ND).reshape(-1, x_ND.shape[1])
  return jnp.where(hit.any(1)[:, None], everything[index], out_ND)
