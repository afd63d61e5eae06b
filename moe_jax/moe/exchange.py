"""Tokens to the devices of their experts and back: every collective of a layer.

Nothing is dropped here; every bound was applied in the plan, group by group.
Without a mesh (`mesh=None`) nothing is sent anywhere.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from moe_jax.core import parallel
from moe_jax.moe import dispatchers, plans, reduction
from moe_jax.moe.types import Array, Mlp, Plan, Rows, TokenChoice

# How tokens get to their experts. "all_to_all": each device sends rows to the
# devices of their experts, which send results back. "all_gather": each device
# gets all tokens of the expert axis, and all add up what their experts gave.
KINDS = ("all_to_all", "all_gather")
_EXPERTS = 0x45  # Folded into the keys of a group for its experts.
# Names that a remat policy keeps so that nothing is sent twice.
SAVED = ("sent", "rows_back", "sizes")


def exchange(recipe, choice, plan: Plan, x_GTD: Array, mesh: Mesh | None):
  """Lays tokens out in rows, on the devices of their experts.

  Args:
    recipe: `layer.Recipe`.
    choice: of this device's groups, in a form of `types.Routing`.
    plan: of this choice.
    x_GTD: tokens of this device's groups.
    mesh: see `layer.moe_ffn`.

  Returns:
    Rows of all groups of the expert axis for this device's experts, and the
    function from the results of such rows to y_GTD of this device's groups.
  """
  alone = mesh is None or mesh.shape["expert"] == 1
  if not alone and recipe.exchange == "all_gather":
    return _all_gather(recipe, choice, x_GTD, mesh)
  rows, back = plan.dispatch(x_GTD), lambda result: result
  if not alone:
    rows, back = _all_to_all(rows, recipe, x_GTD.shape, mesh)
  rows = rows.replace(x=checkpoint_name(rows.x, "sent"))
  return rows, lambda result: plan.combine(_back(back(result)))


def _back(rows):
  return rows.replace(x=checkpoint_name(rows.x, "rows_back"))


def buffer_rows(recipe, tokens: int, groups: int, devices: int) -> int:
  """Rows that a device has room for, the same with both exchanges.

  No device can get more, so nothing is dropped for want of them. With n
  devices along the expert axis, g groups on each, e of E experts and b of all
  buckets on a device, they are

    n g e slots                   with the dispatchers einsum and gather,
    n g T min(K, e)               with sorted, dropless,
    n g min(T min(K, e), b slots) with sorted, bounded.

  Args:
    recipe: `layer.Recipe` with its bound, whose router makes `TokenChoice`s.
    tokens: T, of a group.
    groups: g, of one device.
    devices: n, which divides the experts and the buckets.
  """
  share = _share(recipe, devices)
  if not recipe.dispatcher.ragged:
    return devices * groups * share.num_experts * share.bound.slots
  top_k = recipe.router.top_k or recipe.num_experts
  most = dispatchers.most_rows(tokens, top_k, share.num_experts, share.bound)
  return devices * groups * most


def _share(recipe, devices):
  """The recipe of one device's experts."""
  bound = recipe.bound
  if bound is not None:
    bound = bound._replace(expert_buckets=bound.expert_buckets // devices)
  num_experts = recipe.num_experts // devices
  return dataclasses.replace(recipe, num_experts=num_experts, bound=bound)


def _all_gather(recipe, choice, x_GTD, mesh):
  """`exchange` that sends tokens and their choices to all devices."""
  recipe = _share(recipe, mesh.shape["expert"])
  choice = _at_experts(choice, recipe.num_experts)
  plan = plans.make(choice, recipe, num_tokens=x_GTD.shape[1])
  x_GTD = jax.lax.all_gather(x_GTD, "expert", axis=0, tiled=True)
  rows = plan.dispatch(checkpoint_name(x_GTD, "sent"))

  def back(result):
    y_GTD = plan.combine(_back(result))
    return jax.lax.psum_scatter(y_GTD, "expert", tiled=True)

  return rows, back


def _at_experts(choice, num_experts):
  """The choice of all groups of the expert axis among this device's experts.

  Args:
    choice: of this device's groups, among all experts.
    num_experts: of this device.
  """

  def bring(name, x):
    axes = name.rpartition("_")[2]
    # The sum of gradients over the shards of F is taken before they are sent.
    x = parallel.vary(x, ("tensor",))
    if "E" in axes:
      split = 1 + axes.index("E")
      x = jax.lax.all_to_all(x, "expert", split, 0, tiled=True)
    else:
      x = jax.lax.all_gather(x, "expert", axis=0, tiled=True)
    return checkpoint_name(x, "sizes")

  arrays = {k: x for k, x in vars(choice).items() if isinstance(x, Array)}
  choice = choice.replace(**{k: bring(k, x) for k, x in arrays.items()})
  if not isinstance(choice, TokenChoice):
    return choice
  expert_TK = choice.expert_TK - jax.lax.axis_index("expert") * num_experts
  here_TK = (expert_TK >= 0) & (expert_TK < num_experts)
  return choice.replace(
    expert_TK=jnp.where(here_TK, expert_TK, 0),
    valid_TK=choice.valid_TK & here_TK,
  )


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
    part: of the parameters, "experts", "shared" or "latent".
    network: that has them.
  """
  weights = {k: w.astype(dtype) for k, w in params[part].items()}
  if specs is None:
    return weights
  slots = params.get(reduction.NAME) if part == "experts" else None

  def gather(name, w):
    w = parallel.vary(w, parallel.TOKENS)
    for dim, logical in enumerate(network.axes[name]):
      axes = specs[part][name][dim]
      if axes and parallel.RULES[logical] == parallel.STORED:
        w = jax.lax.all_gather(w, axes, axis=dim, tiled=True)
    if slots is not None:
      w = reduction.to_slot(w, slots[name])
    return once(w) if name in network.added_once else w

  return {k: gather(k, w) for k, w in weights.items()}


def once(w):
  """The parameter w on the first shard of F and zero on the others.

  Every shard adds it to its part of a sum over F, which must count it once.

  Args:
    w: a parameter, inside of shard_map.
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
  # A router splits the same keys: experts fold in a number of their own.
  rng_G = jax.vmap(lambda rng: jax.random.fold_in(rng, _EXPERTS))(rng_G)
  return jax.vmap(of_group, (0, None))(rng_G, first + jnp.arange(here))


def enter_tensor(x, mesh: Mesh | None):
  """x as each shard of F takes it; the transpose adds their gradients, once.

  Args:
    x: tokens, on every shard of F the same.
    mesh: see `layer.moe_ffn`.
  """
  return x if mesh is None else parallel.vary(x, ("tensor",))


def sum_tensor(y, mesh: Mesh | None):
  """Adds the shards of F.

  Args:
    y: this shard's part of the sum.
    mesh: see `layer.moe_ffn`.
  """
  return y if mesh is None else jax.lax.psum(y, "tensor")


def _all_to_all(rows, recipe, shape_GTD, mesh):
  """Rows at their experts' devices, and the function that brings them back."""
  if rows.tokens_per_expert_GE is None:
    return _fixed(rows)
  groups, tokens, _ = shape_GTD
  buffer = buffer_rows(recipe, tokens, groups, mesh.shape["expert"])
  return _ragged(rows, buffer, mesh)


def _fixed(rows):
  def move(rows, split, concat):
    x = jax.lax.all_to_all(rows.x, "expert", split, concat, tiled=True)
    return Rows(x)

  return move(rows, 1, 0), lambda result: move(result, 0, 1)


def _ragged(rows, buffer, mesh):
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

  XLA has no such collective for CPU, where all rows are gathered and the right ones
  kept.

  Args:
    x_ND: rows of this device.
    out_ND: the array that the result is written into.
    start: [devices], the first row of x for each device.
    send: [devices], how many rows go to each.
    start_there: [devices], where each places them in its output.
    receive: [devices], how many rows come from each.
    mesh: with the axis "expert".
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
