"""Loss and routing metrics of any weights on a text: of a run, or published.

python -m moe_jax.evaluate --hf=PATH --dataset=python_sources
"""

import argparse
import dataclasses
import functools
import json
import sys

import numpy as np

from moe_jax.core.errors import ConfigError
from moe_jax.run import config as config_lib
from moe_jax.training import trained


def main(argv=None) -> int:
  """The command."""
  parser = argparse.ArgumentParser(
    prog="python -m moe_jax.evaluate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  trained.add_flags(parser)
  add("--dataset", required=True, help="as config.data.name has it")
  add("--data_dir", metavar="DIR", help="folder of a prepared TFDS dataset")
  add("--seq_len", type=config_lib.at_least_1, default=256)
  add("--batch_size", type=config_lib.at_least_1, default=8)
  add("--batches_per_domain", type=config_lib.at_least_1, help="default: all")
  add("--json", type=str, metavar="PATH", help="metrics, and shares of experts")
  args = parser.parse_args(argv)

  import jax

  from moe_jax.core import parallel
  from moe_jax.data import batches, mixture
  from moe_jax.training import evaluation

  found = trained.load(args)
  shards = parallel.token_shards(found.model.arch.mesh)
  if args.batch_size % shards:
    raise ConfigError(
      f"--batch_size={args.batch_size} does not divide over {shards} devices of"
      " --mesh along data, fsdp and expert; give a multiple"
    )
  if not found.ends:
    raise ConfigError(
      f"{args.hf}/config.json has no eos_token_id, which ends a document; add it"
    )
  corpus = mixture.prepare(_data(args, found.tokenizer.name))
  # The tokenizer's end is one token more than the model may have.
  own_end, end = found.tokenizer.end, found.ends[0]
  arch = dataclasses.replace(found.model.arch, end_of_document=end)
  model = found.model.clone(arch=arch)
  sizes_V = np.zeros(max(arch.vocab_size, corpus.vocab_size), np.int32)
  sizes_V[: corpus.vocab_size] = corpus.num_bytes_V
  compiled = jax.jit(
    functools.partial(evaluation.eval_step, model=model, num_bytes_V=sizes_V)
  )

  def step(batch, index):
    for name in ("inputs", "targets"):
      batch[name] = np.where(batch[name] == own_end, end, batch[name])
    variables = found.variables
    return compiled(
      variables["params"], variables.get("balance", {}), batch, np.int32(index)
    )

  split = batches.validation_batches(
    corpus,
    seq_len=args.seq_len,
    batch_size=args.batch_size,
    batches_per_domain=args.batches_per_domain,
    separate_documents=True,
  )
  sums = evaluation.by_domain(step, split)
  values = evaluation.table(sums, arch.segments, arch.recipe)
  for name, value in values.items():
    print(f"{name:32}{value:12.4f}")
  rows = []
  if arch.recipe is not None:
    rows = evaluation.specialisation(sums, arch.segments)
    print(
      f"\nThe most used experts of each domain:\n\n{evaluation.describe(rows)}"
    )
  if args.json:
    try:
      with open(args.json, "w") as f:
        json.dump({"metrics": values, "shares": rows}, f, indent=2)
    except OSError as e:
      raise ConfigError(
        f"cannot write --json={args.json} ({e.strerror}); choose another path"
      ) from None
  return 0


def _data(args, tokenizer: str) -> dict:
  """The section `data` of a config, of the command's flags."""
  return {
    "name": args.dataset,
    "dir": args.data_dir,
    "text_feature": "text",
    "domain_feature": "domain",
    "mixture": {},
    "tokenizer": tokenizer,
    "cache_dir": None,
  }


if __name__ == "__main__":
  config_lib.run(lambda: main(sys.argv[1:]))
