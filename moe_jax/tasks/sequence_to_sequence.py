"""The loss and the metrics that all tasks of an encoder-decoder share."""

import functools
import inspect
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.core.errors import ConfigError
from moe_jax.models.encoder_decoder import Text
from moe_jax.moe.types import Array, Mean
from moe_jax.tasks import Task
from moe_jax.tasks.next_token import cross_entropy, squared_log_z


def scoring(
  lengths: Mapping[str, int],
  vocab_size: int,
  *,
  num_bytes_V: np.ndarray | None = None,
  z_loss: float = 0.0,
  label_smoothing: float = 0.0,
  mesh=None,
  **data,
) -> Task:
  """Returns the task of batches as `spans` and `pairs` have them.

  Args:
    lengths: {"inputs": tokens of a row of inputs, "targets": of targets}.
    vocab_size: V, of both sides.
    num_bytes_V: bytes of text that each token stands for, to report bits per
      byte of the targets' text; None: they are not reported.
    z_loss: coefficient of log(Z)^2, mean over targets, which is minimised; Z is
      the sum of the output's softmax.
    label_smoothing: share of a target's probability that all tokens have equal
      parts of, when it is minimised (1512.00567, 7). The reported loss is
      without both.
    mesh: from `parallel.make_mesh`; None: one device.
    **data: fields of `Task` that depend on the data; none: no batches.
  """

  def loss(model, variables, batch, rng, first, train, collect=None):
    """`Task.loss`, whose sums are over targets."""
    options = {"first": first, "train": train, "collect": collect}
    logits_BLV, aux = model.apply(variables, *_texts(batch), rng, **options)
    targets, mask = batch["targets"], batch["targets_mask"]
    mean = cross_entropy(logits_BLV, targets, mask)
    right = (logits_BLV.argmax(axis=-1) == targets) & mask
    sums = {"cross_entropy": mean.total, "right": right.sum()}
    if num_bytes_V is not None:
      sizes_BL = jnp.where(mask, jnp.asarray(num_bytes_V)[targets], 0)
      sums["bytes"] = sizes_BL.sum()
    more = _more(logits_BLV, mask, mean.total, z_loss, label_smoothing)
    return mean + Mean(more, 0), sums, aux

  return Task(
    spec=_spec(lengths),
    weight=lambda batch: batch["targets_mask"].sum(),
    loss=loss,
    metrics=_metrics,
    by_domain=("neg_log_perplexity",),
    lengths=dict(lengths),
    given={"vocab_size": vocab_size, "end_of_document": None},
    check=_check,
    **data,
  )


def _texts(batch):
  """(The text that the encoder reads, the text that the decoder reads)."""
  inputs, targets = (
    (batch[f"{side}_mask"], batch[f"{side}_document"])
    for side in ("inputs", "targets")
  )
  return Text(batch["inputs"], *inputs), Text(batch["decoder_inputs"], *targets)


def _more(logits_BLV, mask_BL, total, z_loss, label_smoothing):
  """The terms that are minimised beside the cross-entropy, whose sum is `total`."""
  more = jnp.zeros_like(total)
  if label_smoothing:
    more += label_smoothing * (
      uniform_cross_entropy(logits_BLV, mask_BL) - total
    )
  if z_loss:
    more += z_loss * squared_log_z(logits_BLV, mask_BL)
  return more


def vocab_size(corpus, rows, sentinels: Sequence[int] = ()) -> int:
  """Returns V: the tokens of a corpus, and the further tokens of its rows.

  Args:
    corpus: of the run.
    rows: a `spans.Corruption` or a `pairs.Packing`.
    sentinels: of its spans.
  """
  # The last token ends a document; `rows.end`, if it is set, takes its place.
  own = corpus.vocab_size - (rows.end is not None)
  given = [x for x in (rows.end, rows.start) if x is not None]
  return max(own, *(int(x) + 1 for x in (*given, *sentinels)), 1)


def of_corpus(config, corpus, data, **how) -> dict:
  """Returns the fields of `Task` that depend on the text.

  Args:
    config: of the run.
    corpus: from `mixed.prepare`; without text, the task has no batches.
    data: the module that makes batches of it, `spans` or `pairs`.
    **how: the argument of its functions that describes rows.
  """
  (rows,) = how.values()
  return {
    "end": rows.end,
    "start": rows.start,
    "train": functools.partial(
      data.train_batches,
      corpus,
      **how,
      batch_size=config.data.batch_size,
      accumulation=config.train.accumulation,
    ),
    "validation": functools.partial(
      data.validation_batches,
      corpus,
      **how,
      batch_size=config.eval.batch_size,
      batches_per_domain=config.eval.batches_per_domain,
    ),
    "domains": tuple(corpus.domains),
    "name": corpus.name,
    "about": corpus.about,
    "fingerprint": corpus.fingerprint,
    "sources": corpus.sources,
  }


def uniform_cross_entropy(logits_BLV: Array, mask_BL: Array) -> Array:
  """Returns the sum over unpadded tokens of the mean over all v of -log p(v).

  Args:
    logits_BLV, mask_BL: as in `next_token.cross_entropy`.
  """
  log_p_BL = jax.nn.log_softmax(logits_BLV, axis=-1).mean(axis=-1)
  return -jnp.where(mask_BL, log_p_BL, 0).sum()


def _spec(lengths):
  """`Task.spec` of a batch."""
  spec = {}
  for side, length in lengths.items():
    tokens = jax.ShapeDtypeStruct((length,), jnp.int32)
    mask = jax.ShapeDtypeStruct((length,), jnp.bool_)
    spec |= {side: tokens, f"{side}_mask": mask, f"{side}_document": tokens}
  return spec | {"decoder_inputs": spec["targets"]}


def _metrics(loss: Mean, sums) -> dict[str, Mean]:
  """Means over target tokens: nats, their negative, the share predicted right.

  They include bits per byte of the targets' text, if bytes are counted.
  """
  total, number = sums["cross_entropy"], loss.weight
  metrics = {
    "loss": Mean(total, number),
    "neg_log_perplexity": Mean(-total, number),
    "accuracy": Mean(sums["right"], number),
  }
  if "bytes" in sums:
    metrics["bits_per_byte"] = Mean(total / math.log(2), sums["bytes"])
  return metrics


def _check(model) -> None:
  """Raises ConfigError for a model that does not take two texts."""
  names = [*inspect.signature(type(model).__call__).parameters]
  if names[1:3] != ["inputs", "targets"]:
    raise ConfigError(
      f"the task has inputs and targets, and the model {type(model).__name__}"
      f" takes {', '.join(names[1:3])}; set model.name = encoder_decoder, or change"
      " task.name"
    )
