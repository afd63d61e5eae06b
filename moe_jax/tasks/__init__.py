"""Tasks by name: what is learned, from which batches."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from moe_jax.moe.types import Array, Mean

Batch = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Task:
  """A learning task: its loss, its metrics and its data.

  Each file of this folder has build(config, mesh=None, fingerprint=None,
  prepare=True) -> Task; see `tasks/next_token.py`.

  spec: {array of a batch: shape and dtype of one example}.
  weight: batch of a step -> the sum of the weights of its losses.
  loss: (model, variables, batch, rng, first, train, collect=None) -> (Mean to
    minimise, sums, aux). rng is the key of the step, None outside of training
    for models without noise; first is the index of the first example in the
    step's batch; collect is an argument of the model, for traces; sums are
    arrays that add up over batches; aux is the model's.
  metrics: (loss, sums) -> {name: Mean}, on the host.
  by_domain: metrics that are also reported for every domain.
  lengths: {array of a batch: tokens of a sequence, which groups are made of},
    for every sequence that has layers, see `types.Sublayer`; without those that
    a model makes itself, see `models.lengths`.
  given: arguments of `models.build` beside the model's section.
  train: (seed, rows) -> batches by step, arrays [A, B/A, ...]: those rows of
    each of A micro-batches. A step's batch depends on seed and step alone.
  validation: rows -> pairs of a domain and a batch, arrays [B, ...], always in
    the same order.
  domains: their names, in the order of the numbers that "domain" of a batch
    has.
  check: model -> None, raises ConfigError for a model that does not fit.
  few_shot: (model, variables, shots, batch_size) -> metrics, see `few_shot`;
    None: it has no classes to learn from a few examples.
  check_few_shot: shots -> None, raises ConfigError for too few examples.
  pictures: (model, variables) -> {name: bytes [height, width, 3]}, for the hook
    `pictures`; None: there are none.
  name: of the data.
  about: the size of the data and its domains, in words.
  fingerprint: changes when the data does.
  sources: {name: version} of everything that the data was made from, for
    run.json.
  end, start: the token that ends a text, and the token that an encoder-decoder
    begins to write with; None: the tokenizer's end, and `end`.
  """

  spec: Mapping[str, jax.ShapeDtypeStruct]
  weight: Callable[[Batch], Array]
  loss: Callable[..., tuple[Mean, Mapping[str, Array], Mapping]]
  metrics: Callable[..., dict[str, Mean]]
  by_domain: tuple[str, ...]
  lengths: Mapping[str, int] = dataclasses.field(default_factory=dict)
  given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  train: Callable[..., Any] | None = None
  validation: Callable[..., Iterator[tuple[str, Batch]]] | None = None
  domains: tuple[str, ...] = ()
  check: Callable[[Any], None] = lambda model: None
  few_shot: Callable[..., Mapping[str, float]] | None = None
  check_few_shot: Callable[[Any], None] = lambda shots: None
  pictures: Callable[..., Mapping[str, Any]] | None = None
  name: str = ""
  about: str = ""
  fingerprint: str = ""
  sources: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  end: int | None = None
  start: int | None = None


PART = Task  # The record that `build` of each file returns.
# Files of this folder that are no tasks.
SHARED = ("bleu", "few_shot", "pictures", "replay", "sequence_to_sequence")
