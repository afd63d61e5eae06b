"""Expert choice: every expert takes its C best tokens (2202.09368, 3.2).

S = softmax(x W) over experts; expert e takes the C = T K / E tokens with the
largest S_te and weighs them by it. Loads are equal by construction, a token
gets any number of experts, and later tokens decide about earlier ones, so it is
not for decoders.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.moe.types import Router, Routing, SlotChoice

CONTRACT_OPTIONS = {"top_k": 2}


def build(top_k: int) -> Router:
  """Args: top_k: K, experts of a token on average."""

  def init(rng, d_model, num_experts):
    initializer = jax.nn.initializers.lecun_normal()
    return {"kernel": initializer(rng, (d_model, num_experts))}

  def route(params, x_TD, *, num_experts, select, side, rng):
    del rng
    dtype = jnp.promote_types(x_TD.dtype, jnp.float32)
    kernel_DE = params["kernel"].astype(dtype)
    logits_TE = jnp.dot(x_TD.astype(dtype), kernel_DE, precision="highest")
    prob_TE = jax.nn.softmax(logits_TE)
    slots = max(1, x_TD.shape[0] * top_k // num_experts)
    wanted_TE = jnp.where(side.mask_T[:, None], select(prob_TE), -jnp.inf)
    _, token_EC = jax.lax.top_k(jax.lax.stop_gradient(wanted_TE).T, slots)
    token_EC = checkpoint_name(token_EC, "expert")
    choice = SlotChoice(
      token_EC=token_EC,
      weight_EC=jnp.take_along_axis(prob_TE.T, token_EC, axis=1),
      valid_EC=side.mask_T[token_EC],
    )
    return Routing(choice, prob_TE=prob_TE, logits_TE=logits_TE)

  axes = {"kernel": ("embed", None)}
  return Router(
    *(init, axes, route),
    causal=False,
    fixed=False,
    average_k=float(top_k),
    form=SlotChoice,
  )
