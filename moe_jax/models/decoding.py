"""Texts from a model, token by token, with a cache of keys and values."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import models
from moe_jax.core import parallel
from moe_jax.core.errors import ConfigError
from moe_jax.core.options import arguments, integer, number, optional
from moe_jax.moe.types import TokenChoice


class Sampling(NamedTuple):
  """Options for drawing the next token.

  temperature: logits are divided by it; 0 takes the most probable token.
  top_k: draw from so many of the most probable tokens only; None: from all.
  top_p: draw from the most probable tokens that together reach this
    probability (nucleus, 1904.09751), in (0, 1]; None: from all.
  seed: of the draws.
  """

  temperature: number(0) = 0.0
  top_k: optional(integer(1)) = None
  top_p: optional(number(above=0, high=1)) = None
  seed: integer(0) = 0


GREEDY = Sampling()  # The most probable tokens.


class Generated(NamedTuple):
  """tokens_BN: what follows each prompt, up to and with the token that ends the
    text; positions after it are filler, -1.

  experts: {layer: [B, L + N - 1, K]} of all tokens but the last, those of
    padding included; {} if they were not asked for.
  """

  tokens_BN: np.ndarray
  experts: dict[str, np.ndarray]


def generate(
  model,
  variables,
  prompts: Sequence[Sequence[int]],
  num_tokens: int,
  sampling: Sampling = GREEDY,
  *,
  ends: Sequence[int] = (),
  experts: bool = False,
) -> Generated:
  """Continues prompts, all at once.

  Args:
    model: dropless, or its capacity is that of a single token; on its mesh.
    variables: {"params": ...}, and "balance" if the model has it.
    prompts: B of them, each of at least one token.
    num_tokens: N, the most tokens for each.
    sampling: how tokens are drawn; by default the most probable ones.
    ends: tokens that end a text.
    experts: also return which experts were chosen.

  Raises:
    ConfigError: impossible values.
  """
  _check(prompts, num_tokens, sampling, model.arch.vocab_size)
  for parts in model.sublayers.values() if experts else ():
    if parts.recipe.router.form is not TokenChoice:
      raise ConfigError(
        "tokens do not choose experts in this model, so there are none to show;"
        " leave out --experts"
      )
  tokens_BL, mask_BL = _padded(prompts, parallel.token_shards(model.arch.mesh))
  batch, length = tokens_BL.shape
  inputs, cache, over_B = (tokens_BL, mask_BL), {}, np.zeros(batch, bool)
  made, routed = [], []
  for rng in jax.random.split(jax.random.key(sampling.seed), num_tokens):
    cache, logits_BV, chosen = step(
      model, length + num_tokens, experts, variables, cache, *inputs
    )
    token_B = sample(logits_BV, rng, sampling._replace(seed=0))
    made.append(np.where(over_B, -1, np.asarray(token_B)))
    routed.append(chosen)
    over_B |= np.isin(made[-1], ends)
    if over_B.all():
      break
    inputs = token_B[:, None], jnp.ones((batch, 1), bool)
  asked = slice(len(prompts))
  chosen = _by_layer(routed, model.sublayers, asked)
  return Generated(np.stack(made, axis=1)[asked], chosen)


def _padded(prompts, shards):
  """Tokens and mask, padding first, of rows that divide over the devices."""
  rows = [*prompts, *[prompts[0]] * (-len(prompts) % shards)]
  length_B = np.array([len(row) for row in rows])
  before_B = length_B.max() - length_B
  tokens_BL = np.stack([np.pad(x, (n, 0)) for x, n in zip(rows, before_B)])
  mask_BL = np.arange(length_B.max()) >= before_B[:, None]
  return tokens_BL.astype(np.int32), mask_BL


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def step(model, length, experts, variables, cache, tokens_BL, mask_BL):
  """A step over prompts, or over one more token of each, whose cache it takes.

  Args:
    model: a decoder.
    length: tokens that the cache has room for.
    experts: whether to return which experts were chosen.
    variables: of the model.
    cache: {"cache": ...} that the last step returned; {} for prompts.
    tokens_BL, mask_BL: as in `Decoder.__call__`.

  Returns:
    The cache; logits [B, V] of each row's next token; {path: experts}.
  """
  (logits_BLV, aux), changed = model.apply(
    {**variables, **cache},
    tokens_BL,
    mask_BL,
    collect="routing" if experts else None,
    cache_length=length,
    mutable=["cache"],
  )
  chosen = {}
  for path in model.sublayers if experts else ():
    expert_RGTK = models.at(aux, path)["choice"].expert_TK
    shape = len(expert_RGTK), *tokens_BL.shape, -1
    chosen[path] = expert_RGTK.reshape(shape)
  return changed, logits_BLV[:, -1], chosen


@functools.partial(jax.jit, static_argnames="sampling")
def sample(logits_BV, rng, sampling: Sampling):
  """Draws the next token of each row; `sampling.seed` is not read."""
  if sampling.temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  logits_BV = logits_BV / sampling.temperature
  sorted_BV = -jnp.sort(-logits_BV, axis=-1)
  inside_BV = jnp.ones(sorted_BV.shape, bool)
  if sampling.top_k is not None:
    inside_BV = sorted_BV >= sorted_BV[:, sampling.top_k - 1 : sampling.top_k]
  if sampling.top_p is not None:
    prob_BV = jax.nn.softmax(jnp.where(inside_BV, sorted_BV, -jnp.inf), axis=-1)
    # A token is in if those before it do not reach top_p yet.
    inside_BV &= jnp.cumsum(prob_BV, axis=-1) - prob_BV < sampling.top_p
  least_B1 = jnp.where(inside_BV, sorted_BV, jnp.inf).min(-1, keepdims=True)
  logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  return jax.random.categorical(rng, logits_BV).astype(jnp.int32)


def _by_layer(routed, sublayers, rows):
  """{layer: experts of all tokens of some rows, one after another}."""
  layers = {}
  for path in routed[0]:
    expert_RBLK = np.concatenate([chosen[path] for chosen in routed], axis=2)
    for layer, expert_BLK in zip(sublayers[path].numbers, expert_RBLK):
      layers[f"{layer:02d}"] = expert_BLK[rows]
  return dict(sorted(layers.items()))


def _check(prompts, num_tokens, sampling, vocab_size):
  if not len(prompts) or not all(len(p) for p in prompts):
    raise ConfigError("a prompt has at least one token")
  for token in (min(map(min, prompts)), max(map(max, prompts))):
    integer(0, vocab_size - 1).check(int(token), "a prompt's token")
  integer(1).check(num_tokens, "num_tokens")
  arguments(Sampling).check(sampling._asdict(), "sampling")
  optional(integer(1, vocab_size)).check(sampling.top_k, "sampling.top_k")
