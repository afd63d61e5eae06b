"""The layer compiled for a TPU that is not there, and its collectives.

Forward and gradient of the dispatcher `sorted`, with the megablox kernel and
the real `ragged_all_to_all`, as `models.build` sets them up for such a mesh.
Prints kind, mesh axes, count and bytes (of the results on one device) of all
collectives, those in loops as often as they run.

With --share it compiles what one device of a published model computes, as a layer
of its local experts, forward and backward, and prints operations, memory, and the
tiles of the products; see `tests.aot_share`.
"""

import argparse
import functools
import math
import os
import sys
import time
from typing import NamedTuple

# Each mesh is (data, fsdp, expert, tensor) of the four devices.
LAYOUTS = {
  "dropless": dict(capacity_factor=None),
  "bounded": dict(capacity_factor=1.25),
  "buckets": dict(capacity_factor=1.25, expert_buckets=4),
  "slots": dict(capacity_factor=1.0, dispatcher={"name": "gather"}),
}
LENGTH, ROWS, WIDTH, NUM_EXPERTS = 256, 8, 256, 8


class Share(NamedTuple):
  """The share of a device in a layer: E experts, of which each token takes K."""

  num_experts: int
  top_k: int
  d_model: int
  d_expert: int
  length: int  # Of ROWS sequences.


SMALL = Share(NUM_EXPERTS, 2, WIDTH, WIDTH, LENGTH)
SHARES = {
  "small": Share(4, 2, 256, 512, 256),
  "mixtral": Share(8, 2, 4096, 14_336, 512),
  # One of 64 devices with 4096 tokens each: 8 rows a token, on average.
  "deepseek_v3": Share(4, 2, 7168, 2048, 2048),
  # One of 2 devices: 512 rows for each of its experts.
  "qwen3_30b_a3b": Share(64, 8, 2048, 768, 512),
}


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m tests.aot",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--topology", default="v5p:2x2x1", help="default: %(default)s"
  )
  parser.add_argument(
    "--mesh",
    default="1,1,4,1",
    metavar="DATA,FSDP,EXPERT,TENSOR",
    help="default: %(default)s",
  )
  parser.add_argument("--layout", choices=LAYOUTS, default="dropless")
  parser.add_argument(
    "--exchange", choices=("all_to_all", "all_gather"), default="all_to_all"
  )
  parser.add_argument(
    "--dtype", choices=("bfloat16", "float32"), default="bfloat16"
  )
  parser.add_argument(
    "--step",
    action="store_true",
    help="a whole training step of a decoder instead of the layer",
  )
  parser.add_argument("--share", choices=SHARES)
  parser.add_argument(
    "--kernel", default="tpu", help="of --share: a file of moe_jax/moe/kernels"
  )
  args = parser.parse_args(argv)
  _no_hardware()
  from moe_jax.training.planning import hlo

  if args.share:
    from tests import aot_share

    mesh = topology_mesh(args.topology, (1, 1, 1, 1))
    print(aot_share.report(mesh, SHARES[args.share], args.dtype, args.kernel))
    return 0
  sizes = tuple(int(size) for size in args.mesh.split(","))
  mesh = topology_mesh(args.topology, sizes)
  model = build(mesh, args.layout, args.dtype, exchange=args.exchange)
  programs = step(model) if args.step else layer_programs(model, args.dtype)
  for name, lowered in programs:
    started = time.monotonic()
    text = lowered.compile().as_text()
    seconds = time.monotonic() - started
    print(
      f"{name}: {args.topology} mesh={sizes} {args.layout} {args.exchange}"
      f" {args.dtype}, compiled in {seconds:.0f} s"
    )
    print(f"  tpu_custom_call: {kernels(text)}")
    found = hlo.by_axes(hlo.collectives(text), mesh)
    for (kind, axes), sent in found.items():
      print(
        f"  {kind} over {' '.join(axes)}: {sent.count}, {sent.results} bytes"
      )
  return 0


