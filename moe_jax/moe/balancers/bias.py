"""A bias for each expert that moves against its load error, and no loss.

  b += rate * sign(mean load - load), added to the scores for choosing only

That is auxiliary-loss-free balancing (Wang et al., 2408.15664, Algorithm 1). After
every step b moves against the load error e = (target - load) / mean load:

  rule = "sign"          b += rate sign(e), the rule of the paper and DeepSeek-V3
  rule = "proportional"  b += rate e (the paper's Table 3; LongCat-Flash, 2509.01322)
  rule = "pid"           b = rate * (sum of e) + gain e + damping * (change of e),
                         a controller; "proportional" is its first term

With form = "multiply" b begins at 1 and multiplies the scores (the paper's Table 4).
A load is an expert's assignments in one step; its target is the mean load, or its
share in `targets`.

It needs some hundred steps to settle (about the spread of the scores over the rate)
and is less apt for softmax scores of many experts, which are small and differ much.

The options of `build`:

  rate: the size of a step; 1e-3 in the paper for 40,000 steps.
  rule: "sign", "proportional" or "pid", see above.
  form: "add" b to the scores, or "multiply" the scores by it.
  gain: factor of the present error in the rule "pid".
  damping: factor of the error's change in the rule "pid".
  targets: blocks of neighbouring experts, (how many, the share of the assignments
    that they get together), for instance ((256, 0.75), (128, 0.25)); shares add up
    to 1, and no expert can have more than 1 / K. None: equal shares.
  centered: subtract the mean of b afterwards, which changes no choice of "add".
  freeze_after: no update from this step on (DeepSeek-V3's last tokens).
"""

import jax
import jax.numpy as jnp

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import integer, items, number, optional, word
from moe_jax.moe.types import Balancer

FORMS = {"add": jnp.add, "multiply": jnp.multiply}
# A factor above 1 moves a score below 0 the wrong way.
NEEDS = {"add": frozenset(), "multiply": frozenset({"score_range"})}


def build(
  rate: number(0),
  rule: word("sign", "proportional", "pid") = "sign",
  form: word(*FORMS) = "add",
  gain: number(0) = 0.0,
  damping: number(0) = 0.0,
  targets: optional(items(items((integer(1), number(0))), shortest=1)) = None,
  centered: bool = False,
  freeze_after: optional(integer(0)) = None,
) -> Balancer:
  """A balancer that shifts scores. The head of this file has all options."""
  share_E = _shares(targets)
  _check(rule, gain, damping, share_E)
  start = 0.0 if form == "add" else 1.0

  def init(num_experts):
    state = {"bias_E": jnp.full(num_experts, start)}
    if rule == "pid":
      zero_E = jnp.zeros(num_experts)
      state |= {"sum_E": zero_E, "error_E": zero_E}
    return state

  def update(state, stats, step):
    new = _moved(state, stats.count_E.sum((0, 1)))
    if centered:
      new["bias_E"] += start - new["bias_E"].mean()
    if freeze_after is None:
      return new
    frozen = step >= freeze_after
    return {k: jnp.where(frozen, state[k], x) for k, x in new.items()}

  def _moved(state, count_E):
    bias_E = state["bias_E"]
    if rule == "sign" and share_E is None:
      return {"bias_E": bias_E + rate * below_mean(count_E)}
    error_E = _error(count_E, share_E, bias_E.dtype)
    error_E = jnp.sign(error_E) if rule == "sign" else error_E
    if rule != "pid":
      return {"bias_E": bias_E + rate * error_E}
    sum_E = state["sum_E"] + error_E
    change_E = error_E - state["error_E"]
    bias_E = start + rate * sum_E + gain * error_E + damping * change_E
    return {"bias_E": bias_E, "sum_E": sum_E, "error_E": error_E}

  def select(state, score_TE, mask_T):
    del mask_T
    bias_1E = state["bias_E"].astype(score_TE.dtype)[None, :]
    return FORMS[form](score_TE, bias_1E)

  parts = dict(init=init, select=select, update=update, targets=share_E)
  return Balancer(**parts, needs=NEEDS[form])


def _shares(targets):
  """The share of each expert, from those of blocks."""
  if targets is None:
    return None
  return tuple(share / n for n, share in targets for _ in range(n))


def _check(rule, gain, damping, share_E):
  """Raises ConfigError for options that do not fit together."""
  used = [x for x in (gain, damping) if not isinstance(x, jax.Array) and x]
  if used and rule != "pid":
    raise ConfigError(
      f'gain and damping are of rule = "pid", not "{rule}"; set both to 0'
    )
  total = 1 if share_E is None else sum(share_E)
  if abs(total - 1) > 1e-6:
    raise ConfigError(f"the shares in targets add up to {total:g}, not 1")


def _error(count_E, share_E, dtype):
  """(target - load) / mean load; 0 without any load."""
  load_E = count_E.astype(dtype)
  mean = load_E.mean()
  goal_E = mean
  if share_E is not None:
    goal_E = jnp.asarray(share_E, dtype) * load_E.sum()
  return (goal_E - load_E) / jnp.maximum(mean, 1)


def below_mean(count_E):
  """sign(mean load - load): 0 at the exact mean, which floats may miss.

  Args:
    count_E: loads, exact for integers of any size.
  """
  if not jnp.issubdtype(count_E.dtype, jnp.integer):
    return jnp.sign(count_E.mean() - count_E)
  total, experts = count_E.sum(dtype=count_E.dtype), count_E.size
  mean, rest = total // experts, total % experts
  above_whole_mean = (count_E == mean) & (rest > 0)
  return jnp.where(above_whole_mean, 1, jnp.sign(mean - count_E))
