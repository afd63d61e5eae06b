"""Rows times the matrix of their expert on GPUs, each product by its own kernel.

A layer needs three products of every matrix: y = x w in the forward pass, and
dx = dy wᵀ and dw = xᵀ dy in the backward pass. The kernels that compute them
differ by several times in speed, and the fastest depends on the product and on
its shape. So a kernel is chosen for each product:

1. A candidate, which is a file of this folder, refuses the products that it
   cannot compute: because of the dtype, the widths, the device, or a package
   that is not installed.
2. tiles.json holds times that were measured, by kind of device. The fastest
   candidate at the nearest shape, among those that do not refuse, is taken with
   its tiles. The file's first entries are the measurements that tokamax 0.0.17
   ships; `python -m benchmarks.on_accelerator` measures new ones. No run
   measures anything.
3. Where no device like this one was measured, the first candidate in `ORDER` is
   taken, with the first of its tilings.

XLA's own ragged_dot computes all other products. It is right, but multiplies
all rows by every expert's matrix, and a notice says so.

A candidate has three functions:
  refusal(product, device) -> why it cannot compute the product, or None.
  tilings(product, device) -> the tiles worth trying, the usual ones first.
  run(kind, a, b, sizes_E, tiles) -> the product of a and b.
"""

import functools
import importlib
import json
import math
import pathlib
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from moe_jax.core.errors import ConfigError

CHECKED = False  # Some kernels do not declare their result's mesh axes.
CANDIDATES = ("mosaic", "triton", "pallas", "xla")
# {product: candidates, the first choice without measurements first}.
ORDER = {
  "y": CANDIDATES,
  "dx": CANDIDATES,
  "dw": ("triton", "pallas", "mosaic", "xla"),
}
HALVES = ("bfloat16", "float16")
# The times of this device are taken for all devices of compute capability 9.
_HOPPER = "NVIDIA H100 80GB HBM3"
TABLE = pathlib.Path(__file__).parent / "tiles.json"


class Product(NamedTuple):
  """A product of a layer.

  kind: "y", "dx" or "dw".
  rows: of x and dy.
  num_experts, d, f: E, D and F of w_EDF.
  dtype: of its operands.
  """

  kind: str
  rows: int
  num_experts: int
  d: int
  f: int
  dtype: str


class Choice(NamedTuple):
  """The candidate that computes a product, and its tiles."""

  candidate: str
  tiles: dict


_chosen: dict[tuple[Product, str | None], Choice] = {}
_wrong: set[str] = set()  # Candidates that are left out, see `leave_out`.
_said: set[str] = set()


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def matmul(x_ND, w_EDF, sizes_E, only: str | None = None):
  """Returns y_NF, where y[n] is x[n] times the matrix of row n's expert.

  Args:
    x_ND: rows sorted by expert; rows of no expert are finite, and so are their
      gradients dy.
    w_EDF: a matrix of each expert.
    sizes_E: rows of each expert.
    only: the single candidate to use; None: the best one.

  Raises:
    ConfigError: the candidate `only` refuses.
  """
  return compute("y", x_ND, w_EDF, sizes_E, w_EDF.shape[1:], only)


def _forward(x_ND, w_EDF, sizes_E, only):
  return matmul(x_ND, w_EDF, sizes_E, only), (x_ND, w_EDF, sizes_E)


def _backward(only, saved, dy_NF):
  x_ND, w_EDF, sizes_E = saved
  widths = w_EDF.shape[1:]
  dx_ND = compute("dx", dy_NF, w_EDF, sizes_E, widths, only)
  return dx_ND, compute("dw", x_ND, dy_NF, sizes_E, widths, only), None


matmul.defvjp(_forward, _backward)


def compute(kind: str, a, b, sizes_E, widths: tuple[int, int], only=None):
  """Computes "y" of (x, w), "dx" of (dy, w), or "dw" of (x, dy).

  Args:
    kind, a, b: which of the three, and its operands.
    sizes_E, only: as in `matmul`.
    widths: (D, F).
  """
  product = Product(kind, len(a), len(sizes_E), *widths, a.dtype.name)
  if product.rows == 0:
    only = "xla"
  choice = choose(product, only)
  return load(choice.candidate).run(kind, a, b, sizes_E, choice.tiles)


def only(candidate: str) -> types.SimpleNamespace:
  """Returns this backend with a single candidate."""
  return types.SimpleNamespace(
    matmul=lambda x, w, sizes: matmul(x, w, sizes, candidate), CHECKED=CHECKED
  )


def chosen(only: str | None = None) -> dict[str, str]:
  """Returns the candidates of this process, {product: candidate and tiles}.

  Args:
    only: as in `matmul`.
  """
  found = {p: c for (p, name), c in _chosen.items() if name == only}
  return {
    f"{_shape(p)}, {p.rows} rows": " ".join(
      (c.candidate, *(f"{k}={v}" for k, v in c.tiles.items()))
    )
    for p, c in found.items()
  }


