"""A MoE layer beside a dense layer of the same active FLOPs, and beside peers.

  python -m benchmarks.moe_layer --shapes=S1,S2 --json=moe_layer.json

Every way of computing the layer (router, choice, sort and all) is timed in
turn in one process, forward alone and forward with all gradients, and divided
by the dense layer of that round; several processes give medians and an
interval. Dense is the faster of two: plain matrix products, and our loop over
experts with one expert.
"""

import argparse
import functools
import json
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

from benchmarks import peers
from experiments import intervals
from moe_jax import config as config_lib
from moe_jax.errors import ConfigError, did_you_mean

TOKENS = 4096


class Shape(NamedTuple):
  """Widths of a layer of SwiGLU experts."""

  d_model: int
  d_expert: int
  num_experts: int
  top_k: int

  @property
  def flops(self) -> int:
    """Of the chosen experts' matrix products, forward."""
    return 6 * TOKENS * self.d_model * self.d_expert * self.top_k


SHAPES = {
  "S1": Shape(512, 1024, 16, 2),
  "S2": Shape(256, 1024, 64, 8),
  "S3": Shape(512, 1024, 8, 1),
  "S4": Shape(512, 1024, 64, 2),
}
DENSE = ("dense", "dense/cpu")
DROPLESS = ("sorted/cpu", "sorted/reference", "ragged_dot", "all experts")
DROPPING = (
  "gather, capacity 1.25",
  "einsum, capacity 1.25",
  "scatter, capacity 1.25",
)
DIRECTIONS = ("forward", "forward_backward")
_SLOW = 5.0  # Times dense; what is slower gets one round.


def main(argv=None) -> int:
  """The command."""
  args = _arguments(argv)
  if args.child:
    found = measure(args.child, args.rounds, args.only)
    print(json.dumps(found))
    return 0
  rows = []
  for name in args.shapes:
    runs = [_child(name, args) for _ in range(args.processes)]
    rows += summarize(name, runs)
    print(table(rows, name), flush=True)
  if args.json:
    out = {"machine": machine(), "rows": rows}
    args.json.write_text(json.dumps(out, indent=2) + "\n")
  return 0


def machine() -> dict:
  """What the numbers are of."""
  import jax

  cpuinfo = pathlib.Path("/proc/cpuinfo")
  names = [
    line.partition(":")[2].strip()
    for line in (cpuinfo.read_text().splitlines() if cpuinfo.exists() else [])
    if line.startswith("model name")
  ]
  return {
    "processor": names[0] if names else platform.processor(),
    "cores": len(names),
    "backend": jax.default_backend(),
    "jax": jax.__version__,
    "python": platform.python_version(),
    "date": time.strftime("%Y-%m-%d"),
  }


def summarize(shape: str, runs: list[dict]) -> list[dict]:
  """A row per implementation: medians over processes, with their interval.

  Args:
    shape: name.
    runs: of each process, {implementation: {direction: seconds by round}}.
  """
  rows = []
  for name in runs[0]["seconds"]:
    row = {"shape": shape, "implementation": name}
    for direction in DIRECTIONS:
      ratios = [_ratio(run["seconds"], name, direction) for run in runs]
      best = [min(run["seconds"][name][direction]) for run in runs]
      row[f"{direction}_ratio"] = statistics.median(ratios)
      row[f"{direction}_ratio_interval"] = intervals.of(ratios).half
      row[f"{direction}_seconds"] = statistics.median(best)
    peak = statistics.median(run["matmul_flops_per_second"] for run in runs)
    rate = SHAPES[shape].flops / row["forward_seconds"]
    row["forward_of_matmul_peak"] = rate / peak
    row["processes"] = len(runs)
    rows.append(row)
  return rows


def _ratio(seconds, name, direction):
  """The median over rounds of its time over the faster dense one's."""
  dense = min(
    (seconds[d][direction] for d in DENSE if d in seconds),
    key=statistics.median,
  )
  pairs = zip(seconds[name][direction], dense)
  return statistics.median(one / other for one, other in pairs)


