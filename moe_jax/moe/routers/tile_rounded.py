"""Top-k whose loads are rounded to tiles of a kernel (SonicMoE, 2512.14080).

  load of an expert in a group = the nearest multiple of tile;  w = softmax(x W)

An expert gives up its tokens with the lowest scores, or adds the best of the tokens
that have it among their next K choices. A grouped product then has no padded rows,
unless there are fewer such tokens than a tile lacks. An expert with less than half a
tile of tokens gets none: it is for groups in which K T / E is several tiles, and groups
where it is less than a tile are refused.

The rank of a token among the others decides, so that later tokens change earlier ones;
decoders refuse it unless model.allow_noncausal is set. It saves the padded rows of the
kernel, which are few where K T / E is many tiles. We know the method from the paper's
abstract and its published benchmark.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import integer
from moe_jax.moe import scores
from moe_jax.moe.types import GIVEN, Router, Routing, TokenChoice

CONTRACT_OPTIONS = {"top_k": 2, "tile": 3}


def build(
  top_k: integer(1), tile: integer(1), renormalize: bool = False
) -> Router:
  """A router whose loads are whole tiles.

  Args:
    top_k: K, experts of a token before rounding; half of E at most.
    tile: rows of a kernel's tile.
    renormalize: divide the weights by their sum.

  Raises:
    ConfigError: the one weight of a token is always 1.
  """
  scores.refuse_constant(top_k, renormalize)

  def init(rng, d_model, num_experts):
    if 2 * top_k > num_experts:
      raise ConfigError(
        f"the router tile_rounded looks at 2 top_k = {2 * top_k} experts of a"
        f" token, and there are num_experts = {num_experts}; lower top_k"
      )
    return scores.linear(rng, d_model, num_experts)

  def check_rows(tokens, num_experts):
    if tokens * top_k < tile * num_experts:
      raise ConfigError(
        f"the router tile_rounded gives experts multiples of tile = {tile} tokens,"
        f" and a group of {tokens} tokens has {tokens * top_k / num_experts:g} for"
        " each; raise tokens_per_group, or lower tile"
      )

  def route(params, x_TD, *, num_experts, select, side, rng):
    del rng
    check_rows(len(x_TD), num_experts)
    logits_TE = scores.logits(params, x_TD)
    prob_TE = jax.nn.softmax(logits_TE)
    selection_TE = jax.lax.stop_gradient(select(prob_TE))
    saturated_TE = prob_TE <= 0
    # Twice as many as are wanted: those that may come in stand behind.
    expert_TK = scores.choose(selection_TE, logits_TE, saturated_TE, 2 * top_k)
    expert_TK = checkpoint_name(expert_TK, "expert")
    kept_TE = rounded(expert_TK, selection_TE, side.mask_T, top_k, tile)
    valid_TK = jnp.take_along_axis(kept_TE, expert_TK, axis=-1)
    valid_TK = checkpoint_name(valid_TK, "expert")
    weight_TK = jnp.take_along_axis(prob_TE, expert_TK, axis=-1)
    if renormalize:
      weight_TK = scores.over_sum(weight_TK, valid_TK)
    choice = TokenChoice(expert_TK, weight_TK, valid_TK)
    return Routing(choice, prob_TE, logits_TE, score_TE=prob_TE)

  return Router(
    *(init, scores.LINEAR_AXES, route),
    causal=False,
    top_k=2 * top_k,
    fixed=False,
    average_k=float(top_k),
    gives=GIVEN | {"score_range"},
  )


def rounded(expert_TK, selection_TE, mask_T, top_k: int, tile: int):
  """Whether a token keeps an expert: kept_TE.

  Args:
    expert_TK: candidates, of which the first `top_k` are the token's own.
    selection_TE: scores.
    mask_T: bool, False for padding.
    top_k: K.
    tile: loads become multiples of it.
  """
  num_experts = selection_TE.shape[-1]

  def named(expert_TK):
    named_TE = jax.nn.one_hot(expert_TK, num_experts, dtype=bool).any(1)
    return named_TE & mask_T[:, None]

  own_TE, spare_TE = named(expert_TK[:, :top_k]), named(expert_TK[:, top_k:])
  target_E = (own_TE.sum(0) + tile // 2) // tile * tile
  # Own tokens first, and the best of each kind before others.
  kind_TE = jnp.where(own_TE, 0, jnp.where(spare_TE, 1, 2))
  order_TE = jnp.lexsort((-selection_TE, kind_TE), axis=0)
  rank_TE = jnp.argsort(order_TE, axis=0)
  return (rank_TE < target_E[None]) & (own_TE | spare_TE)
