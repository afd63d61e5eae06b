"""Classifies scikit-learn's 8 x 8 images of digits, in ten classes."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.moe.types import Mean
from moe_jax.tasks import Task

HELD_OUT = 360  # Images at the end.


def build(config, mesh=None, fingerprint=None, prepare=True) -> Task:
  """The task of a config; see `moe_jax/tasks/next_token.py`."""
  del fingerprint, prepare
  from sklearn import datasets

  data = datasets.load_digits()
  images = (data.images / 16).astype(np.float32)
  labels = data.target.astype(np.int32)
  size = config.data.batch_size
  micro = size // config.train.accumulation

  def batch(index, weight):
    return {"image": images[index], "label": labels[index], "weight": weight}

  class Train:
    def __init__(self, seed, rows):
      self.seed, self.rows = seed, slice(None) if rows is None else rows

    def __getitem__(self, step):
      rng = np.random.default_rng((self.seed, step))
      index = rng.choice(len(images) - HELD_OUT, size, replace=False)
      index = index.reshape(-1, micro)[:, self.rows]
      return batch(index, np.ones(index.shape, np.float32))

  def validation(rows=None):
    rows = np.arange(config.eval.batch_size) if rows is None else rows
    for domain, odd in (("even", 0), ("odd", 1)):
      held = np.arange(len(images) - HELD_OUT, len(images))
      held = held[labels[held] % 2 == odd]
      for start in range(0, len(held), config.eval.batch_size):
        there = start + rows
        index = held[np.minimum(there, len(held) - 1)]
        yield domain, batch(index, (there < len(held)).astype(np.float32))

  def loss(model, variables, batch, rng, first, train):
    logits, aux = model.apply(
      variables, batch["image"], rng, first=first, train=train
    )
    label, weight = batch["label"], batch["weight"]
    log_p = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_p, label[:, None], axis=1)[:, 0]
    right = (logits.argmax(-1) == label) * weight
    sums = {"right": right.sum()}
    return Mean((nll * weight).sum(), weight.sum()), sums, aux

  return Task(
    given={"num_classes": 10, "image_size": 8},
    spec={
      "image": jax.ShapeDtypeStruct((8, 8), jnp.float32),
      "label": jax.ShapeDtypeStruct((), jnp.int32),
      "weight": jax.ShapeDtypeStruct((), jnp.float32),
    },
    train=lambda seed, rows=None: Train(seed, rows),
    validation=validation,
    weight=lambda batch: batch["weight"].sum(),
    loss=loss,
    metrics=lambda loss, sums: {
      "loss": loss,
      "error": Mean(loss.weight - sums["right"], loss.weight),
    },
    by_domain=("error",),
    lengths={"inputs": 16},
    name="digits",
    fingerprint=hashlib.sha256(images.tobytes()).hexdigest(),
    sources={"scikit-learn": "load_digits"},
  )
