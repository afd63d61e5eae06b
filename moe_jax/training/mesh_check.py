"""Before step 0 on a mesh: does its layer compute what one device does?

One MoE layer with the run's own experts, K, capacity, groups and exchange, but
small D and F, is run sharded and, group by group, on one device.
"""

import dataclasses
import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import models
from moe_jax.core import parallel
from moe_jax.core.errors import RunError
from moe_jax.moe import layer, sharded
from moe_jax.moe.types import Side
from moe_jax.run import processes

_WIDTH = 64  # D and F, or what the mesh divides just above it.
# Relative to the norm of a leaf. Accelerators round products to 8 bits.
_TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 3e-2}
_ELSEWHERE = 3e-2


class Found(NamedTuple):
  """distance: the largest of all leaves, relative to their norms; leaf: its
  name; seconds: that it took."""

  distance: float
  leaf: str
  seconds: float


def check(
  model, length: int, dtype: str, mesh: jax.sharding.Mesh
) -> Found | None:
  """Compares output, statistics and gradients; None without MoE layers.

  Args:
    model: of the run; every recipe and grouping of its layers is checked.
    length: tokens of a sequence.
    dtype: of activations.
    mesh: from `parallel.make_mesh`.

  Raises:
    RunError: they differ by more than rounding does.
  """
  recipes = dict.fromkeys(
    (parts.recipe, parts.grouping) for parts in models.sublayers(model).values()
  )
  if not recipes:
    return None
  started = time.monotonic()
  distance, leaf = max(
    _compare(*_reduced(recipe, grouping, length, mesh), length, dtype, mesh)
    for recipe, grouping in recipes
  )
  found = Found(distance, leaf, time.monotonic() - started)
  most = _ELSEWHERE
  if parallel.platform(mesh) == "cpu":
    most = _TOLERANCE[dtype]
  if not all(d <= most for d in processes.gather(distance)):
    raise RunError(
      f"on the mesh {dict(mesh.shape)} the MoE layer is not the one of a single"
      f" device: {leaf} differs by {distance:.1e} of its norm, and rounding by"
      f" {most:.0e}; do not trust a run on it. Try another config.mesh,"
      " model.moe.grouped_matmul or dispatcher to see what is wrong, or set"
      " train.check_mesh = False to run all the same"
    )
  return found


def _compare(recipe, tokens, length, dtype, mesh):
  """(distance, leaf) between the layer on the mesh and on one device."""
  inputs = _inputs(recipe, tokens, length, jnp.dtype(dtype), mesh)
  alone = jax.device_get(_measure(_one_by_one(recipe), *inputs))
  shared = _measure(
    sharded.sharded(recipe, mesh), *_placed(inputs, recipe, mesh)
  )
  return _worst(shared, alone)


def _reduced(recipe, grouping, length, mesh):
  """The recipe with narrow experts, and the tokens of a group."""
  narrow = _width(mesh, "tensor")
  build = functools.partial(_rebuilt, narrow)
  recipe = dataclasses.replace(
    recipe,
    experts=build(recipe.experts),
    shared=recipe.shared and build(recipe.shared),
  )
  tokens, recipe = grouping.resolve(recipe, length, train=True)
  return recipe, tokens


def _rebuilt(width, network):
  """The same network with another hidden width, if it can be made of one."""
  return network.resized(width) if network.resized else network


