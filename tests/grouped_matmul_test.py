"""Grouped matrix products against numpy loops."""

import functools
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from moe_jax.core.errors import ConfigError
from moe_jax.moe import experts, kernels
from moe_jax.moe.kernels import tpu
from moe_jax.moe.types import Rows
from tests import tiers

N, D, E, F = 13, 5, 4, 6


def one_product(linear, params, x):
  return linear(params, "w", x)


def grouped_matmul(x_ND, w_EDF, sizes_E, backend):
  """y[n] = x[n] @ w[expert of row n]."""
  params = {"w": w_EDF}
  return kernels.grouped_network(
    one_product, params, x_ND, sizes_E, backend=backend
  )


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
      lambda x, w: grouped_matmul(x, w, sizes_E, backend),
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


# (rows, E, D, F): one of each, more experts than rows, odd widths, several
# chunks an expert.
LAYOUTS = [
  (1, 1, 5, 6),
  (7, 3, 3, 8),
  (5, 8, 16, 9),
  (64, 4, 5, 6),
  (300, 3, 33, 20),
  (257, 16, 8, 24),
]
BIASED = ["swiglu", "geglu", "gelu", "relu", "swiglu", "gelu"]
NETWORKS = [
  *(("cpu", layout, "swiglu", False) for layout in LAYOUTS),
  *(("cpu", layout, act, True) for layout, act in zip(LAYOUTS, BIASED)),
  ("reference", LAYOUTS[1], "swiglu", False),
  ("reference", LAYOUTS[3], "relu", True),
]
# All activations with biases, and the largest layout without.
QUICK = [*NETWORKS[6:10], NETWORKS[4], *NETWORKS[11:]]


def network(params, x_ND, sizes, dy_ND, activation):
  """y, gradients of the parameters and dx in float64, expert by expert."""
  acts = {
    "relu": lambda z: np.maximum(z, 0),
    "gelu": lambda z: (
      0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    ),
    "silu": lambda z: z / (1 + np.exp(-z)),
  }
  gated = activation in ("swiglu", "geglu")
  names = {"swiglu": "silu", "geglu": "gelu"}
  act = acts[names.get(activation, activation)]
  slope = lambda z: (act(z + 1e-6) - act(z - 1e-6)) / 2e-6  # noqa: E731
  y_ND, dx_ND = np.zeros_like(x_ND), np.zeros_like(x_ND)
  grads = {k: np.zeros_like(w) for k, w in params.items()}
  ends = np.cumsum(sizes)
  for e, (start, end) in enumerate(zip(ends - sizes, ends)):
    x, dy = x_ND[start:end], dy_ND[start:end]
    linear = lambda name, x, e=e: (  # noqa: E731
      x @ params[name][e] + params.get(f"{name}_bias", [0] * len(sizes))[e]
    )

    def back(name, x, dy, e=e):
      grads[name][e] = x.T @ dy
      if f"{name}_bias" in grads:
        grads[f"{name}_bias"][e] = dy.sum(0)
      return dy @ params[name][e].T

    z, up = linear("gate" if gated else "up", x), linear("up", x)
    factor = up if gated else 1
    y_ND[start:end] = linear("down", act(z) * factor)
    dh = back("down", act(z) * factor, dy)
    dx = back("gate" if gated else "up", x, dh * factor * slope(z))
    if gated:
      dx = dx + back("up", x, dh * act(z))
    dx_ND[start:end] = dx
  return y_ND, grads, dx_ND


def drawn_network(backend, layout, activation, use_bias):
  """(jitted value and gradients, parameters)."""
  rows, num_experts, d_model, d_expert = layout
  one = experts.build(d_expert, activation, use_bias, grouped_matmul=backend)
  params = one.init(jax.random.key(rows), num_experts, d_model)
  if use_bias:
    params = jax.tree.map(lambda w: w + 0.1, params)

  @jax.jit
  def both(params, x_ND, sizes_E, dy_ND):
    def apply(params, x_ND):
      return one.apply(params, Rows(x_ND, sizes_E[None]), None).x

    y_ND, pull = jax.vjp(apply, params, x_ND)
    return y_ND, *pull(dy_ND)

  return both, params


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