def choose(product: Product, only: str | None = None) -> Choice:
  """Returns the candidate for a product, and its tiles: see the file's head.

  Args:
    product, only: the product; and as in `matmul`.
  """
  if (product, only) not in _chosen:
    _chosen[product, only] = _choose(product, only)
  return _chosen[product, only]


def _choose(product, only):
  names = (only,) if only else ORDER[product.kind]
  refusals = {name: load(name).refusal(product, device()) for name in names}
  if not only:
    refusals |= dict.fromkeys(_wrong & {*names}, "it was wrong on this device")
  ready = [name for name in names if refusals[name] is None]
  reasons = "; ".join(
    f"{name}: {refusals[name]}" for name in CANDIDATES if refusals.get(name)
  )
  if not ready:
    raise ConfigError(
      f'model.moe.grouped_matmul = "gpu:{only}" cannot compute'
      f" {_shape(product)}: {reasons}; set it to None"
    )
  if ready == ["xla"] and reasons and reasons not in _said:
    _said.add(reasons)
    logging.warning(
      "No kernel for GPUs computes %s (%s): XLA's ragged_dot is used instead,"
      " which multiplies all rows by every expert's matrix",
      _shape(product),
      reasons,
    )
  known = nearest(product, device(), ready)
  tilings = load(ready[0]).tilings(product, device())
  return known or Choice(ready[0], tilings[0])


def _shape(product):
  kind, _, num_experts, d, f, dtype = product
  return f"{kind} of {num_experts} matrices {d} x {f} in {dtype}"


def nearest(product: Product, device, ready: list[str]) -> Choice | None:
  """Returns the fastest entry of the table at the nearest measured shape.

  Args:
    product: to be computed.
    device: that computes it; for an unknown kind None is returned.
    ready: names of candidates that can compute it.
  """
  known = [
    entry
    for entry in _measured(device)
    if entry["product"] == product.kind and entry["candidate"] in ready
  ]
  if product.dtype not in HALVES or not known:
    return None

  def far(entry):
    rows = product.rows / product.num_experts
    pairs = (
      (rows, entry["rows"] / entry["num_experts"]),
      *((getattr(product, k), entry[k]) for k in ("num_experts", "d", "f")),
    )
    return sum(abs(math.log2(one / other)) for one, other in pairs)

  best = min(known, key=lambda e: (round(far(e), 6), e["milliseconds"]))
  return Choice(best["candidate"], best["tiles"])


def _measured(device):
  """The entries of this kind of device, and those that hold for it too."""
  kinds = {device.device_kind: None}
  if generation(device) == 9:
    kinds[_HOPPER] = None
  return [entry for kind in kinds for entry in table().get(kind, ())]


@functools.cache
def table() -> dict[str, list[dict]]:
  """Returns tiles.json; entries that a benchmark adds hold for its process."""
  return json.loads(TABLE.read_text())


def learn(kind: str, entries: list[dict]) -> None:
  """Adds measurements of a kind of device to this process's table.

  Args:
    kind, entries: of the device; as in tiles.json.
  """
  table().setdefault(kind, []).extend(entries)
  _chosen.clear()


def leave_out(candidate: str) -> None:
  """Takes a candidate that gave wrong results out of this process's choice."""
  _wrong.add(candidate)
  _chosen.clear()


def load(candidate: str):
  """Returns the module of a candidate."""
  return importlib.import_module(f"{__name__}.{candidate}")


def device() -> jax.Device:
  """Returns the device that products are chosen for: a run has one kind."""
  return jax.devices()[0]


def generation(device) -> int:
  """Returns the major compute capability: 9 of an H100; 0 if it has none."""
  major, _, _ = str(getattr(device, "compute_capability", 0)).partition(".")
  return int(major) if major.isdecimal() else 0  # AMD's GPUs have a name there.


def needs(
  product: Product,
  device,
  generations: range,
  dtypes: tuple[str, ...] = HALVES,
  multiple: int = 64,
) -> str | None:
  """Returns the reason why a kernel cannot compute a product, or None.

  Args:
    product, device: as in `refusal`.
    generations: major compute capabilities with the instructions it takes.
    dtypes: that it multiplies.
    multiple: a number that must divide D and F.
  """
  if generation(device) not in generations:
    return f"it does not run on {device.device_kind}"
  if product.dtype not in dtypes:
    return f"it does not multiply {product.dtype}"
  if product.d % multiple or product.f % multiple:
    return f"it multiplies widths divisible by {multiple}"
  return None


def whole_tiles(x, multiple: int = 64):
  """Returns rows, padded with zeros to a multiple of `multiple`.

  Args:
    x, multiple: the rows; and their number in a tile.
  """
  missing = -len(x) % multiple
  return jnp.pad(x, ((0, missing), (0, 0))) if missing else x
