"""Next-token prediction: the cross-entropy of a decoder on text."""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.core.errors import ConfigError
from moe_jax.core.options import (
  integer,
  items,
  labelled,
  number,
  optional,
  text,
)
from moe_jax.data import batches
from moe_jax.data.text import mixed
from moe_jax.moe.types import Array, Mean
from moe_jax.tasks import Task
from moe_jax.tasks.replay import Replay
from moe_jax.training import evaluation, traces


def build(
  config,
  mesh=None,
  fingerprint: str | None = None,
  prepare: bool = True,
  replay: optional(text()) = None,
  z_loss: number(0) = 0.0,
  token_ranges: labelled(items((integer(0), integer(1)))) = {},  # noqa: B006
) -> Task:
  """Returns the task of a config, with its text prepared.

  Args:
    config: a whole config, of which `data`, `train.accumulation`, `eval`,
      `plugins` and, for a replay, `train.num_steps` are read.
    mesh: from `parallel.make_mesh`; None: one device.
    fingerprint: of the data, for a run that goes on; None: any.
    prepare: whether there are to be batches; without them only the tokenizer is
      read.
    replay: folder of the traces of a run, whose experts are forced on the
      tokens of this one, see `replay`; None: the router chooses.
    z_loss, token_ranges: see `scoring`.

  Raises:
    ConfigError: no such data, or impossible numbers.
  """
  corpus = mixed.of_config(config, fingerprint, prepare)
  steps = config.train.num_steps if prepare else 1
  recorded = None if replay is None else Replay(replay, steps)
  options = {"z_loss": z_loss, "token_ranges": token_ranges}
  return of_corpus(config, corpus, mesh, recorded, **options)


def of_corpus(config, corpus, mesh=None, recorded=None, **options) -> Task:
  """Returns the task of a config on text that is prepared already.

  Args:
    config, mesh: as in `build`.
    corpus: from `mixed.prepare`; without text, the task has no batches.
    recorded: the `Replay` of another run, or None.
    **options: z_loss and token_ranges of `scoring`.
  """
  data = config.data

  end = corpus.end_of_document if data.separate_documents else None
  task = scoring(
    np.asarray(corpus.num_bytes_V, np.int32),
    data.seq_len,
    **options,
    given={"vocab_size": corpus.vocab_size, "end_of_document": end},
    train=functools.partial(
      batches.train_batches,
      corpus,
      seq_len=data.seq_len,
      batch_size=data.batch_size,
      accumulation=config.train.accumulation,
      separate_documents=data.separate_documents,
    ),
    validation=functools.partial(
      batches.validation_batches,
      corpus,
      seq_len=data.seq_len,
      batch_size=config.eval.batch_size,
      batches_per_domain=config.eval.batches_per_domain,
      separate_documents=data.separate_documents,
    ),
    domains=tuple(corpus.domains),
    name=corpus.name,
    about=corpus.about,
    fingerprint=corpus.fingerprint,
    sources=corpus.sources,
  )
  return task if recorded is None else _replayed(task, recorded)


def _replayed(task, recorded):
  """The task with experts from a trace."""
  train, validation = task.train, task.validation
  spec = {**task.spec, "replayed": recorded.spec(task.lengths["inputs"])}
  return dataclasses.replace(
    task,
    spec=spec,
    check=recorded.check,
    train=lambda *args, **kwargs: recorded.train(train(*args, **kwargs)),
    validation=lambda *args, **kwargs: (
      (domain, recorded.none(batch))
      for domain, batch in validation(*args, **kwargs)
    ),
  )