def table(rows: list[dict], shape: str) -> str:
  """The rows of a shape as markdown."""
  lines = [
    f"| {shape} | forward ÷ dense | forward+backward ÷ dense | of matmul peak |",
    "|---|---|---|---|",
  ]
  for row in rows:
    if row["shape"] != shape:
      continue
    cells = []
    for direction in DIRECTIONS:
      half = row[f"{direction}_ratio_interval"]
      spread = "" if half is None else f" ± {half:.2f}"
      cells.append(f"{row[f'{direction}_ratio']:.2f}{spread}")
    share = f"{100 * row['forward_of_matmul_peak']:.0f} %"
    lines.append(f"| {row['implementation']} | {' | '.join(cells)} | {share} |")
  return "\n".join(lines) + "\n"


def _child(shape, args):
  command = [sys.executable, "-m", "benchmarks.moe_layer", f"--child={shape}"]
  command.append(f"--rounds={args.rounds}")
  command += [f"--only={name}" for name in args.only or ()]
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
  return json.loads(done.stdout)


def measure(shape: str, rounds: int, only=None) -> dict:
  """Seconds of all implementations of a shape, interleaved, in this process.

  Args:
    shape: name.
    rounds: in each, every implementation runs once in each direction.
    only: names of implementations; None: all.
  """
  import jax

  named = implementations(SHAPES[shape])
  wanted = [n for n in named if not only or n in (*DENSE, *only)]
  ready, seconds = {}, {n: {d: [] for d in DIRECTIONS} for n in wanted}
  for name in wanted:
    ready[name] = _compiled(*named[name])
  dense = None
  for turn in range(rounds):
    for name in wanted:
      for direction in DIRECTIONS:
        found = seconds[name][direction]
        if turn and dense and min(found) > _SLOW * dense[direction]:
          continue
        started = time.perf_counter()
        jax.block_until_ready(ready[name][direction]())
        found.append(time.perf_counter() - started)
    dense = {d: min(seconds[DENSE[0]][d]) for d in DIRECTIONS}
  return {"seconds": seconds, "matmul_flops_per_second": _peak()}


def _compiled(layer, params, x_TD):
  """{direction: a function of nothing}, run once."""
  import jax

  dy_TD = jax.random.normal(jax.random.key(9), x_TD.shape)

  def both(params, x_TD, dy_TD):
    y_TD, pull = jax.vjp(layer, params, x_TD)
    return y_TD, pull(dy_TD)

  forward, both = jax.jit(layer), jax.jit(both)
  ready = {
    "forward": lambda: forward(params, x_TD),
    "forward_backward": lambda: both(params, x_TD, dy_TD),
  }
  jax.block_until_ready([run() for run in ready.values()])
  return ready


def _peak():
  """Operations a second of a large square product, the best of some."""
  import jax
  import jax.numpy as jnp

  size = 2048
  x = jax.random.normal(jax.random.key(0), (size, size))
  product = jax.jit(jnp.matmul)
  best = float("inf")
  for _ in range(8):
    started = time.perf_counter()
    jax.block_until_ready(product(x, x))
    best = min(best, time.perf_counter() - started)
  return 2 * size**3 / best


