"""Hash routing: a fixed table of token ids chooses (Roller et al., 2106.04426).

  chosen = table[id];  w = score(x W) of the chosen, or 1 / K

The table is fixed, so that a token's experts depend on its id alone, and loads follow
the frequencies of ids. With

  weights = "score"  w = score(x W)[table[id]], over their sum if `renormalize`: the
                     first layers of DeepSeek-V4 (2606.19348) choose so;
  weights = "equal"  w = 1 / K and no parameters, as in the first paper.

The table is drawn, or balanced as in the paper: from the most frequent id to the
rarest, each gets the K experts with the lowest loads so far.

It is a strong baseline, whose experts specialise by token id, and needs no balancer. It
cannot specialise by context, and loads are uneven on data unlike the counted data.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from moe_jax.core.errors import ConfigError, first_line
from moe_jax.core.options import integer, number, optional, text, word
from moe_jax.moe import scores
from moe_jax.moe.types import GIVEN, Router, Routing

CONTRACT_OPTIONS = {"top_k": 2, "vocab_size": 1000}
CONTRACT_EXCEPTIONS = {
  "expert_symmetry": "the table refers to experts by number"
}


def build(
  top_k: integer(1),
  vocab_size: integer(1),
  weights: word("score", "equal") = "score",
  score: word(*scores.SCORES) = "softmax",
  renormalize: bool = False,
  scale: number(above=0) = 1.0,
  seed: integer(0) = 0,
  counts: optional(text()) = None,
) -> Router:
  """A router by a table from token ids to experts.

  Args:
    top_k: K, different experts per token.
    vocab_size: V, the number of token ids; a decoder may have fewer, not more.
    weights: "score" or "equal", see the head of this file.
    score: of the weights, as in the router `top_k`.
    renormalize: divide the weights of a token by their sum.
    scale: a factor on the weights.
    seed: of the table.
    counts: path of a .npy file with how often each id is seen; None: drawn.
  """
  learnt = weights == "score"
  _check(top_k, learnt, score, renormalize)
  count_V = None if counts is None else read_counts(counts, vocab_size)

  @functools.cache
  def table(num_experts):
    if count_V is None:
      return drawn(vocab_size, num_experts, top_k, seed)
    return balanced(count_V, num_experts, top_k, seed)

  def init(*sizes):
    return scores.linear(*sizes) if learnt else {}

  def route(params, x_TD, *, num_experts, select, side, rng):
    del select, rng  # The table has chosen already.
    table_VK = jnp.asarray(table(num_experts))
    expert_TK = table_VK[_token_ids(side) % vocab_size]
    expert_TK = checkpoint_name(expert_TK, "expert")
    if not learnt:
      dtype = jnp.promote_types(x_TD.dtype, jnp.float32)
      weight_TK = jnp.full(expert_TK.shape, scale / top_k, dtype)
      prob_TE = jax.nn.one_hot(expert_TK, num_experts, dtype=dtype).mean(1)
      choice = scores.choice(expert_TK, weight_TK, side.mask_T)
      return Routing(choice, prob_TE)
    logits_TE = scores.logits(params, x_TD)
    score_TE = scores.SCORES[score](logits_TE)
    weights_TK = scores.weigh(expert_TK, logits_TE, score_TE, score)
    weight_TK = weights_TK[renormalize] * scale
    choice = scores.choice(expert_TK, weight_TK, side.mask_T)
    prob_TE = scores.probabilities(logits_TE, score)
    return Routing(choice, prob_TE, logits_TE)

  axes = scores.LINEAR_AXES if learnt else {}
  gives = GIVEN - {"selection"}
  gives = gives if learnt else frozenset({"token_choice", "loads"})
  about = {"features": {"token_id": vocab_size}, "gives": gives}
  return Router(init, axes, route, causal=True, top_k=top_k, **about)


def _check(top_k, learnt, score, renormalize):
  """Raises ConfigError for options that do not fit together."""
  remedy = 'set renormalize = False, or weights = "equal"'
  scores.refuse_constant(top_k, learnt and renormalize, remedy)
  if not learnt and (renormalize or score != "softmax"):
    raise ConfigError(
      'the router hash with weights = "equal" has no scores; leave score and'
      ' renormalize out, or set weights = "score"'
    )


def _token_ids(side):
  """Raises ConfigError where a model does not say which tokens they are."""
  if "token_id" not in side.features:
    raise ConfigError(
      "the router hash needs side.features['token_id'], which this model does not"
      " give; use it in a decoder"
    )
  return side.features["token_id"]


def drawn(vocab_size: int, num_experts: int, top_k: int, seed: int):
  """A table of K different experts for each id, drawn uniformly.

  Args:
    vocab_size: V.
    num_experts: E.
    top_k: K.
    seed: of the draw.

  Returns:
    table_VK, int32.
  """
  rng = np.random.default_rng(seed)
  order_VE = np.argsort(rng.random((vocab_size, num_experts)), axis=1)
  return order_VE[:, :top_k].astype(np.int32)


def balanced(count_V: np.ndarray, num_experts: int, top_k: int, seed: int):
  """A table in which ids, frequent ones first, get the least loaded experts.

  Of experts with equal loads those with fewer ids come first, so that ids which are
  never seen are spread, too; then the order is drawn.

  Args:
    count_V: how often each id is seen.
    num_experts: E.
    top_k: K.
    seed: of the order among equals.

  Returns:
    table_VK, int32.
  """
  rng = np.random.default_rng(seed)
  load_E, ids_E = np.zeros(num_experts), np.zeros(num_experts, int)
  table_VK = np.zeros((len(count_V), top_k), np.int32)
  for token in np.argsort(-count_V, kind="stable"):
    load = load_E if count_V[token] else ids_E
    expert_K = np.lexsort((rng.random(num_experts), ids_E, load))[:top_k]
    load_E[expert_K] += count_V[token]
    ids_E[expert_K] += 1
    table_VK[token] = expert_K
  return table_VK


def read_counts(path: str, vocab_size: int) -> np.ndarray:
  """The number of times that each id is seen, from a .npy file.

  Args:
    path: of the file.
    vocab_size: V.

  Raises:
    ConfigError: it cannot be read, or is not V numbers of 0 or more.
  """
  try:
    count_V = np.load(path, allow_pickle=False)
  except (OSError, ValueError) as e:
    raise ConfigError(
      f"counts = {path} of the router hash cannot be read ({first_line(e)}); give a"
      " .npy file, such as numpy.save writes"
    ) from None
  right = count_V.shape == (vocab_size,) and count_V.dtype.kind in "iuf"
  if not right or not np.isfinite(count_V).all() or (count_V < 0).any():
    raise ConfigError(
      f"counts = {path} of the router hash is not {vocab_size} numbers of 0 or"
      f" more, one for each token id; it has shape {count_V.shape}"
    )
  return count_V.astype(float)
