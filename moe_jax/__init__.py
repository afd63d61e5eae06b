"""Mixture-of-Experts research in JAX.

moe_ffn   the layer, a pure function
Recipe    the parts that the layer is made of
MoE       the layer as a linen module
load      a router, balancer or dispatcher by its name
"""

import importlib

__version__ = "0.1.0"

_PLACES = {
  "moe_ffn": "moe_jax.moe.layer",
  "Recipe": "moe_jax.moe.layer",
  "MoE": "moe_jax.moe.linen",
  "load": "moe_jax.core.registry",
}


def __getattr__(name: str):
  """Imports jax only when the layer is asked for, so that commands are quick."""
  if name not in _PLACES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__():
  return sorted([*globals(), *_PLACES])
