"""Products with weights: dense ones, and rows times those of their expert.

Rows are sorted by expert. There are several backends, each a file or a folder.
A backend has `matmul(x, w, sizes)`, where y[n] is x[n] times the matrix of row
n's expert, or `network`, which is `grouped_network` itself. If it computes more
rows than experts have, its `work` says how many, see `estimate`.
"""

import importlib
import pkgutil
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.core.options import word
from moe_jax.moe.kernels import gpu
from moe_jax.moe.types import Array

# "gpu" chooses among its candidates; "gpu:NAME" is a single candidate.
BACKENDS = (
  *(m.name for m in pkgutil.iter_modules(__path__)),
  *(f"gpu:{name}" for name in gpu.CANDIDATES),
)


def backend_for(platform: str, wanted: str | None = None) -> str:
  """Returns the wanted backend, or the default of a platform.

  Args:
    platform: "cpu", "gpu" or "tpu".
    wanted: one of `BACKENDS`, or None.
  """
  return wanted or (platform if platform in BACKENDS else "reference")


def is_checked(backend: str) -> bool:
  """Whether a backend declares the mesh axes over which its result varies."""
  return getattr(_load(backend), "CHECKED", True)


class Work(NamedTuple):
  """The cost of one grouped product on a device.

  rows: multiplied by a matrix, with those that fill up tiles or chunks.
  tiles: (rows, contraction, columns) of a tile; None: the kernel does not say.
  vmem: bytes of a TPU's vector memory, an upper bound; 0 elsewhere.
  traffic: bytes of memory read and written; 0: the kernel does not say.
  """

  rows: int
  tiles: tuple[int, int, int] | None = None
  vmem: int = 0
  traffic: float = 0


def estimate(
  tokens_per_expert: Sequence[int],
  rows: int,
  widths: tuple[int, int],
  dtype,
  *,
  backend: str,
) -> dict[str, Work]:
  """Returns the work of a product of rows and weights, and of its gradients.

  Args:
    tokens_per_expert: rows of each of the device's experts.
    rows: N, of the buffer that holds them.
    widths: (D, F) of the weights.
    dtype: of rows and weights.
    backend: a file of this folder. A TPU is that of `jax.set_mesh`.

  Returns:
    {"forward", "rows", "weights"}. A backend without `work` computes the rows
    of the experts and no others.
  """
  module = _load(backend)
  if hasattr(module, "work"):
    return module.work(tokens_per_expert, rows, widths, dtype)
  least = Work(sum(map(int, tokens_per_expert)))
  return dict.fromkeys(("forward", "rows", "weights"), least)


def chosen(backend: str) -> dict[str, str]:
  """Returns the candidates that a backend has used so far, by product."""
  name, _, candidate = backend.partition(":")
  return gpu.chosen(candidate or None) if name == "gpu" else {}


def grouped_network(
  expert, params, x_ND: Array, tokens_per_expert_E: Array, *, backend=None
) -> Array:
  """Runs each expert's network on its own rows.

  Products are accumulated in at least float32.

  Args:
    expert: expert(linear, params, x), which works row by row and takes its
      products through `linear(params, name, x)`, see `linear`.
    params: {name: [E, ...]}.
    x_ND: rows sorted by expert; or a tuple of the rows and of further inputs of
      `expert`, floats [N, ...].
    tokens_per_expert_E: int32 >= 0, whose sum is at most N.
    backend: one of BACKENDS; None: the default of jax's backend.

  Returns:
    Results in x's dtype. Rows beyond the sum give exactly zero output and
    receive exactly zero gradient, as do the weights of an expert without rows.
  """
  module = _load(backend_for(jax.default_backend(), backend))
  if hasattr(module, "network"):
    return module.network(expert, params, x_ND, tokens_per_expert_E)
  expert_N = jnp.repeat(
    jnp.arange(tokens_per_expert_E.size),
    tokens_per_expert_E,
    total_repeat_length=jax.tree.leaves(x_ND)[0].shape[0],
  )

  def grouped(params, name, x_ND):
    x_ND = _live(x_ND, tokens_per_expert_E)
    y_NF = module.matmul(x_ND, params[name], tokens_per_expert_E)
    y_NF = _live(y_NF, tokens_per_expert_E)
    bias_EF = params.get(f"{name}_bias")
    return y_NF if bias_EF is None else y_NF + bias_EF[expert_N]

  y_ND = expert(grouped, params, x_ND)
  return _live(y_ND, tokens_per_expert_E)  # The bias was added to all rows.


def _live(x_ND, tokens_per_expert_E):
  """Zero in the rows that belong to no expert."""
  live = jnp.arange(x_ND.shape[0]) < tokens_per_expert_E.sum()
  return jnp.where(live[:, None], x_ND, 0)


def linear(params, name: str, x: Array) -> Array:
  """Returns x @ params[name] + params[name_bias], if there is a bias.

  Args:
    params: {name: array} of one network.
    name: of the matrix.
    x: [..., inputs].
  """
  y = product(x, params[name])
  bias = params.get(f"{name}_bias")
  if bias is None:
    return y
  # The rank of the bias is raised here: tests forbid that jax promotes it.
  return y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)


def product(x: Array, w: Array, dtype=None) -> Array:
  """Returns x @ w, with all axes of x except the last joined to one.

  For the gradient of w, XLA on CPU would transpose x and dy in memory if they
  had more than two axes, which costs more than the products of a small layer.

  Args:
    x: [..., D].
    w: [D, ...].
    dtype: of the result, or None for that of the operands.

  Returns:
    [..., ...], the leading axes of x and then the other axes of w.
  """
  x_ND, w_DF = x.reshape(-1, x.shape[-1]), w.reshape(w.shape[0], -1)
  y_NF = jnp.matmul(x_ND, w_DF, preferred_element_type=dtype)
  return y_NF.reshape(*x.shape[:-1], *w.shape[1:])


def _load(backend):
  word(*BACKENDS).check(backend, "grouped_matmul")
  name, _, candidate = backend.partition(":")
  module = importlib.import_module(f"{__name__}.{name}")
  return module.only(candidate) if candidate else module
