"""Ways to keep experts equally loaded, one file each."""

from moe_jax.moe.types import Balancer

PART = Balancer  # `build` of each file returns one.
