"""Counts a layer's FLOPs and bytes sent per device, on 1 to 512 devices.

  python -m benchmarks.topologies --json=topologies.json --figure=topologies

Forward and backward of the layer with slots, compiled for so many virtual CPU
devices and not run. Every device has the same number of tokens. Nothing but the
gradients' sums grows with the number of devices: each collective is compared
with what the mathematics asks for.
"""

import functools
import json
import os
import sys
from typing import NamedTuple

from benchmarks import timing
from moe_jax.run import command

MESHES = {
  1: (1, 1, 1, 1),
  8: (1, 1, 8, 1),
  64: (1, 8, 8, 1),
  512: (8, 8, 8, 1),
}
AXES = ("data", "fsdp", "expert", "tensor")
_FLOAT = 4  # Bytes.


class Shape(NamedTuple):
  """A layer: D, F, E, K, C, tokens T of a group, and groups on a device.

  slots: C; None: no bound, which the dispatcher "sorted" alone does.
  exchange: see `exchange.KINDS` of moe_jax/moe.
  """

  d_model: int = 64
  d_expert: int = 128
  num_experts: int = 64
  top_k: int = 2
  slots: int | None = 20
  tokens: int = 512
  groups: int = 1
  exchange: str = "all_to_all"


def main(argv=None) -> int:
  """The command."""
  args = _arguments(argv)
  if args.child:
    sizes, shape = MESHES[args.devices[0]], Shape(exchange=args.exchange)
    print(json.dumps(measure(sizes, shape)))
    return 0
  rows = []
  for devices in args.devices:
    flags = f"--xla_force_host_platform_device_count={devices}"
    os.environ["XLA_FLAGS"] = flags  # The child process reads it.
    child = ["--child", f"--devices={devices}", f"--exchange={args.exchange}"]
    [found] = timing.processes("benchmarks.topologies", child, 1)
    rows += summarize(devices, found, Shape(exchange=args.exchange))
  os.environ.pop("XLA_FLAGS", None)
  print(table(rows))
  if args.json:
    timing.write(args.json, rows)
  if args.figure:
    draw(rows, args.figure)
  return 0


def measure(sizes: tuple[int, ...], shape: Shape) -> dict:
  """{"flops", "collectives": [(kind, axes, count, bytes)]} of a device."""
  from moe_jax.core import parallel
  from moe_jax.training.planning import hlo

  mesh = parallel.make_mesh(sizes)
  forward, gradient = lowered(mesh, shape)
  del forward
  compiled = gradient.compile()
  found = hlo.by_axes(hlo.collectives(compiled.as_text()), mesh)
  cost = compiled.cost_analysis()
  return {
    "flops": cost["flops"],
    "collectives": [
      (kind, axes, sent.count, sent.results)
      for (kind, axes), sent in found.items()
    ],
  }


def lowered(mesh, shape: Shape, dispatcher: str = "gather"):
  """(forward, forward and backward) of a layer, lowered for a mesh.

  Args:
    mesh: from `parallel.make_mesh`.
    shape: what each device has; K, E and so on of all.
    dispatcher: its name.
  """
  import jax
  import jax.numpy as jnp

  from moe_jax.core import parallel, registry
  from moe_jax.moe import experts, layer
  from moe_jax.moe.types import Bound, Side

  bound = shape.slots and Bound(shape.slots, shape.num_experts)
  recipe = layer.Recipe(
    num_experts=shape.num_experts,
    router=registry.load("routers", "top_k", top_k=shape.top_k),
    dispatcher=registry.load("dispatchers", dispatcher),
    experts=experts.build(shape.d_expert),
    bound=bound,
    exchange=shape.exchange,
  )
  run = functools.partial(layer.moe_ffn, recipe, mesh=mesh)
  tokens = jax.P(parallel.TOKENS)

  def shaped(shape, spec, dtype=jnp.float32):
    sharding = jax.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  init = functools.partial(
    recipe.experts.init, num_experts=shape.num_experts, d_model=shape.d_model
  )
  weights = jax.eval_shape(init, jax.random.key(0))
  params = {
    "router": {"kernel": shaped((shape.d_model, shape.num_experts), jax.P())},
    "experts": {
      k: shaped(w.shape, parallel.spec(recipe.experts.axes[k], w.shape, mesh))
      for k, w in weights.items()
    },
  }
  groups = shape.groups * parallel.token_shards(mesh)
  x_GTD = shaped((groups, shape.tokens, shape.d_model), tokens)
  side = Side(shaped((groups, shape.tokens), tokens, jnp.bool_))

  def forward(params, x_GTD, side):
    return run(params, {}, x_GTD, side, None)[0]

  def scalar(params, x_GTD, side):
    return (forward(params, x_GTD, side) ** 2).sum()

  args = params, x_GTD, side
  with jax.set_mesh(mesh):
    return (
      jax.jit(forward).lower(*args),
      jax.jit(jax.grad(scalar, (0, 1))).lower(*args),
    )


