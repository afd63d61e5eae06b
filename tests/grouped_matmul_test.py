"""Grouped matrix products against numpy loops."""

import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from moe_jax import experts, grouped_matmul
from moe_jax.errors import ConfigError
from moe_jax.types import Rows

N, D, E, F = 13, 5, 4, 6
SIZES = [
  (4, 2, 3, 4),
  (0, 13, 0, 0),
  (13, 0, 0, 0),
  (0, 0, 0, 13),
  (0, 0, 0, 0),
  (1, 0, 1, 0),
  (0, 5, 0, 3),
  (3, 3, 3, 3),
]


def loops(x_ND, w_EDF, sizes, dy_NF):
  """y, dx and dw in float64, one row at a time."""
  x_ND, w_EDF, dy_NF = (np.float64(a) for a in (x_ND, w_EDF, dy_NF))
  y_NF = np.zeros((len(x_ND), w_EDF.shape[2]))
  dx_ND, dw_EDF = np.zeros_like(x_ND), np.zeros_like(w_EDF)
  row = 0
  for e, size in enumerate(sizes):
    for n in range(row, row + size):
      y_NF[n] = x_ND[n] @ w_EDF[e]
      dx_ND[n] = w_EDF[e] @ dy_NF[n]
      dw_EDF[e] += np.outer(x_ND[n], dy_NF[n])
    row += size
  return y_NF, dx_ND, dw_EDF


@functools.cache
def value_and_gradient(backend):
  @jax.jit
  def run(x_ND, w_EDF, sizes_E, dy_NF):
    y_NF, pull = jax.vjp(
      lambda x, w: grouped_matmul.grouped_matmul(
        x, w, sizes_E, backend=backend
      ),
      x_ND,
      w_EDF,
    )
    return y_NF, *pull(dy_NF)

  return lambda *args: jax.device_get(run(*args))


def random_inputs(seed, dtype, shape=(N, D, E, F)):
  rows, d, e, f = shape
  rng = np.random.default_rng(seed)
  shapes = (rows, d), (e, d, f), (rows, f)
  return [np.asarray(rng.normal(size=s), dtype) for s in shapes]


def check(backend, sizes, dtype, tolerance, shape=(N, D, E, F), seed=0):
  """Against the loops; NaN in the rows that belong to nobody."""
  x_ND, w_EDF, dy_NF = random_inputs(seed, dtype, shape)
  live = sum(sizes)
  x_ND[live:] = dy_NF[live:] = np.nan
  sizes_E = np.array(sizes, np.int32)
  got = value_and_gradient(backend)(x_ND, w_EDF, sizes_E, dy_NF)
  want = loops(x_ND, w_EDF, sizes, dy_NF)
  for mine, theirs in zip(got, want, strict=True):
    assert mine.dtype == dtype
    np.testing.assert_allclose(
      np.float64(mine), theirs, rtol=tolerance, atol=tolerance
    )
  y_NF, dx_ND, dw_EDF = got
  assert (y_NF[live:] == 0).all() and (dx_ND[live:] == 0).all()
  assert (dw_EDF[sizes_E == 0] == 0).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_against_loops(backend, dtype):
  tolerance = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}[dtype]
  for seed, sizes in enumerate(SIZES):
    check(backend, sizes, dtype, tolerance, seed=seed)
  rng = np.random.default_rng(0)
  for _ in range(20):
    cuts = np.sort(rng.integers(0, N + 1, E))
    check(backend, tuple(np.diff(cuts, prepend=0)), dtype, tolerance)


# Of (rows, E): one of each, more experts than rows, several chunks an expert.
LAYOUTS = [(1, 1), (7, 3), (5, 8), (64, 4), (300, 3), (257, 16)]


@functools.cache
def networks(layout, dtype, use_bias):
  """(jitted cpu, jitted reference, parameters) of an expert network."""
  rows, num_experts = layout
  built = [
    experts.build(6, "swiglu", use_bias, backend=b)
    for b in ("cpu", "reference")
  ]
  params = built[0].init(jax.random.key(rows), num_experts, D)
  if use_bias:
    params = jax.tree.map(lambda w: w + 0.1, params)

  def both(one, params, x_ND, sizes_E, dy_ND):
    def apply(params, x_ND):
      return one.apply(params, Rows(x_ND, sizes_E[None])).x

    y_ND, pull = jax.vjp(apply, params, x_ND)
    return y_ND, *pull(dy_ND)

  jitted = [jax.jit(functools.partial(both, one)) for one in built]
  return *jitted, jax.tree.map(lambda w: w.astype(dtype), params)


