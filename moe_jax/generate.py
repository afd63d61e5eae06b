"""Generates text from a model, and prints the experts that each token used.

python -m moe_jax.generate --checkpoint=runs/tiny --prompt="def " --experts
"""

from moe_jax.run import command
from moe_jax.run import config as config_lib
from moe_jax.training import trained


def main(argv=None) -> int:
  """The command."""
  args = _arguments(argv)

  from moe_jax.models import decoding

  loaded = trained.load(args)
  tokenizer, ends = loaded.tokenizer, loaded.ends
  prompts = [tokenizer.prompt(text.encode()).tolist() for text in args.prompt]
  made = decoding.generate(
    loaded.model,
    loaded.variables,
    prompts,
    args.num_tokens,
    decoding.Sampling(args.temperature, args.top_k, args.top_p, args.seed),
    ends=ends,
    experts=args.experts,
  )
  longest = max(map(len, prompts))
  for row, (text, prompt) in enumerate(zip(args.prompt, prompts)):
    tokens = [t for t in made.tokens_BN[row].tolist() if t >= 0]
    print(text + tokenizer.decode([t for t in tokens if t not in ends]))
    if args.experts:
      start = longest - len(prompt)
      experts = {k: x[row, start:] for k, x in made.experts.items()}
      print(table(tokenizer, [*prompt, *tokens], experts))
  return 0


def table(tokenizer, tokens, experts) -> str:
  """A line for each token but the last: its text, its experts in each layer.

  Args:
    tokenizer: of the tokens.
    tokens: a prompt, and what follows it.
    experts: {layer: [tokens but the last, K]}, without padding.
  """
  lines = []
  for i, token in enumerate(tokens[:-1]):
    cells = [
      f"{layer}: {' '.join(map(str, chosen[i]))}"
      for layer, chosen in experts.items()
    ]
    text = repr(tokenizer.decode([int(token)]))
    lines.append(f"{text:>12}  {'  '.join(cells)}")
  return "\n".join(lines)


def _arguments(argv):
  parser = config_lib.Parser(__doc__, prog="python -m moe_jax.generate")
  add, count = parser.add_argument, config_lib.at_least_1
  trained.add_flags(parser)
  more = {"action": "append", "required": True, "metavar": "TEXT"}
  add("--prompt", help="text to continue; repeatable: a batch", **more)
  add("--num_tokens", type=count, default=64, help="at most (default: 64)")
  add("--temperature", type=float, default=0.0, help="0: the likeliest token")
  add("--top_k", type=count, help="draw from so many likeliest tokens only")
  add("--top_p", type=float, help="draw from the likeliest up to this sum only")
  add("--seed", type=int, default=0, help="of the draws (default: 0)")
  add("--experts", action="store_true", help="print the experts of every token")
  return parser.parse_args(argv)


if __name__ == "__main__":
  command.run(main)
