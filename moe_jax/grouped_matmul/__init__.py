"""Rows sorted by expert times the weights of their expert.

One function, several backends, one file each: `matmul(x, w, sizes)`.
"""

import importlib
import pkgutil

import jax
import jax.numpy as jnp

from moe_jax.errors import ConfigError, did_you_mean
from moe_jax.types import Array

_DEFAULTS = {"tpu": "tpu"}
# Kernels that do not declare over which mesh axes their result varies.
UNCHECKED = frozenset({"tpu"})


def backend_for(platform: str) -> str:
  """The backend that a platform ("cpu", "gpu", "tpu") gets by default."""
  return _DEFAULTS.get(platform, "reference")


def check(backend: str) -> None:
  """Raises ConfigError unless there is such a backend."""
  known = {m.name for m in pkgutil.iter_modules(__path__)}
  if backend not in known:
    raise ConfigError(
      f'there is no grouped_matmul backend "{backend}"'
      + did_you_mean(backend, known)
    )


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
  backend = backend or backend_for(jax.default_backend())
  matmul = _load(backend).matmul
  live = jnp.arange(x_ND.shape[0]) < tokens_per_expert_E.sum()
  x_ND = jnp.where(live[:, None], x_ND, 0)
  y_NF = matmul(x_ND, w_EDF, tokens_per_expert_E)
  return jnp.where(live[:, None], y_NF, 0)


def _load(backend):
  try:
    return importlib.import_module(f"{__name__}.{backend}")
  except ModuleNotFoundError:
    check(backend)
    raise
