"""Generates text from a model, and prints the experts that each token used.

moe-jax generate --checkpoint=runs/tiny --prompt="def " --experts

A decoder continues the prompt. An encoder-decoder answers it: the encoder reads the
prompt, and the decoder writes the text. In a run of the task span_corruption,
<extra_id_0>, <extra_id_1>, ... in a prompt are the spans that are to be filled in:

moe-jax generate --checkpoint=runs/t5 --beams=4 \\
  --prompt="def <extra_id_0>(self):"
"""

import itertools
import re
import sys

import numpy as np

from moe_jax.core.errors import ConfigError
from moe_jax.run import command
from moe_jax.run import config as config_lib
from moe_jax.training import trained

_SENTINEL = re.compile(r"<extra_id_([0-9]+)>")  # T5's notation.
_MOST_SENTINELS = 100  # T5 has this many.


def main(argv=None) -> int:
  """Runs the command; raises ConfigError for flags that do not fit."""
  args = _arguments(argv)

  from moe_jax.models.generation import decoding

  beams, loaded = _beams(args), with_sentinels(trained.load(args))
  tokenizer, ends, model = loaded.tokenizer, loaded.ends, loaded.model
  prompts = [tokenizer.prompt(text.encode()).tolist() for text in args.prompt]
  start, before = None, prompts
  if decoding.takes_two(model):
    of_source, of_target = _begins(loaded.config, args.part)
    prompts = [[*of_source, *_ended(prompt, ends)] for prompt in prompts]
    said = [*of_target, *_without_begin(tokenizer, args.start)]
    start = [*loaded.start, *said]
    before = [start] * len(prompts)
    beams = beams and beams._replace(length_before=len(said))
  elif args.start or args.part:
    flag = "--start" if args.start else "--part"
    raise ConfigError(
      f"{flag}={args.start or args.part} is for an encoder-decoder; leave it out, or"
      " put it into the prompt"
    )
  made = decoding.generate(
    model,
    loaded.variables,
    prompts,
    args.num_tokens,
    decoding.Sampling(args.temperature, args.top_k, args.top_p, args.seed),
    ends=ends,
    experts=args.experts,
    start=start,
    beams=beams,
  )
  several = 1 if beams is None else beams.num_returned
  longest = max(map(len, before))
  if args.experts:
    words = "Under each text: its tokens, and in each layer their experts, best first."
    print(words, file=sys.stderr)
  for row, filled in enumerate(made.tokens_BN.tolist()):
    number, tokens = row // several, [t for t in filled if t >= 0]
    if start and len(prompts) > 1 and row % several == 0:
      print(f"{args.prompt[number]}:")
    said = tokenizer.decode([t for t in tokens if t not in ends])
    score = f"{made.score_B[row]:9.4f}  " if several > 1 else ""
    print(score + ("" if start else args.prompt[number]) + said)
    if not args.experts:
      continue
    experts = {k: x[row] for k, x in made.experts.items()}
    if start:
      of_prompt = {k: experts.pop(k) for k in _of_encoder(model)}
      if row % several == 0:
        print(table(tokenizer, prompts[number], of_prompt))
    first, text = longest - len(before[number]), [*before[number], *tokens]
    experts = {k: x[first:] for k, x in experts.items()}
    print(table(tokenizer, text[:-1], experts))
  return 0


def table(tokenizer, tokens, experts) -> str:
  """Returns a line for each token: its text, its experts in each layer.

  Args:
    tokenizer: of the tokens.
    tokens: without padding.
    experts: {layer: [as many tokens or more, K]}.
  """
  lines = []
  for i, token in enumerate(tokens):
    cells = [
      f"{layer}: {' '.join(map(str, chosen[i]))}"
      for layer, chosen in experts.items()
    ]
    said = tokenizer.decode([int(token)])
    text = repr(said) if said else f"<token {token}>"
    lines.append(f"{text:>12}  {'  '.join(cells)}")
  return "\n".join(lines)


def _of_encoder(model):
  """Numbers of the encoder's MoE layers, which have the prompt's tokens."""
  sides = [x for x in model.sublayers.values() if x.sequence == "inputs"]
  return [f"{number:02d}" for x in sides for number in x.numbers]


def _ended(prompt, ends):
  """A prompt with the token that ends a text, as the encoder was trained."""
  return prompt if prompt[-1:] == [*ends[:1]] else [*prompt, *ends[:1]]


