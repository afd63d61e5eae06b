"""Rows sorted by expert times the weights of their expert.

Several backends, one file each: `matmul(x, w, sizes)`, and `network` where it
can do better for a whole network than one product after the other.
"""

import importlib
import pkgutil

import jax
import jax.numpy as jnp

from moe_jax.core.linear import product
from moe_jax.core.options import word
from moe_jax.moe.types import Array

_DEFAULTS = {"cpu": "cpu", "gpu": "gpu", "tpu": "tpu"}
BACKENDS = tuple(m.name for m in pkgutil.iter_modules(__path__))


def backend_for(platform: str, wanted: str | None = None) -> str:
  """What is wanted, or else what a platform ("cpu", "gpu", "tpu") gets."""
  return wanted or _DEFAULTS.get(platform, "reference")


def is_checked(backend: str) -> bool:
  """Whether it declares over which mesh axes its result varies."""
  return getattr(_load(backend), "CHECKED", True)


def grouped_matmul(
  x_ND: Array,
  w_EDF: Array,
  tokens_per_expert_E: Array,
  *,
  backend: str | None = None,
) -> Array:
  """y[n] = x[n] @ w[expert of row n], accumulated in at least float32.

  Args:
    x_ND: rows sorted by expert.
    w_EDF: one matrix per expert.
    tokens_per_expert_E: int32 >= 0, whose sum is at most N.
    backend: a file of this folder; None: the default of jax's backend.

  Returns:
    y_NF in x's dtype. Rows beyond the sum give exactly zero output and
    receive exactly zero gradient, as does the matrix of an expert without
    rows.
  """
  backend = backend_for(jax.default_backend(), backend)
  matmul = _load(backend).matmul
  live = jnp.arange(x_ND.shape[0]) < tokens_per_expert_E.sum()
  x_ND = jnp.where(live[:, None], x_ND, 0)
  y_NF = matmul(x_ND, w_EDF, tokens_per_expert_E)
  return jnp.where(live[:, None], y_NF, 0)


def grouped_network(
  expert,
  params,
  x_ND: Array,
  tokens_per_expert_E: Array,
  *,
  backend: str | None = None,
) -> Array:
  """Each expert's network on its own rows.

  Args:
    expert: expert(linear, params, x), which works row by row and takes its
      products through `linear(params, name, x)`, see `linear`.
    params: {name: [E, ...]}.
    x_ND, tokens_per_expert_E, backend: as `grouped_matmul`.

  Returns:
    As `grouped_matmul`.
  """
  backend = backend_for(jax.default_backend(), backend)
  module = _load(backend)
  if hasattr(module, "network"):
    return module.network(expert, params, x_ND, tokens_per_expert_E)
  expert_N = jnp.repeat(
    jnp.arange(tokens_per_expert_E.size),
    tokens_per_expert_E,
    total_repeat_length=x_ND.shape[0],
  )

  def grouped(params, name, x_ND):
    y_NF = grouped_matmul(
      x_ND, params[name], tokens_per_expert_E, backend=backend
    )
    bias_EF = params.get(f"{name}_bias")
    return y_NF if bias_EF is None else y_NF + bias_EF[expert_N]

  y_ND = expert(grouped, params, x_ND)
  live = jnp.arange(x_ND.shape[0]) < tokens_per_expert_E.sum()
  return jnp.where(live[:, None], y_ND, 0)  # The bias is in all rows.


def linear(params, name: str, x: Array) -> Array:
  """x @ params[name] + params[name_bias], if there is one."""
  y = product(x, params[name])
  bias = params.get(f"{name}_bias")
  if bias is None:
    return y
  # Its rank is raised by hand, as tests forbid that it happens by itself.
  return y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)


def _load(backend):
  word(*BACKENDS).check(backend, "grouped_matmul")
  return importlib.import_module(f"{__name__}.{backend}")