def implementations(shape: Shape, tokens_per_group: int = 1024) -> dict:
  """{name: (f(params, x_TD) -> y_TD, params, x_TD)}.

  Args:
    shape: of the layer.
    tokens_per_group: of the one-hot dispatcher, whose cost grows with it.
  """
  import jax

  rngs = jax.random.split(jax.random.key(0), 3)
  x_TD = jax.random.normal(rngs[0], (TOKENS, shape.d_model))
  experts = _experts(shape, "cpu").init(
    rngs[1], shape.num_experts, shape.d_model
  )
  router = _router(shape).init(rngs[2], shape.d_model, shape.num_experts)
  sparse = {"router": router, "experts": experts}
  wide = _dense(shape).init(rngs[1], shape.d_model)
  one = {k: w[None] for k, w in wide.items()}

  ours = functools.partial(_ours, shape)
  found = {
    "dense": (lambda p, x: _dense(shape).apply(p, x), wide),
    "dense/cpu": (functools.partial(_blocked, shape), one),
    "sorted/cpu": (ours("sorted", "cpu"), sparse),
    "sorted/reference": (ours("sorted", "reference"), sparse),
    "gather, capacity 1.25": (ours("gather", capacity=1.25), sparse),
    "einsum, capacity 1.25": (
      ours("einsum", capacity=1.25, tokens_per_group=tokens_per_group),
      sparse,
    ),
    "scatter, capacity 1.25": (
      functools.partial(peers.scatter, shape, 1.25),
      sparse,
    ),
    "ragged_dot": (functools.partial(peers.ragged_dot, shape), sparse),
    "all experts": (functools.partial(peers.all_experts, shape), sparse),
  }
  return {name: (f, params, x_TD) for name, (f, params) in found.items()}


def _router(shape):
  from moe_jax import registry

  return registry.load("routers", "top_k", top_k=shape.top_k)


def _experts(shape, backend):
  from moe_jax import experts

  return experts.build(shape.d_expert, backend=backend)


def _dense(shape):
  from moe_jax import experts

  return experts.dense(shape.top_k * shape.d_expert)


def _blocked(shape, params, x_TD):
  """The dense layer as one expert that all rows go to."""
  import jax.numpy as jnp

  from moe_jax import experts, types

  one = experts.build(shape.top_k * shape.d_expert, backend="cpu")
  rows = types.Rows(x_TD, jnp.array([[TOKENS]], jnp.int32))
  return one.apply(params, rows).x


def _ours(
  shape, dispatcher, backend=None, capacity=None, tokens_per_group=None
):
  """`moe_ffn`, with its statistics."""
  import jax.numpy as jnp

  from moe_jax import layer, registry, slots, types

  bound, tokens_per_group = None, tokens_per_group or TOKENS
  if capacity is not None:
    bound = slots.capacity(
      capacity, tokens_per_group, shape.top_k, shape.num_experts
    )
  recipe = layer.Recipe(
    num_experts=shape.num_experts,
    router=_router(shape),
    dispatcher=registry.load("dispatchers", dispatcher),
    experts=_experts(shape, backend),
    bound=bound,
  )
  groups = TOKENS // tokens_per_group

  def run(params, x_TD):
    x_GTD = x_TD.reshape(groups, tokens_per_group, -1)
    side = types.Side(jnp.ones(x_GTD.shape[:2], bool))
    y_GTD, _, _ = layer.moe_ffn(recipe, params, {}, x_GTD, side)
    return y_GTD.reshape(x_TD.shape)

  return run


def _arguments(argv):
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.moe_layer",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add(
    "--shapes",
    type=lambda text: text.split(","),
    default=list(SHAPES),
    help=", ".join(f"{k}: {tuple(v)}" for k, v in SHAPES.items())
    + " (D, F, E, K)",
  )
  add("--processes", type=config_lib.at_least_1, default=5)
  add("--rounds", type=config_lib.at_least_1, default=7, help="a process")
  add(
    "--only",
    action="append",
    metavar="NAME",
    help="a line of the table, besides dense; repeatable",
  )
  add("--json", type=pathlib.Path, metavar="PATH", help="also write it there")
  add("--child", help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  for name in args.shapes:
    if name not in SHAPES:
      raise ConfigError(
        f'--shapes: there is no shape "{name}"' + did_you_mean(name, SHAPES)
      )
  for name in args.only or ():
    if name not in (*DROPLESS, *DROPPING):
      known = (*DROPLESS, *DROPPING)
      raise ConfigError(
        f'--only: "{name}" is not in the table' + did_you_mean(name, known)
      )
  return args


if __name__ == "__main__":
  config_lib.run(lambda: main(sys.argv[1:]))
