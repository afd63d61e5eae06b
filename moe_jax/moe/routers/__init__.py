"""Ways to choose the experts of every token, one file each."""

from moe_jax.moe.types import Router

PART = Router  # `build` of each file returns one.
