"""ReMoE's adaptive L1 term on the weights of the router `relu` (2412.14711).

  loss = c * sum_e f_e w_e / (tokens of the step)           (eq. 8 to 11)
  f_e = E / (experts * tokens) * number of tokens with a weight of e above 0
  c <- c * factor^sign(experts of a token - experts), after every step

w_e is the sum of the expert's weights. L1 makes weights zero, until a token has the
wanted number of experts on average; f puts more of it on experts with more tokens,
which balances loads. At f = 1 it is the plain L1 term of eq. 4, and so it is with
`balanced` = False. The published start is 1e-8 and the factor 1.2. The paper divides
by the number of MoE layers; include that factor in `start`.

Every layer has a coefficient of its own here and gets to the number by itself; in the
paper one coefficient moves with the mean over all layers.

At initialisation a token has about half of all experts, so that the first steps cost
that much: the first of the paper's three stages.
"""

import jax.numpy as jnp

from moe_jax.core.options import number
from moe_jax.moe.balancers import adaptive
from moe_jax.moe.types import Balancer, Mean

CONTRACT_OPTIONS = {"experts": 2.0}
CONTRACT_EXCEPTIONS = {
  "loss": "is of the weights, which have their own test",
  "uniform": "is of the weights, which have any size",
  "collapse": "is of the weights, which have any size",
}


def build(
  experts: number(above=0),
  start: number(above=0) = 1e-8,
  factor: number(above=1) = 1.2,
  balanced: bool = True,
  lowest: number(above=0) = 1e-12,
  highest: number(above=0) = 10.0,
) -> Balancer:
  """A balancer that brings the router `relu` to a number of experts per token.

  Args:
    experts: the number of experts that a token is to have on average.
    start: the coefficient at first.
    factor: by which the coefficient grows or shrinks in a step.
    balanced: whether terms are weighted by loads.
    lowest: the smallest coefficient.
    highest: the largest coefficient.

  Raises:
    ConfigError: `lowest` is above `highest`.
  """

  def loss(state, stats, so_far_E, router_params):
    del so_far_E, router_params
    weight_E = stats.weight_E.sum((0, 1))
    tokens = stats.tokens.sum().astype(weight_E.dtype)
    if balanced:
      load_E = stats.count_E.sum((0, 1)).astype(weight_E.dtype)
      wanted = experts * jnp.maximum(tokens, 1)
      weight_E *= len(load_E) * load_E / wanted
    return Mean(state["coefficient"] * weight_E.sum(), tokens)

  def update(state, stats, step):
    del step
    before = state["coefficient"]
    tokens = stats.tokens.sum().astype(before.dtype)
    mean = stats.count_E.sum().astype(before.dtype) / jnp.maximum(tokens, 1)
    after = adaptive.moved(before, mean - experts, factor, lowest, highest)
    return {"coefficient": jnp.where(tokens > 0, after, before)}

  return Balancer(
    init=adaptive.first(start, lowest, highest),
    loss=loss,
    update=update,
    per_token=lambda num_experts: experts,
    needs=frozenset({"weights"}),
  )