def _begins(config, part):
  """Tokens before the prompts and before the answers of a run of translation."""
  if config is not None and config.task.name == "translation":
    from moe_jax.tasks import translation

    return translation.begins(config, part)
  if part is not None:
    raise ConfigError(
      f"--part={part} is for a run of translation; leave it out"
    )
  return (), ()


def _without_begin(tokenizer, text):
  """Tokens of a text, without those that the inputs of a model begin with."""
  return tokenizer.prompt(text.encode()).tolist()[len(tokenizer.begin) :]


def with_sentinels(loaded: trained.Trained) -> trained.Trained:
  """Returns weights whose tokenizer writes sentinels in T5's notation.

  The sentinels are the tokens after those of the tokenizer, or those that
  `task.sentinels` names, see `data.spans`.

  Args:
    loaded: of a run of the task span_corruption.
  """
  config, tokenizer = loaded.config, loaded.tokenizer
  if config is None or config.task.name != "span_corruption":
    return loaded
  first, step = config.task.get("sentinels") or (tokenizer.vocab_size, 1)
  most = loaded.model.arch.vocab_size - first if step > 0 else first + 1
  tokens = first + step * np.arange(min(most, _MOST_SENTINELS))
  number_of = {int(token): n for n, token in enumerate(tokens)}

  def prompt(text):
    # The parts are a text, the number of a sentinel, a text, and so on.
    parts = _SENTINEL.split(text.decode())
    for spelled in parts[1::2]:
      if int(spelled) >= len(tokens):
        raise ConfigError(
          f"<extra_id_{spelled}> in a prompt is no sentinel of this model, which has"
          f" {len(tokens)} of them; the first one is <extra_id_0>"
        )
    made = [
      [tokens[int(part)]] if i % 2 else tokenizer.prompt(part.encode())
      for i, part in enumerate(parts)
    ]
    return np.concatenate(made).astype(np.int64)

  def decode(ids):
    runs = itertools.groupby(ids, lambda t: number_of.get(int(t)))
    return "".join(
      tokenizer.decode([*run]) if i is None else f"<extra_id_{i}>" * len([*run])
      for i, run in runs
    )

  own = tokenizer._replace(prompt=prompt, decode=decode)
  return loaded._replace(tokenizer=own)


def _beams(args):
  """The beams that the flags ask for; None: no search."""
  from moe_jax.models.generation import beam

  names = "length_penalty", "early_stopping", "num_returned"
  given = {k: v for k in names if (v := getattr(args, k)) is not None}
  if args.beams is not None:
    return beam.Beams(args.beams, **given)
  for name in given:
    raise ConfigError(
      f"--{name} is of a beam search: give --beams, or leave it out"
    )
  return None


def _arguments(argv):
  parser = config_lib.Parser(__doc__)
  add, count = parser.add_argument, config_lib.at_least_1
  trained.add_flags(parser)
  more = {"action": "append", "required": True, "metavar": "TEXT"}
  add(
    "--prompt", help="text to continue or answer; repeatable: a batch", **more
  )
  words = "what an answer begins with, such as the token of a language"
  add("--start", default="", metavar="TEXT", help=words)
  words = "part of data.mixture whose tokens of languages prompt and answer get"
  add("--part", metavar="LABEL", help=words)
  add("--num_tokens", type=count, default=64, help="at most (default: 64)")
  add("--temperature", type=float, default=0.0, help="0: the likeliest token")
  add("--top_k", type=count, help="draw from so many likeliest tokens only")
  add("--top_p", type=float, help="draw from the likeliest up to this sum only")
  add("--seed", type=int, default=0, help="of the draws (default: 0)")
  words = "search for the likeliest texts, following so many at a time"
  add("--beams", type=count, help=words)
  words = "power of the length that divides a text's log p (default: 1.0)"
  add("--length_penalty", type=float, help=words)
  words = "end a search at so many whole texts as it has beams"
  add("--early_stopping", action="store_true", default=None, help=words)
  words = "print so many of the best texts, with their scores (default: 1)"
  add("--num_returned", type=count, help=words)
  add("--experts", action="store_true", help="print the experts of every token")
  args = parser.parse_args(argv)
  for name in ("top_k", "top_p", "seed"):
    if getattr(args, name) and not args.temperature:
      raise ConfigError(
        f"--{name} is of draws: give a --temperature above 0, or leave it out"
      )
  return args


if __name__ == "__main__":
  command.run(main)
