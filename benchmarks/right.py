"""Is what an accelerator computes right? Against float64 on the host.

Products of rows with their expert's matrix and both gradients, by each backend,
against numpy; and the whole layer, without a mesh and on one of one device, with
all that is sent, against the same layer on the CPU. In bfloat16 distances are up
to 2e-2 of an array's norm, in float32 up to 2e-3, as accelerators round float32
products too.
"""

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.core import parallel, registry
from moe_jax.core.errors import ConfigError
from moe_jax.moe import experts, kernels, layer, types

NEAR = {"bfloat16": 2e-2, "float32": 2e-3}
WIDTHS = ((64, 64), (128, 192), (320, 64), (96, 72))
_THREADS = 8
PLACES = [
  (dispatcher, on_mesh)
  for dispatcher in ("sorted", "gather")
  for on_mesh in (False, True)
]


def products(backend: str, cases: int) -> list[dict]:
  """Rows of the result for drawn dtypes, widths and loads.

  Args:
    backend: of kernels.BACKENDS. Cases that it refuses are left out.
    cases: how many are drawn; eight have each dtype with each width. Several are
      compiled at a time.
  """

  def case(seed):
    try:
      return verdict(f"{backend}: ", *product(backend, seed))
    except ConfigError as e:
      what = f"{backend}, case {seed}"
      return {"stage": "left out", "what": what, "why": str(e)}

  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return [*pool.map(case, range(cases))]


def whole_layer(backend: str, dispatcher: str, on_mesh: bool) -> dict:
  """A row of the result: outputs and gradients of the layer in bfloat16."""
  return verdict(f"{backend}: ", *compared_layer(dispatcher, backend, on_mesh))


def verdict(prefix, what, found, most) -> dict:
  """Whether all distances are near, as a row of the result."""
  found = [*found]
  return {
    "stage": "right",
    "what": prefix + what,
    "distance": max(found),
    "most": most,
    "passed": all(d <= most for d in found),  # Not of NaN.
  }


def one_product(linear, params, x):
  """A network that is one product."""
  return linear(params, "w", x)


def product(backend, seed):
  """y, dx and dw of a drawn case; what is beyond the sum is 0 exactly."""
  rng = np.random.default_rng(seed)
  dtype = list(NEAR)[seed % 2]
  d, f = WIDTHS[seed // 2 % len(WIDTHS)]
  sizes_E = rng.integers(1, 9, rng.integers(1, 9)) ** rng.integers(0, 4)
  sizes_E *= rng.random(len(sizes_E)) < 0.8
  rows = int(sizes_E.sum() + rng.integers(0, 20)) or 1
  shapes = (rows, d), (len(sizes_E), d, f), (rows, f)
  x, w, dy = (jnp.asarray(rng.normal(size=s), dtype) for s in shapes)

  @jax.jit
  def run(x, w, sizes_E, dy):
    y, pull = jax.vjp(
      lambda x, w: kernels.grouped_network(
        one_product, {"w": w}, x, sizes_E, backend=backend
      ),
      x,
      w,
    )
    return y, *pull(dy)

  got = run(x, w, jnp.asarray(sizes_E, jnp.int32), dy)
  x, w, dy = (np.float64(a) for a in (x, w, dy))
  y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
  ends = np.cumsum(sizes_E)
  for e, (start, end) in enumerate(zip(ends - sizes_E, ends)):
    part = slice(start, end)
    y[part], dx[part] = x[part] @ w[e], dy[part] @ w[e].T
    dw[e] = x[part].T @ dy[part]
  beyond = any(np.any(np.float64(a[sizes_E.sum() :])) for a in got[:2])
  empty = np.any(np.float64(got[2][sizes_E == 0]))
  what = f"{dtype} {d} x {f}, loads {sizes_E.tolist()} of {rows} rows"
  found = *distances(got, (y, dx, dw)), np.inf if beyond or empty else 0.0
  return what, found, NEAR[dtype]


def compared_layer(dispatcher, backend, on_mesh):
  """Outputs and gradients in bfloat16, against float64 on the host's CPU."""
  groups, tokens, d, num_experts = 4, 128, 128, 16
  keys = jax.random.split(jax.random.key(0), 4)

  def recipe(backend):
    return layer.Recipe(
      num_experts=num_experts,
      router=registry.load("routers", "top_k", top_k=2),
      dispatcher=registry.load("dispatchers", dispatcher),
      experts=experts.build(256, grouped_matmul=backend),
      bound=None if dispatcher == "sorted" else types.Bound(20, num_experts),
    )

  made = recipe(backend)
  params = {
    "router": made.router.init(keys[0], d, num_experts),
    "experts": made.experts.init(keys[1], num_experts, d),
  }
  # Exact in any arithmetic, so that no choice depends on rounding.
  params["router"] = jax.tree.map(
    lambda w: jnp.round(w * 64) / 64, params["router"]
  )
  x_GTD = jax.random.randint(keys[2], (groups, tokens, d), -4, 5) / 8
  r_GTD = jax.random.normal(keys[3], x_GTD.shape)
  params["experts"] = jax.tree.map(
    lambda w: w.astype(jnp.bfloat16), params["experts"]
  )
  side = types.Side(jnp.ones((groups, tokens), bool))

  def measure(run, params, x_GTD):
    def scalar(params, x_GTD):
      y_GTD = run(params, {}, x_GTD, side, None)[0]
      return (y_GTD * r_GTD).sum(), y_GTD

    gradient = jax.grad(scalar, (0, 1), has_aux=True)
    return jax.jit(gradient)(params, x_GTD)

  run = functools.partial(layer.moe_ffn, made)
  if on_mesh:
    mesh = parallel.make_mesh((1, 1, 1, 1), jax.devices()[:1])
    run = functools.partial(run, mesh=mesh)
  got = jax.device_get(measure(run, params, x_GTD.astype(jnp.bfloat16)))
  side, r_GTD, params, x_GTD = jax.device_get((side, r_GTD, params, x_GTD))
  with jax.default_device(jax.devices("cpu")[0]), jax.enable_x64(True):
    exact = jax.tree.map(lambda w: jnp.asarray(np.float64(w)), (params, x_GTD))
    on_host = functools.partial(layer.moe_ffn, recipe("reference"))
    want = jax.device_get(measure(on_host, *exact))
  what = f"layer, {dispatcher}, {'a mesh of one' if on_mesh else 'no mesh'}"
  found = distances(*map(jax.tree.leaves, (got, want)))
  return what, found, NEAR["bfloat16"]


def distances(got, want):
  """The distance of each pair, over the norm of the wanted array."""
  for one, other in zip(got, want, strict=True):
    one, other = np.float64(one), np.float64(other)
    norm = np.linalg.norm(other)
    yield float(np.linalg.norm(one - other) / (norm or 1.0))