def _width(mesh, axis):
  """The least multiple of the axis that is not below `_WIDTH`."""
  size = mesh.shape[axis]
  return -(-_WIDTH // size) * size


def _inputs(recipe, tokens, length, dtype, mesh):
  """(params, x_GTD, r_GTD, balance, side, rng_G), a group for each shard.

  Tokens and router are multiples of small powers of two, so that their
  products are exact: choices cannot differ by rounding.
  """
  groups = parallel.token_shards(mesh)
  width, rng = _width(mesh, "fsdp"), np.random.default_rng(0)
  keys = jax.random.split(jax.random.key(0), 3)
  params = {
    "router": recipe.router.init(keys[0], width, recipe.num_experts),
    "experts": recipe.experts.init(keys[1], recipe.num_experts, width),
  }
  if recipe.shared is not None:
    params["shared"] = recipe.shared.init(keys[2], width)
  params = jax.device_get(params)
  params["router"] = jax.tree.map(
    lambda w: (np.round(w * 2**9) / 2**9).astype(w.dtype), params["router"]
  )
  x_GTD = rng.integers(-4, 5, (groups, tokens, width)) / 8
  r_GTD = rng.normal(size=(groups, tokens, width))
  mask_GT = np.arange(tokens) < rng.integers(
    tokens // 2, tokens + 1, (groups, 1)
  )
  position_GT = np.broadcast_to(
    np.arange(tokens, dtype=np.int32) % length, mask_GT.shape
  )
  side = Side(mask_GT, {"token_id": position_GT % 2, "position": position_GT})
  balance = {label: b.init(recipe.num_experts) for label, b in recipe.balancers}
  rng_G = layer.group_keys(jax.random.key(1), groups)
  return (
    params,
    x_GTD.astype(dtype),
    r_GTD.astype(np.float32),
    jax.device_get(balance),
    side,
    rng_G,
  )


def _placed(inputs, recipe, mesh):
  """The inputs, each on the devices that hold it in a run."""
  params, x_GTD, r_GTD, balance, side, rng_G = inputs
  tokens, everywhere = jax.P(parallel.TOKENS), jax.P()

  def put(x, spec):
    sharding = jax.NamedSharding(mesh, spec)
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

  parts = {"experts": recipe.experts, "shared": recipe.shared}
  weights = {
    part: {
      k: put(
        w, parallel.spec(parts[part].axes[k]) if part in parts else everywhere
      )
      for k, w in leaves.items()
    }
    for part, leaves in params.items()
  }
  return (
    weights,
    put(x_GTD, tokens),
    put(r_GTD, tokens),
    jax.tree.map(lambda x: put(x, everywhere), balance),
    jax.tree.map(lambda x: put(x, tokens), side),
    jax.random.wrap_key_data(
      put(np.asarray(jax.random.key_data(rng_G)), tokens)
    ),
  )


def _one_by_one(recipe):
  """f(params, balance, x_GTD, side, rng_G) without a mesh, group by group."""

  def run(params, balance, x_GTD, side, rng_G):
    def group(one):
      x_1TD, side, rng_1 = jax.tree.map(lambda x: x[None], one)
      found = layer.moe_ffn(recipe, params, balance, x_1TD, side, rng_1)
      return jax.tree.map(lambda x: x[0], found)

    return jax.lax.map(group, (x_GTD, side, rng_G))

  return run


def _measure(run, params, x_GTD, r_GTD, balance, side, rng_G):
  """{"y", "stats", "gradients"} of a scalar that everything has a part in."""

  def scalar(params, x_GTD, r_GTD, balance, side, rng_G):
    y_GTD, stats, _ = run(params, balance, x_GTD, side, rng_G)
    total = (y_GTD * r_GTD).sum() + stats.z.sum() + (stats.prob_E**2).sum()
    return total / r_GTD.size, {"y": y_GTD, "stats": stats}

  gradient = jax.jit(
    jax.grad(scalar, (0, 1), has_aux=True), compiler_options=_quick()
  )
  of_params, found = gradient(params, x_GTD, r_GTD, balance, side, rng_G)
  return found | {"gradients": of_params}


def _quick():
  """Of a program that runs once; the same operations, in less time."""
  if jax.default_backend() != "cpu":
    return {}
  return {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
  }


def _worst(found, expected):
  """(distance, leaf) of what this process holds; integers must be equal."""
  worst = (0.0, "")
  flat = jax.tree_util.tree_leaves_with_path
  for (path, leaf), (_, want) in zip(flat(found), flat(expected), strict=True):
    want = np.asarray(want)
    exact = np.issubdtype(want.dtype, np.integer)
    norm = np.linalg.norm(want.astype(np.float64))
    for shard in leaf.addressable_shards:
      there = want[shard.index].astype(np.float64)
      off = np.linalg.norm(np.asarray(shard.data).astype(np.float64) - there)
      distance = float(off if exact else off / (norm or 1.0))
      if not np.isfinite(distance):  # Nothing is further.
        distance = np.inf
      if distance > worst[0]:
        worst = distance, jax.tree_util.keystr(path, simple=True, separator="/")
  return worst