def expected(
  sizes: tuple[int, ...], shape: Shape
) -> dict[tuple[str, tuple[str, ...]], int]:
  """{(kind, axes): bytes of results} that forward and backward ask for.

  With g groups on a device, n devices along expert, and D, F and E over fsdp,
  tensor and expert:

    all-to-all over expert     4 g E C D: there and back, and both gradients
    or, for the exchange "all_gather",
    all-gather over expert     n g T (2 D + 2 K), and n g T K bytes: tokens,
                               gradients of results; the choice
    reduce-scatter over expert g T (2 D + K): results; gradients of tokens and
                               weights
    and for both
    all-gather over fsdp       3 e D f: gate, up, down
    reduce-scatter over fsdp   3 e d f: their gradients
    all-reduce over data       3 e d f: the same, d of D
    all-reduce over tokens     D E: the router's gradient
    all-reduce over tensor     g T (2 D + K): the output; tokens' and weights'
                               gradients

  A step does all of it in every layer and micro-batch. With
  `train.reduce_experts_once` the gradients over fsdp and data are sent once a step
  for every layer, and then reduce-scatter gives float32.

  Args:
    sizes: of the mesh.
    shape: of the layer.
  """
  size = dict(zip(AXES, sizes))
  width = shape.d_model // size["fsdp"]
  weights = 3 * shape.num_experts // size["expert"]
  weights *= shape.d_expert // size["tensor"]
  rows = shape.groups * shape.tokens
  tokens = tuple(axis for axis in AXES[:3] if size[axis] > 1)
  numbers = {
    **exchanged(rows, size["expert"], shape),
    ("all-gather", ("fsdp",)): weights * shape.d_model,
    ("reduce-scatter", ("fsdp",)): weights * width,
    ("all-reduce", ("data",)): weights * width,
    ("all-reduce", ("tensor",)): rows * (2 * shape.d_model + shape.top_k),
  }
  router = shape.d_model * shape.num_experts
  found = {k: n for k, n in numbers.items() if size[k[1][0]] > 1}
  if tokens:
    key = "all-reduce", tokens
    found[key] = found.get(key, 0) + router
  return {key: round(_FLOAT * n) for key, n in sorted(found.items())}


def exchanged(rows: int, devices: int, shape: Shape) -> dict:
  """The part of `expected` over the expert axis, in numbers of four bytes.

  Args:
    rows: tokens of a device.
    devices: along the expert axis.
    shape: of the layer.
  """
  if shape.exchange == "all_to_all":
    slots = shape.groups * shape.num_experts * shape.slots
    return {("all-to-all", ("expert",)): 4 * slots * shape.d_model}
  # Tokens and gradients; experts, their weights, and whether they are valid.
  gathered = 2 * shape.d_model + (2 + 1 / _FLOAT) * shape.top_k
  return {
    ("all-gather", ("expert",)): devices * rows * gathered,
    ("reduce-scatter", ("expert",)): rows * (2 * shape.d_model + shape.top_k),
  }


