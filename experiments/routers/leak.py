"""Measures what a router reads of later tokens, in bits per byte.

  python -m experiments.routers.leak runs/routers/cpu/expert_choice/*/* --json=leak.json

The same weights score the first half of every validation row twice: followed by its own
second half, and by the second half of a row of another batch. A model that looks at
earlier tokens alone scores both alike. With expert choice (2202.09368) the later tokens
compete for the slots of an expert, so that which experts an early token has tells of
them; the difference is what its bits per byte owe to them.
"""

import argparse
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import intervals
from moe_jax.core.errors import ConfigError
from moe_jax.run import command
from moe_jax.training import trained

MOST = 16  # Batches of each domain.


def halves(loaded, corpus, seq_len: int, batch_size: int) -> Iterator[tuple]:
  """(batch, the same with the second half of another one), of full batches.

  Args:
    loaded: `trained.Trained`, of a run.
    corpus: from `mixed.prepare`.
    seq_len: L.
    batch_size: B.

  Raises:
    ConfigError: the text has fewer than two batches.
  """
  from moe_jax.data import batches

  split = batches.validation_batches(
    corpus,
    seq_len=seq_len,
    batch_size=batch_size,
    batches_per_domain=MOST,
    separate_documents=loaded.config.data.separate_documents,
    begin=loaded.tokenizer.begin,
  )
  whole = [batch for _, batch in split if batch["mask"].any(1).all()]
  if len(whole) < 2:
    raise ConfigError(
      f"the validation text of {corpus.name} fills {len(whole)} batches of"
      f" {batch_size} rows, and later tokens come from another one; use more data"
    )
  names, early_L = ("inputs", "mask"), np.arange(seq_len) < seq_len // 2
  for batch, other in zip(whole, whole[1:] + whole[:1]):
    mixed = {k: np.where(early_L, batch[k], other[k]) for k in names}
    yield batch, {**batch, **mixed}


def measure(loaded, corpus, seq_len: int, batch_size: int) -> dict[str, float]:
  """Bits per byte of the first halves: {"own", "other", "difference"}."""
  bytes_V, half = jnp.asarray(corpus.num_bytes_V), seq_len // 2

  @jax.jit
  def bits(variables, batch, index):
    logits_BLV, _ = loaded.model.apply(
      variables,
      *(batch["inputs"], batch["mask"], jax.random.key(0)),
      first=index * batch_size,
      train=False,
    )
    targets, mask = (batch[k][:, :half] for k in ("targets", "mask"))
    nats = optax.softmax_cross_entropy_with_integer_labels(
      logits_BLV[:, :half].astype(jnp.float32), targets
    )
    size = jnp.where(mask, bytes_V[targets], 0).sum()
    return jnp.where(mask, nats, 0).sum() / jnp.log(2.0), size

  variables = {"balance": {}, **loaded.variables}
  total = np.zeros(3)
  for index, pair in enumerate(halves(loaded, corpus, seq_len, batch_size)):
    fed = [{k: b[k] for k in ("inputs", "targets", "mask")} for b in pair]
    (own, size), (other, _) = (bits(variables, b, np.int32(index)) for b in fed)
    total += [float(own), float(other), float(size)]
  own, other = total[:2] / total[2]
  return {"own": own, "other": other, "difference": other - own}


def main(argv=None) -> int:
  """The command."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("runs", nargs="+", metavar="DIR", help="finished runs")
  parser.add_argument("--json", metavar="PATH", help="the numbers of each run")
  args = parser.parse_args(argv)

  from moe_jax.data.text import mixed

  rows = []
  for path in args.runs:
    loaded = trained.of_run(path, dropless=False)
    data = loaded.config.data
    corpus = mixed.prepare(data, plugins=loaded.config.plugins)
    sizes = data.seq_len, loaded.config.eval.batch_size
    rows.append({"run": path, **measure(loaded, corpus, *sizes)})
    print(path, *(f"{k} {v:.4f}" for k, v in rows[-1].items() if k != "run"))
  found = [row["difference"] for row in rows]
  print(f"Later tokens are worth {intervals.words(found, 4)} bits per byte.")
  if args.json:
    command.write_json(args.json, rows)
  return 0


if __name__ == "__main__":
  command.run(main)
