"""The share of one device in a published model, compiled for a TPU.

A layer of the device's local experts on one device, forward and backward, as
dropless and as slots at capacity 1. Operations are those of XLA's cost analysis,
in which a kernel counts for what it declares: 2 m k n of its static rows.
"""

import re

import jax
import numpy as np

from moe_jax.moe import kernels
from moe_jax.moe.kernels import tpu
from tests import aot

_USED = re.compile(
  r'"tpu_custom_call".*used_scoped_memory_configs":'
  r'\[\{"memory_space":"1","offset":"0","size":"(\d+)"'
)
DRAWS = 20  # Of random loads.


def report(mesh, share: aot.Share, dtype: str, kernel: str) -> str:
  """Lines that the compiler and the model of the kernel give."""
  rows = aot.ROWS * share.length * share.top_k
  ideal = 9 * 2 * rows * share.d_model * share.d_expert
  program = compiled(mesh, "dropless", share, dtype, grouped_matmul=kernel)
  slots = compiled(mesh, "slots", share, dtype)
  text, mine, theirs = program.as_text(), temporary(program), temporary(slots)
  lines = [
    f"{kernel}: {rows} rows of {dtype} on {mesh.devices.flat[0].device_kind}",
    f"  operations over ideal: {operations(program) / ideal:.4f}",
    f"  operations of slots over ideal: {operations(slots) / ideal:.4f}",
    f"  tpu_custom_call: {aot.kernels(text)}",
    f"  ragged-dot: {text.count('ragged-dot')}",
    f"  temporary MiB: {mine:.1f}",
    f"  temporary MiB of slots: {theirs:.1f}",
    f"  temporary over that of slots: {mine / theirs:.3f}",
  ]
  if kernel == "tpu":
    with jax.set_mesh(mesh):
      lines += products(share, rows, dtype)
      lines.append(f"  VMEM limit in MiB: {tpu.chip().vmem / 2**20:.1f}")
    used = max(map(int, _USED.findall(text)))
    lines.append(f"  VMEM used in MiB: {used / 2**20:.1f}")
  return "\n".join(lines)


def products(share, rows, dtype):
  """A line for each product of `up` and of `down`."""
  sizes = np.full(share.num_experts, rows // share.num_experts)
  widths = share.d_model, share.d_expert
  for name, pair in (("up", widths), ("down", widths[::-1])):
    works = kernels.estimate(sizes, rows, pair, dtype, backend="tpu")
    for of, work in works.items():
      yield _line(f"{name} {of}", work, sizes, rows)


def compiled(mesh, layout, share, dtype, **moe):
  model = aot.build(mesh, layout, dtype, share, **moe)
  _, gradient = aot.layer_programs(model, dtype, share, weights_in=dtype)
  return gradient[1].compile()


def temporary(program) -> float:
  """MiB of memory for what is neither input nor output."""
  return program.memory_analysis().temp_size_in_bytes / 2**20


def operations(program) -> float:
  return program.cost_analysis()["flops"]


def _line(name, work, sizes, rows):
  """A product: its tiles, and rows computed in vain over all rows."""
  rng = np.random.default_rng(0)
  tile, seen = work.tiles[0], work.rows
  drawn = np.mean(
    [
      tpu.visited(
        tile, rng.multinomial(rows, np.full(len(sizes), 1 / len(sizes)))
      )
      for _ in range(DRAWS)
    ]
  )
  return (
    f"  {name}: tiles {' x '.join(map(str, work.tiles))},"
    f" padding {seen / rows - 1:.3f} (random loads {drawn / rows - 1:.3f}),"
    f" traffic {work.traffic / 1e9:.2f} GB, VMEM {work.vmem / 2**20:.1f} MiB"
  )
