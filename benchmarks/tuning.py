"""Times every kernel for GPUs, with several tiles, on the products of a shape.

The result is entries of moe_jax/moe/kernels/gpu/tiles.json.
"""

import concurrent.futures
import functools
import json
import sys
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.shapes import Shape
from moe_jax.moe.kernels import gpu

_THREADS = 8  # That compile at a time.
_LEAST_SECONDS = 0.02  # A timing takes as long; single calls are too short.
_MOST_CALLS = 20  # In one timing.


def products(shape: Shape) -> list[gpu.Product]:
  """The products of a layer of this shape in bfloat16, by matrix."""
  rows = shape.tokens * shape.top_k
  widths = shape.d_model, shape.d_expert
  return [
    gpu.Product(kind, rows, shape.num_experts, d, f, "bfloat16")
    for d, f in (widths, widths[::-1])
    for kind in gpu.ORDER
  ]


def candidates(product: gpu.Product, wrong=()) -> list[str]:
  """The kernels that can compute it; XLA's own only if there is no other."""
  refusal = lambda name: gpu.load(name).refusal(product, gpu.device())  # noqa: E731
  ready = [n for n in gpu.CANDIDATES[:-1] if n not in wrong and not refusal(n)]
  return ready or [gpu.CANDIDATES[-1]]


def entries(product: gpu.Product, wrong=(), rounds: int = 5) -> list[dict]:
  """The fastest tiles of each candidate, as entries of the table.

  Args:
    product: what is computed, with loads that a random router would give.
    wrong: candidates whose results are wrong.
    rounds: in each, all tiles of all candidates have their turn.
  """
  tried = [
    (name, tiles)
    for name in candidates(product, wrong)
    for tiles in gpu.load(name).tilings(product, gpu.device())
  ]
  args = operands(product)
  jobs = {
    n: functools.partial(_run, name, product.kind, tiles)
    for n, (name, tiles) in enumerate(tried)
  }
  ready = compiled({n: (f, args) for n, f in jobs.items()})
  seconds = {n: min(s) for n, s in interleaved(ready, rounds).items()}
  best = {}
  for n in sorted(seconds, key=seconds.get):
    best.setdefault(tried[n][0], (seconds[n], tried[n][1]))
  kind, rows, num_experts, d, f, _ = product
  return [
    {
      "product": kind,
      "rows": rows,
      "num_experts": num_experts,
      "d": d,
      "f": f,
      "candidate": name,
      "tiles": tiles,
      "milliseconds": round(1e3 * s, 4),
    }
    for name, (s, tiles) in best.items()
  ]


def operands(product: gpu.Product) -> tuple:
  """a, b and the loads of the experts."""
  rng = np.random.default_rng(0)
  loads_E = rng.multinomial(
    product.rows, np.full(product.num_experts, 1 / product.num_experts)
  )
  x, w, dy = (
    jax.random.normal(jax.random.key(n), shape, jnp.dtype(product.dtype))
    for n, shape in enumerate(
      (
        (product.rows, product.d),
        (product.num_experts, product.d, product.f),
        (product.rows, product.f),
      )
    )
  )
  a, b = {"y": (x, w), "dx": (dy, w), "dw": (x, dy)}[product.kind]
  return a, b, jnp.asarray(loads_E, jnp.int32)


def _run(name, kind, tiles, a, b, sizes_E):
  return gpu.load(name).run(kind, a, b, sizes_E, tiles)


def compiled(jobs: Mapping[object, tuple]) -> dict[object, Callable]:
  """{key: a call without arguments} of {key: (function, arguments)}.

  Compiles several at a time. What cannot be compiled, because it needs more
  memory than there is for instance, or its tiles do not fit, is said and is not
  in the result.
  """

  def make(key):
    function, args = jobs[key]
    try:
      return jax.jit(function).lower(*args).compile()
    except Exception as e:  # Of XLA, Pallas, Triton, or a candidate's refusal.
      print(f"{key}: {str(e)[:200]}", file=sys.stderr)
      return None

  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    made = dict(zip(jobs, pool.map(make, jobs)))
  return {
    key: functools.partial(program, *jobs[key][1])
    for key, program in made.items()
    if program is not None
  }


def interleaved(
  ready: Mapping[object, Callable], rounds: int
) -> dict[object, list[float]]:
  """Seconds of a call, round by round; all have their turn in each.

  A timing has as many calls, one after the other, as make it long enough. What
  does not run, for lack of memory for instance, is said and is not in the result.
  """
  calls, seconds = {}, {}
  for key, call in ready.items():
    try:
      _seconds(call, 1)  # The first call is cold.
      once = _seconds(call, 1)
    except jax.errors.JaxRuntimeError as e:
      print(f"{key}: {str(e)[:200]}", file=sys.stderr)
      continue
    calls[key] = min(_MOST_CALLS, 1 + int(_LEAST_SECONDS / once))
    seconds[key] = []
  for _ in range(rounds):
    for key, count in calls.items():
      seconds[key].append(_seconds(ready[key], count) / count)
  return seconds


def _seconds(call, count):
  started = time.perf_counter()
  for _ in range(count):
    last = call()  # Only the last result is kept.
  jax.block_until_ready(last)
  return time.perf_counter() - started


def merged(kind: str, new: list[dict]) -> str:
  """The text of tiles.json with the new entries of a kind of device."""
  keys = ("product", "rows", "num_experts", "d", "f", "candidate")
  key = lambda e: tuple(e[k] for k in keys)  # noqa: E731
  table = json.loads(gpu.TABLE.read_text())
  replaced = {key(e): e for e in (*table.get(kind, ()), *new)}
  table[kind] = list(replaced.values())
  devices = (
    f"  {json.dumps(name)}: [\n"
    + ",\n".join(f"    {json.dumps(e)}" for e in found)
    + "\n  ]"
    for name, found in table.items()
  )
  return "{\n" + ",\n".join(devices) + "\n}\n"
