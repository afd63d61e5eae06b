"""Text from a model, token by token, and which experts each token used.

python -m moe_jax.generate --checkpoint=runs/tiny --prompt="def " --experts
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.core.errors import ConfigError
from moe_jax.run import config as config_lib
from moe_jax.training import trained


class Generated(NamedTuple):
  """tokens_BN: what follows each prompt; `end` and what comes after it is -1.

  experts: {layer: [B, L + N - 1, K]} of all tokens but the last, those of
    padding included; None if they were not asked for.
  """

  tokens_BN: np.ndarray
  experts: dict[str, np.ndarray] | None


def generate(
  model,
  variables,
  prompts: Sequence[Sequence[int]],
  num_tokens: int,
  *,
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
  seed: int = 0,
  ends: Sequence[int] = (),
  experts: bool = False,
) -> Generated:
  """Continues prompts, all at once, with a cache of keys and values.

  Args:
    model: dropless, or its capacity is that of a single token; on its mesh.
    variables: {"params": ...}, and "balance" if the model has it.
    prompts: B of them, each of at least one token.
    num_tokens: N, at most so many for each.
    temperature: logits are divided by it; 0 takes the most probable token.
    top_k: only so many of the most probable tokens; None: all.
    top_p: only the most probable tokens that make up so much (nucleus,
      1904.09751), in (0, 1]; None: all.
    seed: of the draws.
    ends: tokens after which a text is over.
    experts: also return which experts were chosen.

  Raises:
    ConfigError: impossible values.
  """
  import jax
  import jax.numpy as jnp

  from moe_jax.core import parallel

  _check(prompts, num_tokens, temperature, top_k, top_p, model.arch.vocab_size)
  asked = len(prompts)
  # As many rows as divide over the devices.
  more = -asked % parallel.token_shards(model.arch.mesh)
  prompts = [*prompts, *(prompts[0] for _ in range(more))]
  lengths = [len(p) for p in prompts]
  longest = max(lengths)
  tokens_BL = np.zeros((len(prompts), longest), np.int32)
  mask_BL = np.zeros(tokens_BL.shape, bool)
  for row, (prompt, length) in enumerate(zip(prompts, lengths)):
    tokens_BL[row, longest - length :] = prompt
    mask_BL[row, longest - length :] = True

  options = temperature, top_k, top_p, experts
  first, following = _compiled(model, longest + num_tokens, *options)
  rngs = jax.random.split(jax.random.key(seed), num_tokens)
  cache, token_B, chosen = first(variables, {}, tokens_BL, mask_BL, rngs[0])
  found, routed = [np.asarray(token_B)], [chosen]
  over_B = np.isin(found[0], ends)
  alive_B1 = jnp.ones((len(prompts), 1), bool)
  for rng in rngs[1:]:
    if over_B.all():
      break
    cache, token_B, chosen = following(
      variables, cache, token_B[:, None], alive_B1, rng
    )
    # What follows the end of a text is nobody's.
    found.append(np.where(over_B, -1, np.asarray(token_B)))
    routed.append(chosen)
    over_B |= np.isin(found[-1], ends)
  by_layer = None
  if experts:
    by_layer = _by_layer(routed, model.arch.segments, len(prompts))
    by_layer = {layer: chosen[:asked] for layer, chosen in by_layer.items()}
  return Generated(np.stack(found, axis=1)[:asked], by_layer)


@functools.lru_cache(maxsize=8)
def _compiled(model, length, temperature, top_k, top_p, experts):
  """The step over a prompt, and that of a token more, whose cache it takes."""
  import jax

  def step(variables, cache, tokens_BL, mask_BL, rng):
    (logits_BLV, aux), changed = model.apply(
      {**variables, **cache},
      tokens_BL,
      mask_BL,
      collect="routing" if experts else None,
      cache_length=length,
      mutable=["cache"],
    )
    token_B = sample(logits_BLV[:, -1], rng, temperature, top_k, top_p)
    chosen = {
      segment: {i: entry["expert_GTK"] for i, entry in positions.items()}
      for segment, positions in (aux.items() if experts else ())
    }
    return changed, token_B, chosen

  return jax.jit(step), jax.jit(step, donate_argnums=1)


def sample(logits_BV, rng, temperature: float, top_k=None, top_p=None):
  """One token of each row: see `generate`."""
  import jax
  import jax.numpy as jnp

  if temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  logits_BV = logits_BV / temperature
  sorted_BV = -jnp.sort(-logits_BV, axis=-1)
  if top_k is not None:
    least_B1 = sorted_BV[:, top_k - 1 : top_k]
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    sorted_BV = jnp.where(sorted_BV < least_B1, -jnp.inf, sorted_BV)
  if top_p is not None:
    prob_BV = jax.nn.softmax(sorted_BV, axis=-1)
    # A token is in if those before it do not reach top_p yet.
    inside_BV = jnp.cumsum(prob_BV, axis=-1) - prob_BV < top_p
    least_B1 = jnp.where(inside_BV, sorted_BV, jnp.inf).min(-1, keepdims=True)
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  return jax.random.categorical(rng, logits_BV).astype(jnp.int32)


def _check(prompts, num_tokens, temperature, top_k, top_p, vocab_size):
  if not len(prompts) or not all(len(p) for p in prompts):
    raise ConfigError("a prompt has at least one token")
  for prompt in prompts:
    for token in (min(prompt), max(prompt)):
      if not 0 <= token < vocab_size:
        raise ConfigError(
          f"a prompt has token {token}, and the model's are from 0 to"
          f" {vocab_size - 1}"
        )
  if num_tokens < 1:
    raise ConfigError(f"{num_tokens} tokens is less than one")
  if temperature < 0:
    raise ConfigError(f"temperature = {temperature} is negative")
  if top_k is not None and not 1 <= top_k <= vocab_size:
    raise ConfigError(
      f"top_k = {top_k} is not between 1 and the {vocab_size} tokens there are"
    )
  if top_p is not None and not 0 < top_p <= 1:
    raise ConfigError(f"top_p = {top_p} is not in (0, 1]")


def _by_layer(routed, segments, batch):
  """{layer: experts of all tokens, one after another}."""
  from moe_jax.training import metrics

  parts = {}
  for chosen in routed:
    for layer, expert_GTK in metrics.by_layer(chosen, segments).items():
      expert_GTK = np.asarray(expert_GTK)
      shape = (batch, -1, expert_GTK.shape[-1])
      parts.setdefault(layer, []).append(expert_GTK.reshape(shape))
  return {layer: np.concatenate(p, axis=1) for layer, p in parts.items()}


def describe_experts(tokenizer, prompt, tokens, experts) -> str:
  """A line for each token: its text, and its experts in each layer.

  Args:
    tokenizer: of the tokens.
    prompt, tokens: of one text.
    experts: {layer: [tokens but the last, K]}, without padding.
  """
  lines = []
  for i, token in enumerate([*prompt, *tokens][:-1]):
    cells = [
      f"{layer}: {' '.join(map(str, chosen[i]))}"
      for layer, chosen in experts.items()
    ]
    text = repr(tokenizer.decode([int(token)]))
    lines.append(f"{text:>12}  {'  '.join(cells)}")
  return "\n".join(lines)


def main(argv=None) -> int:
  """The command."""
  parser = argparse.ArgumentParser(
    prog="python -m moe_jax.generate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  trained.add_flags(parser)
  add("--prompt", action="append", required=True, help="repeatable: a batch")
  add("--num_tokens", type=config_lib.at_least_1, default=64)
  add("--temperature", type=float, default=0.0, help="0: the most probable")
  add("--top_k", type=config_lib.at_least_1)
  add("--top_p", type=float)
  add("--seed", type=int, default=0)
  add("--experts", action="store_true", help="print those of every token")
  args = parser.parse_args(argv)

  found = trained.load(args)
  prompts = [
    found.tokenizer.prompt(text.encode()).tolist() for text in args.prompt
  ]
  made = generate(
    found.model,
    found.variables,
    prompts,
    args.num_tokens,
    temperature=args.temperature,
    top_k=args.top_k,
    top_p=args.top_p,
    seed=args.seed,
    ends=found.ends,
    experts=args.experts,
  )
  longest = max(map(len, prompts))
  for row, (text, prompt) in enumerate(zip(args.prompt, prompts)):
    tokens = [t for t in made.tokens_BN[row].tolist() if t >= 0]
    shown = [t for t in tokens if t not in found.ends]
    print(text + found.tokenizer.decode(shown))
    if args.experts:
      start = longest - len(prompt)
      of_row = {k: x[row, start:] for k, x in made.experts.items()}
      print(describe_experts(found.tokenizer, prompt, tokens, of_row))
  return 0


if __name__ == "__main__":
  config_lib.run(lambda: main(sys.argv[1:]))