def scoring(
  num_bytes_V: np.ndarray,
  seq_len: int,
  *,
  z_loss: float = 0.0,
  token_ranges: Mapping[str, tuple[int, int]] = {},  # noqa: B006
  **data,
) -> Task:
  """Returns the task of any batch: its losses and metrics.

  Args:
    num_bytes_V: bytes of text that each token stands for.
    seq_len: L.
    z_loss: coefficient of the mean log(Z)^2, which is minimised, not reported;
      Z is the sum of the output's softmax (GLaM, 2112.06905, takes 1e-4).
    token_ranges: {name: (first, end)} of the vocabulary, such as the codes of
      images. Targets in a range have a metric loss_NAME.
    **data: fields of `Task` that depend on the data; none: no batches.

  Raises:
    ConfigError: a range does not lie in the vocabulary.
  """

  def loss(model, variables, batch, rng, first, train, collect=None):
    """`Task.loss`, which also counts the bytes of text of the targets."""
    options = {"first": first, "train": train, "collect": collect}
    options["replayed"] = batch.get("replayed")
    tokens = batch["inputs"], batch["mask"]
    logits_BLV, aux = model.apply(variables, *tokens, rng, **options)
    targets, mask = batch["targets"], batch["mask"]
    num_bytes_BL = jnp.where(mask, jnp.asarray(num_bytes_V)[targets], 0)
    sums = {"bytes": num_bytes_BL.sum()}
    mean = cross_entropy(logits_BLV, targets, mask)
    for name, (first_token, end) in token_ranges.items():
      own = mask & (targets >= first_token) & (targets < end)
      sums[f"loss_{name}"] = cross_entropy(logits_BLV, targets, own)
    if z_loss:
      sums["cross_entropy"] = mean.total
      mean += Mean(z_loss * squared_log_z(logits_BLV, mask), 0)
    return mean, sums, aux

  for name, (first, end) in token_ranges.items():
    if not first < end <= len(num_bytes_V):
      raise ConfigError(
        f"task.token_ranges.{name} = {(first, end)} is no range of the {len(num_bytes_V)}"
        " tokens; give (first, end) with first below end"
      )
  tokens = jax.ShapeDtypeStruct((seq_len,), jnp.int32)
  mask = jax.ShapeDtypeStruct((seq_len,), jnp.bool_)
  return Task(
    spec={"inputs": tokens, "targets": tokens, "mask": mask},
    weight=lambda batch: batch["mask"].sum(),
    loss=loss,
    metrics=functools.partial(
      _metrics, names=[f"loss_{name}" for name in token_ranges]
    ),
    by_domain=("bits_per_byte",),
    lengths={"inputs": seq_len},
    **data,
  )


def cross_entropy(logits_BLV: Array, target_BL: Array, mask_BL: Array) -> Mean:
  """Returns -log p(target), in nats, over unpadded tokens.

  Args:
    logits_BLV: any numbers.
    target_BL: int32 in [0, V).
    mask_BL: bool, False for padding.
  """
  log_p_BLV = jax.nn.log_softmax(logits_BLV, axis=-1)
  log_p_BL1 = jnp.take_along_axis(log_p_BLV, target_BL[..., None], axis=-1)
  total = jnp.where(mask_BL, -log_p_BL1[..., 0], 0).sum()
  return Mean(total, mask_BL.sum().astype(total.dtype))


def squared_log_z(logits_BLV: Array, mask_BL: Array) -> Array:
  """Returns the sum over unpadded tokens of log(Z)^2, Z their softmax's sum.

  Args:
    logits_BLV, mask_BL: as in `cross_entropy`.
  """
  log_z_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
  # Masked before the square, whose gradient may be infinite at padding.
  return jnp.square(jnp.where(mask_BL, log_z_BL, 0)).sum()


def _metrics(loss: Mean, sums, names=()) -> dict[str, Mean]:
  """Cross-entropy in nats per token and in bits per byte of text, and of ranges."""
  loss = Mean(sums.get("cross_entropy", loss.total), loss.weight)
  bits = loss.total / math.log(2)
  of_ranges = {name: sums[name] for name in names}
  return {"loss": loss, "bits_per_byte": Mean(bits, sums["bytes"]), **of_ranges}


def on_corpus(
  loaded,
  corpus,
  *,
  separate_documents: bool = True,
  trace: traces.Writer | None = None,
  **batching,
) -> tuple[Task, dict]:
  """Scores weights on a text.

  Args:
    loaded: a `trained.Trained`; the first of its `ends` ends a document.
    corpus: from `mixed.prepare`, tokens of the same tokenizer.
    separate_documents: no attention or loss across their ends.
    trace: takes the tokens' choices; None: nothing is recorded.
    **batching: seq_len, batch_size, batches_per_domain of
      `batches.validation_batches`.

  Returns:
    The task, and {domain: summed `evaluation.eval_step`}.
  """
  end, own_end = loaded.ends[0], loaded.tokenizer.end
  arch = dataclasses.replace(
    loaded.model.arch, end_of_document=end if separate_documents else None
  )
  sizes_V = np.zeros(max(arch.vocab_size, corpus.vocab_size), np.int32)
  sizes_V[: corpus.vocab_size] = corpus.num_bytes_V
  task = scoring(sizes_V, batching["seq_len"])
  model = loaded.model.clone(arch=arch)
  collect = trace is not None
  score = functools.partial(
    evaluation.eval_step, model=model, task=task, collect=collect
  )
  compiled = jax.jit(score)
  variables = {"balance": {}, **loaded.variables}

  def step(whole, index):
    batch = {k: whole[k] for k in task.spec}
    for name in ("inputs", "targets"):
      # The tokenizer's end is one token more than the model may have.
      batch[name] = np.where(batch[name] == own_end, end, batch[name])
    sums = compiled(**variables, batch=batch, index=np.int32(index))
    if collect:
      trace.add(whole, jax.device_get(sums.pop("routing")))
    return sums

  split = batches.validation_batches(
    corpus,
    separate_documents=separate_documents,
    begin=loaded.tokenizer.begin,
    **batching,
  )
  return task, evaluation.by_domain(step, split)
