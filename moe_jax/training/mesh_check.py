"""Compares the layer on a mesh with one device, before the first step.

One MoE layer with the run's own experts, K, capacity, groups and exchange, but
small D and F, is run on the mesh and on one device.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import models
from moe_jax.core import parallel
from moe_jax.core.errors import RunError
from moe_jax.moe.linen import MoE
from moe_jax.run import processes

_WIDTH = 16  # D and F on each device that they are sharded over.
# Relative to the norm of a leaf. Accelerators round products to 8 bits.
_TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 3e-2}
_ELSEWHERE = 3e-2
# Compiler options for programs that run once, on CPU, to compile faster.
_QUICK = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}


class Difference(NamedTuple):
  """The largest difference of two trees.

  distance: of all leaves the largest, relative to the leaf's norm.
  leaf: its name.
  """

  distance: float
  leaf: str


def check(
  model, lengths: Mapping[str, int], dtype: str, mesh: jax.sharding.Mesh
) -> Difference | None:
  """Compares output, statistics and gradients on the mesh with one device.

  Args:
    model: of the run; every recipe and grouping of its layers is checked.
    lengths: of the task.
    dtype: of activations.
    mesh: from `parallel.make_mesh`.

  Returns:
    The largest `Difference`; None without MoE layers.

  Raises:
    RunError: they differ by more than rounding does.
  """
  recipes = dict.fromkeys(
    (parts.recipe, parts.grouping, lengths[parts.sequence])
    for parts in models.sublayers(model).values()
  )
  if not recipes:
    return None
  worst = max(_compare(*recipe, dtype, mesh) for recipe in recipes)
  on_cpu = parallel.platform(mesh) == "cpu"
  most = _TOLERANCE[dtype] if on_cpu else _ELSEWHERE
  if max(processes.gather(worst.distance)) > most:
    raise RunError(
      f"on the mesh {dict(mesh.shape)} the MoE layer is not the one of a single"
      f" device: {worst.leaf} differs by {worst.distance:.1e} of its norm, and"
      f" rounding by {most:.0e}; do not trust a run on it. Try another config.mesh,"
      " model.moe.grouped_matmul or dispatcher to see what is wrong, or set"
      " train.check_mesh = False to run all the same"
    )
  return worst


def _compare(recipe, grouping, length, dtype, mesh):
  """The `Difference` between the layer on the mesh and on one device."""
  width = _WIDTH * mesh.shape["tensor"]
  networks = {"experts": recipe.experts, "shared": recipe.shared}
  narrow = {
    name: network.resized(width)
    for name, network in networks.items()
    if network and network.resized
  }
  recipe = dataclasses.replace(recipe, **narrow)
  sequences = max(1, grouping.tokens(length) // length)  # Fills a group.
  batch = parallel.token_shards(mesh) * sequences
  shape = batch, length, _WIDTH * mesh.shape["fsdp"]
  inputs = _inputs(MoE(recipe, grouping), shape, dtype)
  here = _measure(MoE(recipe, grouping, mesh), inputs, mesh)
  alone = _measure(MoE(recipe, grouping), inputs, None)
  name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
  leaves = jax.tree.leaves_with_path(here), jax.tree.leaves(alone)
  distances = {
    name(path): _distance(x, want)
    for (path, x), want in zip(*leaves, strict=True)
  }
  leaf = max(distances, key=distances.get)
  return Difference(distances[leaf], leaf)


def _inputs(layer, shape, dtype):
  """(params, x_BLD, r_BLD, balance, mask_BL, features), as numpy arrays.

  Tokens and router are multiples of small powers of two, so that their
  products are exact: choices cannot differ by rounding.
  """
  rng, (batch, length, _) = np.random.default_rng(0), shape
  x_BLD = (rng.integers(-4, 5, shape) / 8).astype(jnp.dtype(dtype))
  r_BLD = rng.normal(size=shape).astype(np.float32)
  position_BL = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
  mask_BL = position_BL < rng.integers(length // 2, length + 1, (batch, 1))
  features = {"token_id": position_BL % 2, "position": position_BL}
  variables = jax.device_get(nn.unbox(layer.init(jax.random.key(0), x_BLD)))
  params = variables["params"]
  params["router"] = jax.tree.map(
    lambda w: (np.round(w * 2**9) / 2**9).astype(w.dtype), params["router"]
  )
  balance = variables.get("balance", {})
  return params, x_BLD, r_BLD, balance, mask_BL, features


def _measure(layer, inputs, mesh):
  """{"y", "stats", "gradients"} of a scalar that depends on all of them."""

  def scalar(params, x_BLD, r_BLD, balance, mask_BL, features):
    variables = {"params": params, "balance": balance}
    y_BLD, stats, _ = layer.apply(
      variables, x_BLD, mask_BL, features, jax.random.key(1), train=True
    )
    total = (y_BLD * r_BLD).sum() + stats.z.sum() + (stats.prob_E**2).sum()
    return total / r_BLD.size, {"y": y_BLD, "stats": stats}

  everywhere = None if mesh is None else jax.NamedSharding(mesh, jax.P())
  gradient = jax.jit(
    jax.grad(scalar, (0, 1), has_aux=True),
    in_shardings=everywhere,
    out_shardings=everywhere,
    compiler_options=_QUICK if jax.default_backend() == "cpu" else None,
  )
  of_params, outputs = gradient(*inputs)
  return jax.device_get(outputs | {"gradients": of_params})


def _distance(x, want):
  """The norm of a difference over the array's norm; integers must be equal."""
  exact = np.issubdtype(want.dtype, np.integer)
  x, want = np.float64(x), np.float64(want)
  norm = 1.0 if exact else np.linalg.norm(want) or 1.0
  distance = float(np.linalg.norm(x - want) / norm)
  return distance if np.isfinite(distance) else np.inf