def _no_hardware():
  """Set before jax is imported."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"
  os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
  os.environ["TPU_LOG_DIR"] = "disabled"


def topology_mesh(topology: str, sizes):
  from jax.experimental import topologies

  from moe_jax.core import parallel

  described = topologies.get_topology_desc(
    platform="tpu", topology_name=topology
  )
  devices = described.devices
  return parallel.make_mesh(sizes, devices[: math.prod(sizes)])


def build(mesh, layout: str, dtype: str, share: Share = SMALL, **moe):
  """A decoder for the mesh, from a config like any other."""
  from configs import base
  from moe_jax import models

  c = base.get_config().model
  c.update(
    d_model=share.d_model,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    dtype=dtype,
  )
  c.moe.dispatcher = {"name": "sorted"}
  c.moe.update(
    num_experts=share.num_experts,
    top_k=share.top_k,
    d_expert=share.d_expert,
    **LAYOUTS[layout],
    **moe,
  )
  c.moe.balancers = {"bias": {"name": "bias", "rate": 1e-3}}
  return models.build(c, vocab_size=256, mesh=mesh)


def layer_programs(model, dtype: str, share: Share = SMALL, weights_in=None):
  """(name, lowered) of the layer's forward pass and of its gradient.

  Args:
    model, dtype, share: see `build`.
    weights_in: the experts' dtype; None: that in which they are stored.
  """
  import jax
  import jax.numpy as jnp

  from moe_jax.core import parallel
  from moe_jax.moe import layer
  from moe_jax.moe.types import Side

  mesh, parts = model.arch.mesh, model.arch.layer("moe")
  groups = ROWS
  width, num_experts = share.d_model, share.num_experts
  tokens, recipe = parts.grouping.resolve(
    parts.recipe, share.length, train=True
  )
  run = functools.partial(layer.moe_ffn, recipe, mesh=mesh)

  def shaped(shape, dtype, spec):
    sharding = jax.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  def weights(part, dtype, *args):
    init = lambda rng: part.init(rng, *args)  # noqa: E731
    shapes = jax.eval_shape(init, jax.random.key(0))
    specs = {
      k: parallel.spec(part.axes[k], v.shape, mesh) for k, v in shapes.items()
    }
    return {
      k: shaped(v.shape, dtype or v.dtype, specs[k]) for k, v in shapes.items()
    }

  by_group = jax.P(parallel.TOKENS)
  args = (
    {
      "router": weights(recipe.router, None, width, num_experts),
      "experts": weights(recipe.experts, weights_in, num_experts, width),
    },
    shaped((groups, tokens, width), dtype, by_group),
    {"bias": {"bias_E": shaped((num_experts,), jnp.float32, jax.P())}},
    Side(shaped((groups, tokens), bool, by_group)),
  )

  def forward(params, x_GTD, balance, side):
    return run(params, balance, x_GTD, side, None)[:2]

  def scalar(*args):
    y_GTD, stats = forward(*args)
    return (y_GTD.astype(jnp.float32) ** 2).sum() + stats.z.sum()

  with jax.set_mesh(mesh):
    yield "forward", jax.jit(forward).lower(*args)
    yield "gradient", jax.jit(jax.grad(scalar, (0, 1))).lower(*args)


def step(model, seq_len: int = LENGTH, once: bool = False):
  """(name, lowered) of `train_step.train_step` with two micro-batches."""

  import jax
  import numpy as np
  from flax import linen as nn

  from configs import base
  from moe_jax.core import parallel
  from moe_jax.training import train_step
  from tests import small

  mesh = model.arch.mesh
  bytes_V = np.ones(model.arch.vocab_size, np.int32)
  config = base.get_config()
  config.train.update(num_steps=100, accumulation=2, reduce_experts_once=once)
  task = small.task(bytes_V, seq_len, mesh)
  init, run = small.training(config, model, task, mesh)
  boxed = jax.eval_shape(init, jax.random.key(0))
  state = jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding
    ),
    nn.unbox(boxed),
    train_step.shardings(boxed, mesh),
  )
  rows = jax.NamedSharding(mesh, jax.P(None, parallel.TOKENS))
  shape = (2, ROWS, seq_len)
  batch = {
    k: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
    for k, dtype in (("inputs", "int32"), ("targets", "int32"), ("mask", bool))
  }
  with jax.set_mesh(mesh):
    numbers = train_step.numbers(config, model)
    lowered = jax.jit(run, donate_argnums=0).lower(state, batch, numbers)
    yield "train step", lowered


def kernels(text: str) -> int:
  """The number of Pallas kernels in a program."""
  return text.count('custom_call_target="tpu_custom_call"')


if __name__ == "__main__":
  sys.exit(main())
