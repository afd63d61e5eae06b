"""A model of a few thousand parameters, and random data for its task."""

import functools

import numpy as np

from configs import tiny
from moe_jax.data.text import corpora, tokenizers
from moe_jax.tasks import next_token
from moe_jax.training import train_step

V, L, ROWS = 257, 16, 8
BYTES = tokenizers.load().num_bytes_V


class SmallCorpus:
  """Two domains of random bytes, as `corpora.prepare` would return."""

  name, fingerprint, sources = "small", "0", {}
  about = "random bytes of a and b"
  vocab_size, domains, end_of_document = V, ("a", "b"), V - 1
  num_bytes_V, parts = BYTES, ((1.0, ("a", "b")),)
  num_tokens = {
    "train": {"a": 4000, "b": 3000},
    "validation": {"a": 200, "b": 150},
  }

  def tokens(self, split, domain):
    size = self.num_tokens[split][domain]
    low = 0 if domain == "a" else 64
    rng = np.random.default_rng(size)
    return rng.integers(low, low + 128, size).astype(np.uint16)


def config(**moe_options):
  c = tiny.get_config()
  c.data.update(name="small", seq_len=L, batch_size=2 * ROWS)
  c.model.update(d_model=16, head_dim=8)
  c.model.moe.update(d_expert=16, capacity_factor=1.0, **moe_options)
  c.model.moe.balancers = {
    "bias": {"name": "bias", "rate": 1e-2},
    "load": {"name": "switch", "coefficient": 0.1, "scope": "global_batch"},
    "z": {"name": "z_loss", "coefficient": 0.01},
  }
  c.optim.update(warmup_steps=0, schedule="constant")
  c.train.update(accumulation=2, num_steps=3, log_every=1)
  return c


def task(num_bytes_V=BYTES, length=L, mesh=None):
  """Next-token prediction without a text: the test makes its own batches.

  Args:
    num_bytes_V: bytes that each token stands for. None ends a document.
    length: tokens of a sequence.
    mesh: from `parallel.make_mesh`; None: one device.
  """
  c = config()
  c.data.update(seq_len=length, separate_documents=False)
  corpus = corpora.Corpus("none", num_bytes_V)
  return next_token.of_corpus(c, corpus, mesh)


def training(c, model, task, mesh=None):
  """(init, step) of a config: rng -> boxed state, and
  (state, batch, numbers) -> (state, sums). `mesh` is for `train_step.once`."""
  parts, numbers = (
    train_step.parts(c, model, task),
    train_step.numbers(c, model),
  )
  init = functools.partial(train_step.init_state, **parts, numbers=numbers)
  once = train_step.once(c, mesh)
  return init, functools.partial(train_step.train_step, **parts, once=once)
