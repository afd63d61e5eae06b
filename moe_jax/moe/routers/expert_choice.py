"""Expert choice: every expert takes its C best tokens (2202.09368, 3.2).

  s = softmax(x W);  expert e takes its C = T K / E tokens with the largest s_te;  w = s

T are the tokens of a group that are no padding. Loads are equal by construction and
nothing is dropped; a token gets any number of experts, also none. The paper's capacity
factor c is `top_k` here, and the config's capacity_factor has no effect.

Later tokens decide about earlier ones. Training a decoder so leaks the next tokens:
decoders refuse it unless model.allow_noncausal is set; `expert_threshold` is
its causal relative.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from moe_jax.core.options import integer, word
from moe_jax.moe import scores
from moe_jax.moe.types import GIVEN, Router, Routing, SlotChoice

CONTRACT_OPTIONS = {"top_k": 2}
_ROUNDINGS = ("floor", "ceil", "round")  # Functions of NumPy and of jax.numpy.


def build(top_k: integer(1), rounding: word(*_ROUNDINGS) = "floor") -> Router:
  """A router in which experts choose tokens.

  Args:
    top_k: K, experts of a token on average.
    rounding: "floor", "ceil" or "round", of C, which is 1 at least; Soft MoE's
      experiments (2308.00951) have "round".
  """

  def slots_of(tokens, num_experts, numpy):
    rounded = getattr(numpy, rounding)(tokens * top_k / num_experts)
    return numpy.maximum(rounded, 1).astype(int)

  def route(params, x_TD, *, num_experts, select, side, rng):
    del select, rng  # A shift of all scores of an expert changes no choice.
    logits_TE = scores.logits(params, x_TD)
    prob_TE = jax.nn.softmax(logits_TE)
    slots = int(slots_of(x_TD.shape[0], num_experts, np))
    wanted_TE = jnp.where(side.mask_T[:, None], prob_TE, -jnp.inf)
    _, token_EC = jax.lax.top_k(jax.lax.stop_gradient(wanted_TE).T, slots)
    token_EC = checkpoint_name(token_EC, "expert")
    full = slots_of(side.mask_T.sum(), num_experts, jnp)
    choice = SlotChoice(
      token_EC=token_EC,
      weight_EC=jnp.take_along_axis(prob_TE.T, token_EC, axis=1),
      valid_EC=side.mask_T[token_EC] & (jnp.arange(slots) < full)[None, :],
    )
    return Routing(choice, prob_TE, logits_TE)

  return Router(
    *(scores.linear, scores.LINEAR_AXES, route),
    causal=False,
    fixed=False,
    average_k=float(top_k),
    form=SlotChoice,
    gives=GIVEN - {"token_choice", "selection", "loads"},
  )
