"""Soft MoE: every slot is a weighted mean of all tokens (2308.00951, 2.1).

X = x Phi; dispatch D = softmax of X over tokens, combine C = softmax of X over
slots; y = C f(D^T x). Nothing is dropped and nothing is chosen, but every token
sees every other, so it is not for decoders.
"""

import jax
import jax.numpy as jnp

from moe_jax.moe.types import Mixture, Router, Routing

CONTRACT_OPTIONS = {"top_k": 2}


def build(top_k: int) -> Router:
  """Args: top_k: slots of an expert."""

  def init(rng, d_model, num_experts):
    initializer = jax.nn.initializers.lecun_normal()
    kernel = initializer(rng, (d_model, num_experts * top_k))
    return {"kernel": kernel.reshape(d_model, num_experts, top_k)}

  def route(params, x_TD, *, num_experts, select, side, rng):
    del num_experts, select, rng
    dtype = jnp.promote_types(x_TD.dtype, jnp.float32)
    kernel_DEC = params["kernel"].astype(dtype)
    logits_TEC = jnp.einsum(
      "TD,DEC->TEC", x_TD.astype(dtype), kernel_DEC, precision="highest"
    )
    mask_T11 = side.mask_T[:, None, None]
    of_tokens_TEC = jnp.where(mask_T11, logits_TEC, jnp.finfo(dtype).min)
    dispatch_TEC = jax.nn.softmax(of_tokens_TEC, axis=0)
    combine_TEC = jax.nn.softmax(logits_TEC, axis=(1, 2))
    choice = Mixture(
      jnp.where(mask_T11, dispatch_TEC, 0), jnp.where(mask_T11, combine_TEC, 0)
    )
    return Routing(choice, prob_TE=combine_TEC.sum(-1))

  axes = {"kernel": ("embed", None, None)}
  return Router(
    *(init, axes, route),
    causal=False,
    fixed=False,
    average_k=float(top_k),
    form=Mixture,
  )