@pytest.mark.parametrize(
  "backend,layout,activation,use_bias",
  tiers.only(QUICK, NETWORKS, several=True),
)
def test_networks_against_numpy(backend, layout, activation, use_bias):
  """Compares 20 loads each; rows that no expert owns hold NaN."""
  rows, num_experts, d_model, _ = layout
  rng = np.random.default_rng(rows)
  both, params = drawn_network(backend, layout, activation, use_bias)
  for dtype, tolerance, draws in (
    (jnp.float32, 1e-5, 15),
    (jnp.bfloat16, 5e-2, 5),
  ):
    rounded = jax.tree.map(lambda w, d=dtype: w.astype(d), params)
    for _ in range(draws):
      sizes_E = drawn_sizes(rng, rows, num_experts).astype(np.int32)
      x_ND, dy_ND = (
        np.asarray(rng.normal(size=(rows, d_model)), dtype) for _ in range(2)
      )
      live = sizes_E.sum()
      x_ND[live:] = dy_ND[live:] = np.nan
      found = jax.device_get(both(rounded, x_ND, sizes_E, dy_ND))
      exact = lambda tree: jax.tree.map(  # noqa: E731
        lambda a: np.nan_to_num(np.float64(a)), tree
      )
      wanted = network(
        exact(rounded), exact(x_ND), sizes_E, exact(dy_ND), activation
      )
      for one, other in zip(
        *map(jax.tree.leaves, (found, wanted)), strict=True
      ):
        assert one.dtype == dtype
        distance = np.linalg.norm(np.float64(one) - other)
        assert distance <= tolerance * np.linalg.norm(other) + 1e-30
      y_ND, grads, dx_ND = found
      assert (y_ND[live:] == 0).all() and (dx_ND[live:] == 0).all()
      for grad in grads.values():
        assert (grad[sizes_E == 0] == 0).all()
  assert both._cache_size() == 2, "compiled again for other loads"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_rows_at_all(backend):
  both, params = drawn_network(backend, (0, 2, 4, 3), "swiglu", False)
  nothing_ND, sizes_E = jnp.zeros((0, 4)), jnp.zeros(2, jnp.int32)
  y_ND, grads, dx_ND = both(params, nothing_ND, sizes_E, nothing_ND)
  assert y_ND.shape == dx_ND.shape == (0, 4)
  assert all((grad == 0).all() for grad in grads.values())


