"""Measures the input pipeline, in tokens per second.

python -m benchmarks.input [--json=PATH]

Prepares the built-in corpus where it is not prepared yet, reads training
batches in order, rows cut from documents one after the other and these kept
apart by the mask, and prints the median of several runs. The first batches,
which load the corpus from the disk, are not timed.
"""

import argparse
import json
import pathlib
import statistics
import time

from moe_jax.data import batches
from moe_jax.data.text import corpora
from moe_jax.run import command
from moe_jax.run import config as config_lib


def main() -> int:
  """The command."""
  args = _arguments()
  start = time.perf_counter()
  corpus = corpora.prepare(args.dataset, data_dir=args.data_dir)
  prepare_s = time.perf_counter() - start
  stream = batches.train_batches(
    corpus,
    seq_len=args.seq_len,
    batch_size=args.batch_size,
    seed=0,
    separate_documents=True,
  )
  rates = measure(stream, args.batch_size * args.seq_len, args.steps, args.runs)
  result = {
    "dataset": args.dataset,
    "fingerprint": corpus.fingerprint,
    "seq_len": args.seq_len,
    "batch_size": args.batch_size,
    "prepare_seconds": round(prepare_s, 2),
    "tokens_per_second": round(statistics.median(rates)),
    "lowest": round(min(rates)),
    "highest": round(max(rates)),
  }
  print(json.dumps(result, indent=2))
  if args.json:
    args.json.write_text(json.dumps(result, indent=2) + "\n")
  return 0


def measure(stream, tokens_per_step: int, steps: int, runs: int) -> list[float]:
  """Returns the tokens per second of each run of so many steps."""
  for step in range(10):
    stream[step]
  rates = []
  for run in range(runs):
    start = time.perf_counter()
    for step in range(run * steps, (run + 1) * steps):
      stream[step]
    rates.append(steps * tokens_per_step / (time.perf_counter() - start))
  return rates


def _arguments():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--dataset", default="python_sources")
  parser.add_argument("--data_dir", help="a prepared TFDS dataset to read")
  parser.add_argument("--seq_len", type=config_lib.at_least_1, default=256)
  parser.add_argument("--batch_size", type=config_lib.at_least_1, default=16)
  parser.add_argument(
    "--steps", type=config_lib.at_least_1, default=500, help="steps of a run"
  )
  parser.add_argument("--runs", type=config_lib.at_least_1, default=7)
  parser.add_argument("--json", type=pathlib.Path, help="also write it there")
  return parser.parse_args()


if __name__ == "__main__":
  command.run(main)
