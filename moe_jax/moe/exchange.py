"""Rows to the devices of their experts and back: every collective of a layer.

Nothing is dropped here; every bound was applied in the plan, group by group.
Without axes (`axes=None`) each function does nothing.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.core import varying
from moe_jax.moe.types import Array, Axes, Bound, Rows

_EXPERTS = 0x45  # Folded into the keys of a group for its experts.
# What a remat policy keeps where no rows are to be sent twice.
SAVED = ("rows_at_experts", "rows_back", "sizes")


def exchange(rows: Rows, bound: Bound | None, axes: Axes | None):
  """Sends rows to their experts' devices.

  Args:
    rows: slots [g, E, C, D] or ragged rows [n, D] of this device's groups.
    bound: the plan's bound; it sizes the buffer that receives ragged rows.
    axes: mesh axes, or None on a single device.

  Returns:
    Rows of all groups of the expert axis for this device's experts, and the
    function that brings such rows back.
  """
  if axes is None:
    there, back = rows, lambda result: result
  elif rows.tokens_per_expert_GE is None:
    there, back = _fixed(rows, axes)
  else:
    there, back = _ragged(rows, bound, axes)
  at_experts, at_home, _ = SAVED
  return _named(there, at_experts), lambda result: _named(back(result), at_home)


def _named(rows, name):
  return rows.replace(x=checkpoint_name(rows.x, name))


def gather_weights(params, logical_axes, axes: Axes | None):
  """All of D of each weight, just in time.

  The transpose scatters the sum of their gradients over fsdp, and only then adds
  up what is left over the other axes that tokens are split over.
  """
  if axes is None:
    return params

  def gather(w, names):
    w = varying.over(w, axes.tokens)
    for dim, name in enumerate(names):
      if name == "embed":
        w = jax.lax.all_gather(w, axes.fsdp, axis=dim, tiled=True)
    return w

  return {k: gather(w, logical_axes[k]) for k, w in params.items()}


def expert_keys(experts, rng_G, num_experts: int, axes: Axes | None):
  """A key for each group and each expert that this device's rows are of.

  Args:
    experts: `Experts`; None is returned unless they draw.
    rng_G: keys of this device's groups, or None.
    num_experts: E.
    axes: mesh axes, or None on a single device.
  """
  if rng_G is None or not experts.draws:
    return None
  expert_E = jnp.arange(num_experts)
  if axes is not None:
    data = jax.lax.all_gather(
      jax.random.key_data(rng_G), axes.expert, axis=0, tiled=True
    )
    rng_G = jax.random.wrap_key_data(data)
    here = num_experts // jax.lax.axis_size(axes.expert)
    first = jax.lax.axis_index(axes.expert) * here
    expert_E = first + jnp.arange(here)
  of_group = jax.vmap(jax.random.fold_in, (None, 0))
  # Apart from the keys that a router splits from the same ones.
  rng_G = jax.vmap(lambda rng: jax.random.fold_in(rng, _EXPERTS))(rng_G)
  return jax.vmap(of_group, (0, None))(rng_G, expert_E)


def once(bias, axes: Axes | None):
  """What `sum_tensor` must count once though every tensor shard adds it."""
  if axes is None:
    return bias
  return jnp.where(jax.lax.axis_index(axes.tensor) == 0, bias, 0)


def enter_tensor(x, axes: Axes | None):
  """x as each shard of F takes it; the transpose adds their gradients, once."""
  return x if axes is None else varying.over(x, (axes.tensor,))


def sum_tensor(y, axes: Axes | None):
  """Adds the shards of F."""
  return y if axes is None else jax.lax.psum(y, axes.tensor)


def _fixed(rows, axes):
  def send(x_gECD):
    return jax.lax.all_to_all(x_gECD, axes.expert, 1, 0, tiled=True)

  def back(result):
    x_GeCD = result.x
    return Rows(jax.lax.all_to_all(x_GeCD, axes.expert, 0, 1, tiled=True))

  return Rows(send(rows.x)), back


def _ragged(rows, bound, axes):
  x_ND, count_gE = rows.x, rows.tokens_per_expert_GE
  devices = jax.lax.axis_size(axes.expert)
  groups, num_experts = count_gE.shape

  def transpose(per_peer):
    there = jax.lax.all_to_all(per_peer, axes.expert, 0, 0, tiled=True)
    return checkpoint_name(there, "sizes")

  # [sender, e, g]: what each device sends to this one.
  count_ieg = transpose(count_gE.T).reshape(devices, -1, groups)
  send = count_gE.reshape(groups, devices, -1).sum((0, 2))
  receive = count_ieg.sum((1, 2))
  send_start, receive_start = _starts(send), _starts(receive)

  buffer = _buffer_rows(x_ND.shape[0], groups, devices, bound)
  out = jnp.zeros((buffer, x_ND.shape[1]), x_ND.dtype)
  x_ND = ragged_all_to_all(
    x_ND, out, send_start, send, transpose(receive_start), receive, axes
  )
  by_sender, by_expert = _transpose_blocks(count_ieg.sum(2), buffer)
  count_Ge = count_ieg.transpose(0, 2, 1).reshape(devices * groups, -1)

  def back(result):
    rows_back = _take(result.x, by_sender)
    width = rows_back.shape[1]
    out = jnp.zeros((rows.x.shape[0], width), rows_back.dtype)
    return Rows(
      ragged_all_to_all(
        rows_back,
        out,
        receive_start,
        receive,
        transpose(send_start),
        send,
        axes,
      ),
      count_gE,
    )

  return Rows(_take(x_ND, by_expert), count_Ge), back


def _buffer_rows(rows, groups, devices, bound):
  """The most rows that a device's experts can be sent."""
  if bound is None:
    return devices * rows
  return min(devices * rows, groups * bound.expert_buckets * bound.slots)


