"""Soft MoE: every slot is a weighted mean of all tokens (2308.00951, 2.1).

  X = x Phi;  D = softmax of X over tokens;  C = softmax over slots;  y = C f(D^T x)

D dispatches and C combines. With `normalize` x and the columns of Phi have length 1, and
Phi a learnt scale (2.3), which the paper needs for wide models.

Nothing is dropped and nothing is chosen. Every token sees every other, so it is not
for decoders, and a token's cost is that of its share of the slots.
"""

import jax
import jax.numpy as jnp

from moe_jax.core.options import integer, number
from moe_jax.moe import scores
from moe_jax.moe.types import Mixture, Router, Routing

CONTRACT_OPTIONS = {"top_k": 2}


def build(
  top_k: integer(1),
  normalize: bool = False,
  average: number(above=0) = 1.0,
) -> Router:
  """A router that mixes.

  Args:
    top_k: slots of an expert.
    normalize: give x and the columns of Phi length 1, and Phi a learnt scale.
    average: experts of a token that are counted as active: num_experts * top_k over
      the tokens of a group, which is 1 with as many slots as tokens.
  """

  def init(rng, d_model, num_experts):
    kernel = scores.linear(rng, d_model, num_experts * top_k)["kernel"]
    params = {"kernel": kernel.reshape(d_model, num_experts, top_k)}
    return params | ({"scale": jnp.ones(1)} if normalize else {})

  def route(params, x_TD, *, num_experts, select, side, rng):
    del num_experts, select, rng
    x_TD = scores.wide(x_TD)
    dtype = x_TD.dtype
    kernel_DEC = params["kernel"].astype(dtype)
    if normalize:
      x_TD, kernel_DEC = scores.unit(x_TD, -1), scores.unit(kernel_DEC, 0)
      kernel_DEC *= params["scale"].astype(dtype)[:, None, None]
    logits_TEC = jnp.einsum(
      "TD,DEC->TEC", x_TD, kernel_DEC, precision="highest"
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
    *(init, axes | ({"scale": (None,)} if normalize else {}), route),
    causal=False,
    fixed=False,
    average_k=average,
    form=Mixture,
    gives=frozenset({"prob_TE"}),
  )
