"""Losses of whole devices: DeepSeekMoE's and DeepSeek-V2's (2401.06066, eq. 15 to 17).

Experts lie on D devices, E/D neighbours on each. Loads may differ inside of a
device, but not between devices:

  loss = coefficient * D * sum_d f_d P_d

  of = "assignments"  f_d: share of the assignments that go to the experts of d
  of = "tokens"       f_d: share of the (token, device) pairs, each counted once:
                      DeepSeek-V2's communication loss (2405.04434, eq. 29 to 31)
  P_d: the summed probability of its experts

It is 1 where devices are equal, and D/m where m of them share all. DeepSeek-V2 has
0.05 and 0.02 beside a `switch` loss of 0.003. DeepSeek-V2 divides by the M
devices that a token may have at most in the place of those that it has, so that its
loss is lower where tokens have fewer. The devices are a number of the config, not
those of the mesh, so that the loss is the same on every mesh.
"""

import jax
import jax.numpy as jnp

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import integer, number, word
from moe_jax.moe.balancers import switch
from moe_jax.moe.types import Balancer, Mean

CONTRACT_OPTIONS = {"coefficient": 1.0, "devices": 3}
CONTRACT_EXCEPTIONS = {"collapse": "is D/m over devices, not E/m over experts"}
SCOPES = {k: v for k, v in switch.SCOPES.items() if k != "global_batch"}


def build(
  coefficient: number(0),
  devices: integer(2),
  of: word("assignments", "tokens") = "assignments",
  scope: word(*SCOPES) = "sequence",
) -> Balancer:
  """A balancer with a load loss of blocks of experts.

  Args:
    coefficient: factor of the loss.
    devices: D; it divides E.
    of: "assignments" or "tokens", see the head of this file.
    scope: the tokens over which f and P are formed, as in `switch`. "tokens"
      has sums of whole groups only: with "sequence" it raises ConfigError.
  """
  if of == "tokens" and scope == "sequence":
    raise ConfigError('of = "tokens" knows no scope "sequence"; use "group"')

  def init(num_experts):
    if num_experts % devices:
      raise ConfigError(
        f"devices = {devices} of the balancer device does not divide num_experts ="
        f" {num_experts}"
      )
    return {}

  def of_devices(x_E):
    return x_E.reshape(*x_E.shape[:-1], devices, -1)

  def observe(state, routing, mask_T):
    del state
    choice, num_experts = routing.choice, routing.prob_TE.shape[-1]
    sent_TKE = jax.nn.one_hot(choice.expert_TK, num_experts, dtype=bool)
    sent_TE = (sent_TKE & choice.valid_TK[..., None]).any(1) & mask_T[:, None]
    # The tokens that are sent to each device.
    return {"sent": of_devices(sent_TE).any(-1).sum(0, dtype=jnp.int32)}

  def loss(state, stats, so_far_E, router_params):
    del state, so_far_E, router_params
    groups, counts = stats.groups_per_sequence, stats.count_E
    prob_E, tokens = stats.prob_E, stats.tokens
    counts_D = of_devices(counts).sum(-1)
    if of == "tokens":
      groups, counts_D = 1, stats.observed["sent"]
      prob_E = prob_E.sum(1, keepdims=True)
      tokens = tokens.sum(1, keepdims=True)
    prob_D = of_devices(prob_E).sum(-1)
    sums = (SCOPES[scope](x, groups) for x in (counts_D, prob_D, tokens))
    count_D, prob_D, tokens = sums
    value = switch.load_loss(count_D, prob_D)
    weight = tokens.astype(value.dtype)
    return Mean(coefficient * (value * weight).sum(), weight.sum())

  needs = frozenset({"networks", "prob_TE", "loads"})
  if of == "assignments":
    return Balancer(init=init, loss=loss, needs=needs)
  needs |= {"token_choice"}
  return Balancer(init=init, loss=loss, observe=observe, needs=needs)
