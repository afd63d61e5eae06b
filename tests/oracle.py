"""A Mixture-of-Experts layer in numpy loops: what the fast code is judged by.

Written from the papers, in float64, one token, one choice and one expert at a
time. It is slow and obvious, and imports nothing of the package. A name ends
in the letters of its shape: G groups, T tokens of a group, S sequences of a
group, D model width, E experts, K experts per token, F expert hidden width.

  1701.06538  Shazeer et al., the sparsely-gated MoE layer
  2006.16668  Lepikhin et al., GShard
  2101.03961  Fedus et al., Switch Transformer
  2106.05974  Riquelme et al., V-MoE
  2202.08906  Zoph et al., ST-MoE
  2408.15664  Wang et al., auxiliary-loss-free load balancing
  2412.19437  DeepSeek-AI, DeepSeek-V3
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass
class Routed:
  """The router's decisions for the T tokens of one group.

  expert_TK: a token's experts, best first.
  weight_TK: their weights, also where valid_TK is False.
  valid_TK: False for padding and for a second expert that was not drawn.
  priority_TK: larger takes its slot earlier, or None.
  prob_TE: rows sum to 1. logits_TE: x @ kernel.
  apply_to: "output" or "input", what the weights multiply.
  """

  expert_TK: np.ndarray
  weight_TK: np.ndarray
  valid_TK: np.ndarray
  priority_TK: np.ndarray | None
  prob_TE: np.ndarray
  logits_TE: np.ndarray
  apply_to: str


def route(
  params,
  x_TD,
  mask_T,
  *,
  top_k,
  score="softmax",
  score_before_top_k=True,
  renormalize=True,
  scale=1.0,
  num_expert_groups=1,
  top_expert_groups=1,
  group_score="max",
  expert_group_mask="-inf",
  apply_to="output",
  priority="none",
  bias_E=None,
  second_draw_T=None,
):
  """Chooses top_k experts for each token of one group.

  Args:
    params: {"kernel": [D, E]}.
    x_TD: tokens.
    mask_T: False for padding.
    top_k: K, experts of a token.
    score: "softmax" (2101.03961 eq. 1), "sigmoid" (2412.19437 eq. 15) or
      "sqrt_softplus".
    score_before_top_k: choose by the scores over all E experts; False: choose
      by the logits and score the K chosen ones (2401.04088 sec. 2.1).
    renormalize: divide the K weights by their sum (2412.19437 eq. 13).
    scale: multiplies the weights last.
    num_expert_groups, top_expert_groups, group_score, expert_group_mask: see
      `best_experts`.
    apply_to: "output" or "input"; handed on to whoever runs the experts.
    priority: "score" gives all choices of a token its largest weight before
      renormalize and scale (batch prioritized routing, 2106.05974 sec. 4.1).
    bias_E: added for choosing only, never in the weights (2408.15664 eq. 3).
    second_draw_T: uniform draws in [0, 1): the second of two experts is used
      with probability 2 g2 / (g1 + g2) (2006.16668 Alg. 1). None: always.

  Returns:
    Routed.
  """
  kernel_DE = _float64(params["kernel"])
  x_TD = _float64(x_TD)
  T, E = len(x_TD), kernel_DE.shape[1]
  bias_E = np.zeros(E) if bias_E is None else _float64(bias_E)

  expert_TK = np.zeros((T, top_k), int)
  weight_TK = np.zeros((T, top_k))
  valid_TK = np.zeros((T, top_k), bool)
  priority_TK = np.zeros((T, top_k))
  prob_TE = np.zeros((T, E))
  logits_TE = np.zeros((T, E))

  for t in range(T):
    logits_E = x_TD[t] @ kernel_DE
    score_E = _scores(logits_E, score)
    expert_K = best_experts(
      (score_E if score_before_top_k else logits_E) + bias_E,
      top_k,
      num_expert_groups,
      top_expert_groups,
      group_score,
      expert_group_mask,
    )
    if score_before_top_k:
      gate_K = score_E[expert_K]
    else:
      gate_K = _scores(logits_E[expert_K], score)

    logits_TE[t] = logits_E
    prob_TE[t] = score_E / score_E.sum()
    expert_TK[t] = expert_K
    weight_TK[t] = scale * (gate_K / gate_K.sum() if renormalize else gate_K)
    priority_TK[t] = gate_K.max()
    valid_TK[t] = mask_T[t]
    if second_draw_T is not None:
      if top_k != 2:
        raise ValueError(f"second_draw_T needs top_k=2, got {top_k}")
      second = gate_K[1] / (gate_K[0] + gate_K[1])
      if not second_draw_T[t] < 2 * second:
        valid_TK[t, 1] = False

  if priority not in ("none", "score"):
    raise ValueError(f"priority={priority!r}")
  return Routed(
    expert_TK=expert_TK,
    weight_TK=weight_TK,
    valid_TK=valid_TK,
    priority_TK=priority_TK if priority == "score" else None,
    prob_TE=prob_TE,
    logits_TE=logits_TE,
    apply_to=apply_to,
  )


def best_experts(
  score_E,
  top_k,
  num_expert_groups=1,
  top_expert_groups=1,
  group_score="max",
  expert_group_mask="-inf",
):
  """The top_k best experts of the best groups; of equals the lower index.

  Group-limited routing, 2412.19437 sec. 2.1.2: experts stand in
  num_expert_groups contiguous groups; a group is as good as its best expert
  ("max") or its two best ones together ("sum_top_2"); outside the best
  top_expert_groups every score becomes -inf, or 0 ("zero"), which then beats
  a negative score of a group that was kept.
  """
  E = len(score_E)
  if E % num_expert_groups:
    raise ValueError(f"{E} experts in {num_expert_groups} equal groups")
  size = E // num_expert_groups
  if expert_group_mask == "-inf" and top_k > top_expert_groups * size:
    raise ValueError(f"top_k={top_k} of {top_expert_groups * size} experts")

  goodness = []
  for group in range(num_expert_groups):
    members = sorted(score_E[group * size : (group + 1) * size], reverse=True)
    goodness.append(sum(members[: {"max": 1, "sum_top_2": 2}[group_score]]))
  kept_groups = _best_first(goodness)[:top_expert_groups]

  masked_E = [float(s) for s in score_E]
  for e in range(E):
    if e // size not in kept_groups:
      masked_E[e] = {"-inf": -math.inf, "zero": 0.0}[expert_group_mask]
  return _best_first(masked_E)[:top_k]


def assign_slots(
  expert_TK, valid_TK, priority_TK, *, num_experts, bound, order="token"
):
  """Gives the assignments of one group their slots, until these run out.

  Token-major order ("token") goes token by token, a token's choices best
  first. Choice-major order ("choice") serves all first choices, then all
  second ones (2006.16668 Alg. 1; 2106.05974 Alg. 1). With priorities the
  tokens of higher priority come first, equal ones in token order
  (2106.05974 Alg. 2).

  Args:
    expert_TK, valid_TK, priority_TK: of Routed; priority_TK may be None.
    num_experts: E.
    bound: (slots, expert_buckets): that many contiguous buckets of equally
      many experts with so many slots each; None: no limit.
    order: "token" or "choice".

  Returns:
    slot_TK: rank in its bucket (bound None: in its expert) among the valid
      assignments, dropped ones included; -1 where not valid.
    kept_TK: whether it is valid and its slot exists.
  """
  T, K = np.shape(expert_TK)
  slots, buckets = (math.inf, num_experts) if bound is None else bound
  if num_experts % buckets:
    raise ValueError(f"{num_experts} experts in {buckets} equal buckets")

  def place_in_line(assignment):
    t, k = assignment
    first = 0 if priority_TK is None else -priority_TK[t][k]
    return {"token": (first, t, k), "choice": (k, first, t)}[order]

  line = [(t, k) for t in range(T) for k in range(K) if valid_TK[t][k]]
  line.sort(key=place_in_line)

  slot_TK = np.full((T, K), -1)
  kept_TK = np.zeros((T, K), bool)
  taken = [0] * buckets
  for t, k in line:
    bucket = expert_TK[t][k] // (num_experts // buckets)
    slot_TK[t, k] = taken[bucket]
    kept_TK[t, k] = taken[bucket] < slots
    taken[bucket] += 1
  return slot_TK, kept_TK


def experts(params, e, x_D, activation):
  """Expert e on one token.

  y = act(x up) down for "relu" and "gelu"; y = (act(x gate) * x up) down for
  "swiglu" (act = silu) and "geglu" (act = gelu), 2002.05202 eq. 5 and 6.

  Args:
    params: up [E, D, F], down [E, F, D], gate [E, D, F] if gated, and
      optionally gate_bias [E, F], up_bias [E, F], down_bias [E, D].
    e: which expert.
    x_D: the token.
    activation: "relu", "gelu", "swiglu" or "geglu".
  """
  return mlp({name: leaf[e] for name, leaf in params.items()}, x_D, activation)


def mlp(params, x_D, activation):
  """A dense network on one token: `experts` without the expert axis."""

  def project(name, value):
    out = value @ _float64(params[name])
    if name + "_bias" in params:
      out = out + _float64(params[name + "_bias"])
    return out

  up_F = project("up", _float64(x_D))
  if activation == "relu":
    hidden_F = np.maximum(up_F, 0)
  elif activation == "gelu":
    hidden_F = gelu(up_F)
  elif activation == "swiglu":
    hidden_F = silu(project("gate", _float64(x_D))) * up_F
  elif activation == "geglu":
    hidden_F = gelu(project("gate", _float64(x_D))) * up_F
  else:
    raise ValueError(f"activation={activation!r}")
  return project("down", hidden_F)


def gelu(x):
  """The tanh approximation, 1606.08415 sec. 2."""
  return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
  """x sigmoid(x)."""
  return x * _sigmoid(x)


def moe_layer(
  params,
  x_GTD,
  mask_GT,
  *,
  activation,
  sequences=1,
  bound=None,
  order="token",
  bias_E=None,
  second_draw_GT=None,
  **routing,
):
  """y = shared(x) + sum of weight * expert(x) over the choices with a slot.

  1701.06538 eq. 1, with shared experts as in 2401.06066 eq. 9. The input
  variant computes expert(weight * x). A dropped choice adds nothing. Padding
  is a token of zeros, gets the shared network alone, takes no slot and is
  counted nowhere.

  Args:
    params: {"router": {"kernel"}, "experts": see `experts`, and optionally
      "shared": see `mlp`}.
    x_GTD: tokens. Each group is routed and bounded on its own.
    mask_GT: False for padding.
    activation: see `experts`.
    sequences: S, equal contiguous parts of a group that are counted apart.
    bound, order: see `assign_slots`.
    bias_E: see `route`.
    second_draw_GT: see `route`.
    **routing: the other options of `route`.

  Returns:
    y_GTD, and the statistics as a dict of sums with leading axes [G, S]:
    tokens, count_E, first_choice_E, prob_E, weight_E, kept_E, dropped
    ({"capacity", "buffer", "unrouted"}), z, entropy, confidence.
  """
  x_GTD = _float64(x_GTD) * _float64(mask_GT)[..., None]
  G, T, _ = x_GTD.shape
  E = np.shape(params["router"]["kernel"])[1]
  if T % sequences:
    raise ValueError(f"{T} tokens in {sequences} equal sequences")
  y_GTD = np.zeros_like(x_GTD)
  stats = _empty_stats(G, sequences, E)

  for g in range(G):
    draw_T = None if second_draw_GT is None else second_draw_GT[g]
    routed = route(
      params["router"],
      x_GTD[g],
      mask_GT[g],
      bias_E=bias_E,
      second_draw_T=draw_T,
      **routing,
    )
    _, kept_TK = assign_slots(
      routed.expert_TK,
      routed.valid_TK,
      routed.priority_TK,
      num_experts=E,
      bound=bound,
      order=order,
    )
    for t in range(T):
      y_GTD[g, t] = _token_output(
        params, x_GTD[g, t], routed, kept_TK, t, activation
      )
      if mask_GT[g][t]:
        at = (g, t // (T // sequences))
        _count(stats, at, routed, kept_TK, t, bound)
  return y_GTD, stats


def _token_output(params, x_D, routed, kept_TK, t, activation):
  y_D = np.zeros_like(x_D)
  if params.get("shared"):
    y_D = y_D + mlp(params["shared"], x_D, activation)
  for k in range(kept_TK.shape[1]):
    if not kept_TK[t, k]:
      continue
    e, weight = routed.expert_TK[t, k], routed.weight_TK[t, k]
    if routed.apply_to == "output":
      y_D = y_D + weight * experts(params["experts"], e, x_D, activation)
    elif routed.apply_to == "input":
      y_D = y_D + experts(params["experts"], e, weight * x_D, activation)
    else:
      raise ValueError(f"apply_to={routed.apply_to!r}")
  return y_D


def _empty_stats(G, S, E):
  return {
    "tokens": np.zeros((G, S), int),
    "count_E": np.zeros((G, S, E), int),
    "first_choice_E": np.zeros((G, S, E), int),
    "prob_E": np.zeros((G, S, E)),
    "weight_E": np.zeros((G, S, E)),
    "kept_E": np.zeros((G, S, E), int),
    "dropped": {
      "capacity": np.zeros((G, S), int),
      "buffer": np.zeros((G, S), int),
      "unrouted": np.zeros((G, S), int),
    },
    "z": np.zeros((G, S)),
    "entropy": np.zeros((G, S)),
    "confidence": np.zeros((G, S)),
  }


def _count(stats, at, routed, kept_TK, t, bound):
  """Adds the unpadded token t to the statistics of its sequence, `at`."""
  prob_E = routed.prob_TE[t]
  stats["tokens"][at] += 1
  stats["prob_E"][at] += prob_E
  stats["z"][at] += _logsumexp(routed.logits_TE[t]) ** 2
  stats["entropy"][at] -= sum(p * math.log(p) for p in prob_E if p > 0)

  for k in range(kept_TK.shape[1]):
    e = routed.expert_TK[t, k]
    if not routed.valid_TK[t, k]:
      stats["dropped"]["unrouted"][at] += 1
      continue
    stats["count_E"][at][e] += 1
    stats["weight_E"][at][e] += routed.weight_TK[t, k]
    stats["confidence"][at] += prob_E[e]
    if k == 0:
      stats["first_choice_E"][at][e] += 1
    if kept_TK[t, k]:
      stats["kept_E"][at][e] += 1
    else:
      _, expert_buckets = bound
      cause = "capacity" if expert_buckets == len(prob_E) else "buffer"
      stats["dropped"][cause][at] += 1


def switch_loss(count_E, prob_E, tokens):
  """E sum_i f_i P_i, 1 at perfect balance; 2101.03961 eq. 4 to 6.

  f_i is expert i's share of all assignments, every choice counted (hence
  divided by K T), P_i its mean probability. Without the coefficient. 0 if
  there are no tokens.
  """
  if tokens == 0:
    return 0.0
  E, assignments = len(count_E), sum(count_E)
  return E * sum(
    count_E[i] / assignments * prob_E[i] / tokens for i in range(E)
  )


def z_loss(z, tokens):
  """Mean of logsumexp(logits)^2, 2202.08906 eq. 5. 0 without tokens."""
  return z / tokens if tokens else 0.0


def bias_update(bias_E, count_E, rate, rule="sign", centered=False):
  """One step of the loss-free bias, 2408.15664 Alg. 1.

  "sign": b_i += rate sign(mean - c_i). "proportional": b_i += rate (mean -
  c_i) / mean, the table 3 variant in units of the mean load. centered
  subtracts the mean of the new bias.
  """
  mean = sum(count_E) / len(count_E)
  new_E = []
  for b, c in zip(bias_E, count_E, strict=True):
    if rule == "sign":
      new_E.append(float(b) + rate * np.sign(mean - c))
    elif rule == "proportional":
      new_E.append(float(b) + rate * (mean - c) / mean)
    else:
      raise ValueError(f"rule={rule!r}")
  new_E = np.array(new_E)
  return new_E - new_E.mean() if centered else new_E


def max_vio(count_E):
  """(max load - mean load) / mean load, 2408.15664 eq. 4."""
  mean = sum(count_E) / len(count_E)
  return (max(count_E) - mean) / mean


def min_vio(count_E):
  """(mean load - min load) / mean load."""
  mean = sum(count_E) / len(count_E)
  return (mean - min(count_E)) / mean


def load_cv(count_E):
  """Standard deviation over the E experts (not E - 1) / mean load."""
  mean = sum(count_E) / len(count_E)
  variance = sum((c - mean) ** 2 for c in count_E) / len(count_E)
  return math.sqrt(variance) / mean


def gradient_along(f, leaf_arrays, direction, eps=1e-3):
  """Sum over the leaves of <df/dleaf, direction>, by differences in float64.

  Fourth-order central difference: the error is eps^4 / 30 times the fifth
  derivative along the direction, plus rounding of about 1e-16 |f| / eps.

  Args:
    f: list of arrays -> number. It must be smooth within 2 eps direction: no
      relu at its kink, no tie among the experts, integers unchanged.
    leaf_arrays: where to differentiate, a list of arrays.
    direction: a list of arrays of the same shapes, of norm about 1.
    eps: the step along the direction.
  """

  def f_at(step):
    moved = []
    for leaf, towards in zip(leaf_arrays, direction, strict=True):
      if np.shape(leaf) != np.shape(towards):
        raise ValueError(f"{np.shape(leaf)} along {np.shape(towards)}")
      moved.append(_float64(leaf) + step * _float64(towards))
    return float(f(moved))

  near = f_at(eps) - f_at(-eps)
  far = f_at(2 * eps) - f_at(-2 * eps)
  return (8 * near - far) / (12 * eps)


def _scores(logits, score):
  """Scores of some experts of one token; the softmax is over these."""
  if score == "softmax":
    return np.exp(logits - _logsumexp(logits))
  if score == "sigmoid":
    return _sigmoid(logits)
  if score == "sqrt_softplus":
    return np.sqrt(np.logaddexp(0.0, logits))
  raise ValueError(f"score={score!r}")


def _best_first(values):
  """Indices from the largest value to the smallest, equals by index."""
  return sorted(range(len(values)), key=lambda i: (-values[i], i))


def _logsumexp(x):
  top = np.max(x)
  return top + math.log(sum(math.exp(v - top) for v in x))


def _sigmoid(x):
  return np.exp(-np.logaddexp(0.0, -x))


def _float64(x):
  return np.asarray(x, np.float64)