def _starts(sizes):
  return jnp.cumsum(sizes) - sizes


def _transpose_blocks(count_ie, num_rows):
  """Row indices that reorder blocks (sender, expert) <-> (expert, sender).

  Returns:
    by_sender [num_rows]: where each row of the first order stands in the
    second; by_expert: the other way. num_rows for rows of no block.
  """
  start_ie = _starts(count_ie.reshape(-1)).reshape(count_ie.shape)
  start_ei = _starts(count_ie.T.reshape(-1)).reshape(count_ie.T.shape)

  def moved(sizes, here, there):
    block = jnp.repeat(
      jnp.arange(sizes.size), sizes, total_repeat_length=num_rows
    )
    row = jnp.arange(num_rows)
    target = there[block] + row - here[block]
    return jnp.where(row < sizes.sum(), target, num_rows)

  flat = jnp.ravel
  by_sender = moved(flat(count_ie), flat(start_ie), flat(start_ei.T))
  by_expert = moved(flat(count_ie.T), flat(start_ei), flat(start_ie.T))
  return by_sender, by_expert


def _take(x_ND, index_N):
  return x_ND.at[index_N].get(mode="fill", fill_value=0)


def ragged_all_to_all(
  operand: Array,
  output: Array,
  input_offsets: Array,
  send_sizes: Array,
  output_offsets: Array,
  recv_sizes: Array,
  axes: Axes,
) -> Array:
  """`jax.lax.ragged_all_to_all` over the expert axis, on any platform.

  Slice i of the operand, send_sizes[i] rows from input_offsets[i], goes to
  device i, which places it at row output_offsets[i] of its output. XLA has no
  such collective for CPU, where all rows are gathered and the right ones kept.
  """
  if axes.platform != "cpu":
    return jax.lax.ragged_all_to_all(
      operand,
      output,
      input_offsets,
      send_sizes,
      output_offsets,
      recv_sizes,
      axis_name=axes.expert,
    )
  gather = lambda x: jax.lax.all_gather(x, axes.expert)  # noqa: E731
  me = jax.lax.axis_index(axes.expert)
  sent_from, sent, landed = (
    gather(x)[:, me] for x in (input_offsets, send_sizes, output_offsets)
  )
  row = jnp.arange(output.shape[0])
  end = (landed + sent)[None, :]
  hit = (row[:, None] >= landed[None, :]) & (row[:, None] < end)
  source = jnp.argmax(hit, axis=1)
  index = source * operand.shape[0] + sent_from[source]
  index = index + row - landed[source]
  everything = gather(operand).reshape(-1, operand.shape[1])
  return jnp.where(hit.any(1)[:, None], everything[index], output)
