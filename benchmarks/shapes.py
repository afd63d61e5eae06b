"""Shapes of layers that benchmarks measure, and names of ways to compute them."""

from collections.abc import Sequence
from typing import NamedTuple

from moe_jax.core.errors import ConfigError, did_you_mean


class Shape(NamedTuple):
  """D, F, E, K and T of a layer of SwiGLU experts."""

  d_model: int
  d_expert: int
  num_experts: int
  top_k: int
  tokens: int = 4096

  @property
  def flops(self) -> int:
    """FLOPs of the chosen experts' matrix products, forward."""
    return 6 * self.tokens * self.d_model * self.d_expert * self.top_k

  @property
  def router_flops(self) -> int:
    """FLOPs of the router's matrix product, forward."""
    return 2 * self.tokens * self.d_model * self.num_experts


SHAPES = {
  "S1": Shape(512, 1024, 16, 2),
  "S2": Shape(256, 1024, 64, 8),
  "S3": Shape(512, 1024, 8, 1),
  "S4": Shape(512, 1024, 64, 2),
  "S5": Shape(256, 512, 256, 8),
}
# The shapes that benchmarks.on_accelerator times: two of our own, a layer of two
# models, and one device's share of a third one's layer with 64 devices along `expert`,
# at 4096 tokens on each: 4 of 256 experts, and 32768 rows.
ACCELERATOR = {
  "A1": Shape(1024, 2048, 16, 2, 8192),
  "A2": Shape(1024, 512, 128, 8, 8192),
  "Mixtral 8x7B": Shape(4096, 14336, 8, 2, 8192),
  "Qwen3-30B-A3B": Shape(2048, 768, 128, 8, 8192),
  "DeepSeek-V3, 1 of 64": Shape(7168, 2048, 4, 1, 32768),
}
TOY = {"toy": Shape(32, 48, 4, 2, 96)}
DENSE = ("dense", "dense/cpu")
DROPLESS = ("sorted/cpu", "sorted/reference", "ragged_dot", "all experts")
DROPPING = (
  "gather, capacity 1.25",
  "einsum, capacity 1.25",
  "scatter, capacity 1.25",
)
NOT_ROUTED = ("experts alone, batched",)
ROWS = (*DROPLESS, *DROPPING, *NOT_ROUTED)  # The table's rows beside dense.
DIRECTIONS = ("forward", "forward_backward")


def check(names: list[str]) -> None:
  """Raises ConfigError unless there are all of these shapes."""
  for name in names:
    if name not in SHAPES:
      raise ConfigError(
        f'--shapes: there is no shape "{name}"' + did_you_mean(name, SHAPES)
      )


def check_layers(names: list[str], known: Sequence[str] = ROWS) -> None:
  """Raises ConfigError unless --only names lines of the table."""
  for name in names:
    if name not in known:
      raise ConfigError(
        f'--only: "{name}" is not in the table' + did_you_mean(name, known)
      )


def describe() -> str:
  """The shapes in words."""
  found = (f"{k}: {tuple(v[:4])}" for k, v in SHAPES.items())
  return f"{', '.join(found)} (D, F, E, K)"