def test_no_kernel_has_to_mind_the_other_rows(monkeypatch):
  """A kernel may read rows that no expert owns, and leave NaN in them."""

  def careless(x_ND, w_EDF, sizes_E):
    expert_N = jnp.repeat(jnp.arange(E), sizes_E, total_repeat_length=len(x_ND))
    y_NF = jnp.einsum("ND,NDF->NF", x_ND, w_EDF[expert_N])
    nobody = jnp.arange(len(x_ND)) >= sizes_E.sum()
    return jnp.where(nobody[:, None], jnp.nan, y_NF)

  name = f"{kernels.__name__}.careless"
  monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(matmul=careless))
  monkeypatch.setattr(kernels, "BACKENDS", (*kernels.BACKENDS, "careless"))
  for sizes in SIZES:
    check("careless", sizes, jnp.float32, 1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_bfloat16_is_added_up_in_float32(backend):
  """A sum of 512 numbers that bfloat16 would stop counting at 256."""
  rows, d = 8, 512
  x_ND, w_EDF = np.ones((rows, d)), np.ones((2, d, 3))
  y_NF = grouped_matmul(
    jnp.asarray(x_ND, jnp.bfloat16),
    jnp.asarray(w_EDF, jnp.bfloat16),
    jnp.array([3, 5]),
    backend=backend,
  )
  assert y_NF.dtype == jnp.bfloat16 and (y_NF == d).all()


def test_float64():
  x_ND, w_EDF, _ = random_inputs(0, np.float64)
  with jax.enable_x64(True):
    sizes_E = np.array(SIZES[0], np.int32)
    y_NF = jax.jit(functools.partial(grouped_matmul, backend=None))(
      x_ND, w_EDF, sizes_E
    )
    assert y_NF.dtype == np.float64
    want, _, _ = loops(x_ND, w_EDF, SIZES[0], np.zeros((N, F)))
    np.testing.assert_allclose(y_NF, want, rtol=1e-12, atol=1e-12)


def test_unknown_backend():
  assert kernels.is_checked("reference")
  with pytest.raises(ConfigError, match="'referense'.*mean \"reference\""):
    kernels.is_checked("referense")


def test_default_backends():
  found = {p: kernels.backend_for(p) for p in ("cpu", "gpu", "tpu")}
  assert found == {"cpu": "cpu", "gpu": "gpu", "tpu": "tpu"}
  assert kernels.backend_for("cpu", "reference") == "reference"
  assert kernels.backend_for("other") == "reference"
  checked = {b: kernels.is_checked(b) for b in ("cpu", "tpu")}
  assert checked == {"cpu": True, "tpu": False}


# (rows of experts, (rows, D, E, F), bytes of VMEM): odd widths and rows, in one
# tile or in many with a rest of each axis, rows of nobody, all rows on one expert.
ON_A_TPU = [
  ((100, 28, 0, 60), (188, 128, 4, 256), 2**24),
  ((0, 188, 0, 0), (188, 128, 4, 256), 2**24),
  ((0, 0, 0, 0), (188, 128, 4, 256), 2**24),
  ((3, 0, 41, 5), (77, 5, 4, 6), 2**24),
  ((130, 0, 200, 40), (400, 200, 4, 300), 2**20),
  ((256, 256), (512, 384, 2, 256), 2**20),
]


@pytest.mark.parametrize("sizes,shape,vmem", ON_A_TPU)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tpu_kernel_in_the_interpreter(sizes, shape, vmem, dtype, monkeypatch):
  """Without a TPU, in memory that holds NaN where nothing was written."""
  monkeypatch.setattr(tpu, "chip", lambda: tpu.Chip(vmem))
  value_and_gradient.cache_clear()
  tolerance = {jnp.float32: 1e-4, jnp.bfloat16: 2e-2}[dtype]
  with pltpu.force_tpu_interpret_mode():
    check("tpu", sizes, dtype, tolerance, shape=shape)


@pytest.mark.parametrize("activation,use_bias", [("swiglu", True)])
def test_network_with_the_tpu_kernel(activation, use_bias):
  both, params = drawn_network("tpu", (150, 3, 24, 40), activation, use_bias)
  rng = np.random.default_rng(0)
  x_ND, dy_ND = rng.normal(size=(2, 150, 24)).astype(np.float32)
  sizes_E = np.array([70, 0, 61], np.int32)
  with pltpu.force_tpu_interpret_mode():
    found = jax.device_get(both(params, x_ND, sizes_E, dy_ND))
  x_ND[131:] = dy_ND[131:] = 0
  wanted = network(
    jax.tree.map(np.float64, params), x_ND, sizes_E, dy_ND, activation
  )
  for mine, theirs in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
    distance = np.linalg.norm(mine - theirs)
    assert distance <= 1e-5 * np.linalg.norm(theirs)


def test_no_rows_on_a_tpu():
  with pltpu.force_tpu_interpret_mode():
    check("tpu", (0, 0), jnp.float32, 0.0, shape=(0, 8, 2, 4))


def test_other_floats_on_a_tpu_are_said_once(caplog):
  tpu._say_once.cache_clear()
  for seed in range(2):
    check("tpu", SIZES[0], np.float16, 2e-2, seed=seed)
  assert [r.getMessage() for r in caplog.records] == [
    "The TPU kernel for grouped products takes bfloat16 and float32, not"
    ' float16: the slower grouped_matmul = "reference" is used instead'
  ]


@pytest.mark.parametrize("chip", [tpu.Chip(), tpu.Chip(2**25, 1, 256)])
@pytest.mark.parametrize("per_expert", [512, 640, 1024, 8192])
@pytest.mark.parametrize(
  "e,d,f",
  [(8, 4096, 14_336), (4, 7168, 2048), (64, 2048, 768), (16, 2880, 2880)],
)
def test_tiles_of_published_shapes(chip, per_expert, e, d, f, monkeypatch):
  """They fit, leave no rest where lanes do not, and no padding at equal loads."""
  monkeypatch.setattr(tpu, "chip", lambda: chip)
  sizes = [per_expert] * e
  for dtype in (jnp.bfloat16, jnp.float32):
    for widths in ((d, f), (f, d)):
      works = kernels.estimate(sizes, sum(sizes), widths, dtype, backend="tpu")
      for work in works.values():
        assert work.vmem <= chip.vmem and work.rows == sum(sizes)
        least = (sum(sizes) * sum(widths) + e * d * f) * dtype.dtype.itemsize
        assert work.traffic >= least
      for work, (k, n) in zip(works.values(), (widths, widths[::-1], widths)):
        for tile, width in zip(work.tiles[1:], (k, n)):
          assert tile == width or tile % 128 == 0
          assert d == 2880 or width % tile == 0


def test_rows_that_a_tpu_visits():
  """A tile counts for each expert that has rows in it."""
  assert tpu.visited(128, [128, 256]) == 384
  assert tpu.visited(128, [100, 28, 0, 60]) == 3 * 128
  assert tpu.visited(128, [130, 0, 126]) == 3 * 128
  assert tpu.visited(128, [0, 0]) == 0
  rng = np.random.default_rng(0)
  for _ in range(20):
    sizes = rng.integers(0, 50, 5)
    expert_N = np.repeat(np.arange(5), sizes)
    tiles = {(n // 16, e) for n, e in enumerate(expert_N)}
    assert tpu.visited(16, sizes) == 16 * len(tiles)


def test_vmem_by_hand():
  """Two buffers of each block; sums, results and operands in float32."""
  product = tpu.Product(512, 1024, 512, 4, 2)
  t = tpu.Tiles(256, 512, 128)
  blocks = 2 * 2 * (256 * 512 + 512 * 128 + 256 * 128)
  flight = 8 * 256 * 128 + 256 * 512
  assert tpu.vmem(product, t) == blocks + flight + 2**17
  flight = 4 * 512 * 128 + 2 * (256 * 512 + 256 * 128)
  over_rows = product._replace(over_rows=True)
  assert tpu.vmem(over_rows, t) == blocks + flight + 2**17


def test_traffic_by_hand():
  """A block that a step needs again is not read again."""
  product = tpu.Product(512, 256, 384, 1, 2)
  # One tile for the contraction: each matrix once, the rows for each column tile.
  once = 2 * (3 * 512 * 256 + 256 * 384 + 512 * 384)
  assert tpu.traffic(product, tpu.Tiles(128, 256, 128)) == once
  # Two: matrices for each of the four row tiles.
  often = 2 * (3 * 512 * 256 + 4 * 256 * 384 + 512 * 384)
  assert tpu.traffic(product, tpu.Tiles(128, 128, 128)) == often
  over_rows = product._replace(over_rows=True)
  gradient = 2 * (3 * 512 * 256 + 2 * 512 * 384 + 256 * 384)
  assert tpu.traffic(over_rows, tpu.Tiles(128, 128, 128)) == gradient


def test_work_of_other_backends():
  """Chunks on CPU; a backend that says nothing computes the rows that there are."""
  estimate = functools.partial(
    kernels.estimate, widths=(4, 6), dtype=jnp.float32
  )
  sizes, rows = (64, 0, 60, 4), 256  # Chunks of 16, 32, 48, 64, ...
  works = estimate(sizes, rows, backend="cpu")
  assert {w.rows for w in works.values()} == {64 + 64 + 16}
  (work,) = set(estimate((1200, 0), 2400, backend="cpu").values())
  assert 1200 <= work.rows <= 1.05 * 1200
  assert set(estimate(sizes, rows, backend="reference").values()) == {
    kernels.Work(128)
  }
