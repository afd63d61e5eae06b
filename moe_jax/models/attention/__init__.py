"""Causal self-attention: grouped queries, or latent keys and values.

Training sees whole sequences. Generation passes a context with a cache, in
which keys and values of earlier calls are kept (linen collection `cache`).
"""

import flax.linen as nn

from moe_jax.models.attention import context, grouped, latent
from moe_jax.models.attention.options import OPTIONS, Options, read


def build(options: Options, mesh, name: str) -> nn.Module:
  """The module (x_BLD, Context) -> y_BLD with these options."""
  kind = latent.LatentAttention if options.kv_lora_rank else grouped.Attention
  return kind(options, mesh, name=name)


__all__ = ["OPTIONS", "Options", "build", "context", "read"]