def summarize(devices: int, found: dict, shape: Shape) -> list[dict]:
  """A row per collective, and one without for a single device."""
  wanted = expected(MESHES[devices], shape)
  common = {
    "devices": devices,
    "mesh": ",".join(map(str, MESHES[devices])),
    "flops": found["flops"],
  }
  rows = [
    {
      **common,
      "kind": kind,
      "axes": " ".join(axes),
      "count": count,
      "bytes": size,
      "expected_bytes": wanted.pop((kind, tuple(axes)), 0),
    }
    for kind, axes, count, size in found["collectives"]
  ]
  for (kind, axes), size in wanted.items():
    missing = {"kind": kind, "axes": " ".join(axes), "count": 0, "bytes": 0}
    rows.append({**common, **missing, "expected_bytes": size})
  return rows or [common | {"kind": "none", "bytes": 0, "expected_bytes": 0}]


def table(rows: list[dict]) -> str:
  """The results as markdown."""
  of_one = next((r["flops"] for r in rows if r["devices"] == 1), None)
  lines = [
    "| devices | data, fsdp, expert, tensor | FLOPs of a device ÷ those of one"
    " | collective | over | how many | kB | kB expected |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    cells = (
      row["devices"],
      row["mesh"],
      f"{row['flops'] / of_one:.4f}" if of_one else "–",
      row["kind"],
      row.get("axes", ""),
      row.get("count", 0),
      f"{row['bytes'] / 1e3:.1f}",
      f"{row['expected_bytes'] / 1e3:.1f}",
    )
    lines.append(f"| {' | '.join(map(str, cells))} |")
  return "\n".join(lines) + "\n"


def draw(rows: list[dict], path) -> None:
  """Writes path.png and path.pdf: FLOPs and bytes of a device."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, (left, right) = plt.subplots(
    1, 2, figsize=(9, 3.2), layout="constrained"
  )
  flops = {row["devices"]: row["flops"] for row in rows}
  first = next(iter(flops.values()))
  left.plot([*flops], [f / first for f in flops.values()], "o-", color="black")
  left.set(ylabel="FLOPs of a device ÷ those of one", ylim=(0, 1.1))
  kinds = dict.fromkeys(row["kind"] for row in rows if row["bytes"])
  colors = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
  for kind, color in zip(kinds, colors):
    of_kind = [row for row in rows if row["kind"] == kind]
    sums = {row["devices"]: [0, 0] for row in of_kind}
    for row in of_kind:
      sums[row["devices"]][0] += row["bytes"]
      sums[row["devices"]][1] += row["expected_bytes"]
    measured, wanted = zip(*sums.values())
    right.plot([*sums], wanted, "-", color=color)
    right.plot([*sums], measured, "o", color=color, label=kind)
  right.set(ylabel="bytes of results on a device", yscale="log")
  right.legend(title="compiled; lines: formula", fontsize=8)
  for axes in (left, right):
    axes.set_xscale("log", base=2)
    axes.set(xlabel="devices", xticks=[*flops], xticklabels=[*flops])
  for kind, dated in (("png", {}), ("pdf", {"CreationDate": None})):
    name = path.with_name(f"{path.name}.{kind}")
    figure.savefig(name, dpi=150, metadata=dated)
  plt.close(figure)


def _arguments(argv):
  parser = timing.parser("topologies", __doc__)
  add = parser.add_argument
  add(
    "--devices",
    type=lambda text: [int(x) for x in text.split(",")],
    default=list(MESHES),
    help="of " + ", ".join(map(str, MESHES)),
  )
  kinds = ("all_to_all", "all_gather")
  add("--exchange", choices=kinds, default=kinds[0])
  add("--figure", type=timing.path, metavar="PATH", help="PATH.png, PATH.pdf")
  args = parser.parse_args(argv)
  if set(args.devices) - set(MESHES):
    parser.error(f"--devices are some of {', '.join(map(str, MESHES))}")
  return args


if __name__ == "__main__":
  command.run(lambda: main(sys.argv[1:]))