def drawn_sizes(rng, rows, num_experts):
  """Rows of each expert: anything, equal, all on one, or few experts at all."""
  kind = rng.integers(4)
  used = rows if rng.integers(2) else rng.integers(rows + 1)
  if kind == 0:
    cuts = np.sort(rng.integers(0, used + 1, num_experts - 1))
    return np.diff(cuts, prepend=0, append=used)
  share = np.zeros(num_experts)
  chosen = {1: num_experts, 2: 1, 3: -(-num_experts // 4)}[kind]
  share[rng.permutation(num_experts)[:chosen]] = 1 / chosen
  return rng.multinomial(used, share)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_network_in_one_loop(layout, use_bias):
  """As product by product, for 20 loads; NaN in the rows of nobody."""
  rows, num_experts = layout
  rng = np.random.default_rng(rows)
  for draw in range(20):
    dtype = (jnp.float32, jnp.bfloat16)[draw % 4 == 3]
    cpu, reference, params = networks(layout, dtype, use_bias)
    sizes_E = drawn_sizes(rng, rows, num_experts).astype(np.int32)
    x_ND, dy_ND = (
      np.asarray(rng.normal(size=(rows, D)), dtype) for _ in range(2)
    )
    x_ND[sizes_E.sum() :] = dy_ND[sizes_E.sum() :] = np.nan
    found = jax.device_get(cpu(params, x_ND, sizes_E, dy_ND))
    # The other one sums in float32, from the same rounded numbers.
    params, x_ND, dy_ND = jax.tree.map(
      lambda a: np.float32(np.nan_to_num(a)), (params, x_ND, dy_ND)
    )
    wanted = jax.device_get(reference(params, x_ND, sizes_E, dy_ND))
    tolerance = 1e-5 if dtype == jnp.float32 else 5e-2  # Sums cancel.
    for one, other in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
      one, other = np.float64(one), np.float64(other)
      scale = np.linalg.norm(other) + 1e-30
      assert np.linalg.norm(one - other) <= tolerance * scale
    y_ND, grads, dx_ND = found
    assert (y_ND[sizes_E.sum() :] == 0).all()
    assert (dx_ND[sizes_E.sum() :] == 0).all()
    for grad in grads.values():
      assert (grad[sizes_E == 0] == 0).all()
  assert cpu._cache_size() == 1, "compiled again for other loads"


def test_no_kernel_has_to_mind_the_other_rows(monkeypatch):
  """One that leaves NaN in rows of nobody, and reads all rows, still works."""

  def careless(x_ND, w_EDF, sizes_E):
    expert_N = jnp.repeat(jnp.arange(E), sizes_E, total_repeat_length=len(x_ND))
    y_NF = jnp.einsum("ND,NDF->NF", x_ND, w_EDF[expert_N])
    nobody = jnp.arange(len(x_ND)) >= sizes_E.sum()
    return jnp.where(nobody[:, None], jnp.nan, y_NF)

  name = f"{grouped_matmul.__name__}.careless"
  monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(matmul=careless))
  for sizes in SIZES:
    check("careless", sizes, jnp.float32, 1e-5)


def test_bfloat16_is_added_up_in_float32():
  """A sum of 512 numbers that bfloat16 would stop counting at 256."""
  rows, d = 8, 512
  x_ND, w_EDF = np.ones((rows, d)), np.ones((2, d, 3))
  y_NF = grouped_matmul.grouped_matmul(
    jnp.asarray(x_ND, jnp.bfloat16),
    jnp.asarray(w_EDF, jnp.bfloat16),
    jnp.array([3, 5]),
    backend="reference",
  )
  assert y_NF.dtype == jnp.bfloat16 and (y_NF == d).all()


def test_float64():
  x_ND, w_EDF, _ = random_inputs(0, np.float64)
  with jax.enable_x64(True):
    y_NF = jax.jit(grouped_matmul.grouped_matmul)(
      x_ND, w_EDF, np.array(SIZES[0], np.int32)
    )
    assert y_NF.dtype == np.float64
    want, _, _ = loops(x_ND, w_EDF, SIZES[0], np.zeros((N, F)))
    np.testing.assert_allclose(y_NF, want, rtol=1e-12, atol=1e-12)


def test_unknown_backend():
  grouped_matmul.check("reference")
  with pytest.raises(ConfigError, match='"referense".*mean "reference"'):
    grouped_matmul.check("referense")
  with pytest.raises(ConfigError, match='"referense".*mean "reference"'):
    experts.build(4, backend="referense")


def test_default_backends():
  for platform in ("cpu", "gpu", "tpu"):
    grouped_matmul.check(grouped_matmul.backend_for(platform))
  assert grouped_matmul.backend_for("tpu") == "tpu"
  assert "tpu" in grouped_matmul.UNCHECKED


@pytest.mark.parametrize(
  "sizes", [(100, 28, 0, 60), (0, 0, 0, 0), (0, 188, 0, 0)]
)
def test_tpu_kernel_in_the_interpreter(sizes):
  """The kernel that ships with jax, run without a TPU: rows not in tiles."""
  with pltpu.force_tpu_interpret_mode():
    check("tpu", sizes, jnp.float32, 1e-4, shape=(188, 128, 4, 256))


def test_tpu_needs_whole_lanes():
  with pytest.raises(ConfigError, match="divisible by 128, got 5"):
    grouped_matmul.grouped_matmul(
      *random_inputs(0, np.float32)[:2],
      np.array(SIZES[0], np.int32),
      backend="tpu",
    )
