"""The tasks of an encoder-decoder: losses, metrics, and what models are told."""

import math
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from moe_jax import models
from moe_jax.core.errors import ConfigError
from moe_jax.data import pairs, spans
from moe_jax.data.text import corpora
from moe_jax.models.encoder_decoder import Text
from moe_jax.tasks import sequence_to_sequence, span_corruption, translation
from moe_jax.training import program
from tests import small

V = small.V
LENGTHS = {"inputs": 4, "targets": 3}


def model_of(logits_BLV):
  """A model that always has these logits, and keeps what it is called with."""
  model = types.SimpleNamespace()

  def apply(*args, **options):
    model.args, model.options = args, options
    return logits_BLV, {"of": "model"}

  model.apply = apply
  return model


def batch_of(targets, mask):
  targets, mask = np.array(targets, np.int32), np.array(mask)
  return {
    "inputs": np.arange(8, dtype=np.int32).reshape(2, 4),
    "inputs_mask": np.ones((2, 4), bool),
    "inputs_document": np.zeros((2, 4), np.int32),
    "targets": targets,
    "targets_mask": mask,
    "targets_document": 0 * targets,
    "decoder_inputs": targets + 1,
    "domain": np.zeros(2, np.int32),
  }


MASK = [[True, True, False], [True, False, False]]


def scored(logits_BLV, batch, **options):
  task = sequence_to_sequence.scoring(LENGTHS, logits_BLV.shape[-1], **options)
  model = model_of(logits_BLV)
  loss, sums, aux = task.loss(model, {}, batch, "key", 7, train=True)
  assert aux == {"of": "model"}
  assert task.weight(batch) == loss.weight
  values = {k: float(m.value()) for k, m in task.metrics(loss, sums).items()}
  return model, float(loss.value()), values


def test_loss_and_metrics_are_those_of_unpadded_targets():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(2, 3, 5)).astype(np.float32)
  targets = logits.argmax(-1)
  targets[0, 1] = logits[0, 1].argmin()  # One of three is wrong.
  total, squares, uniform = 0.0, 0.0, 0.0
  for b, t in zip(*np.nonzero(MASK)):
    e_V = np.exp(np.float64(logits[b, t]))
    total -= math.log(e_V[targets[b, t]] / e_V.sum())
    squares += math.log(e_V.sum()) ** 2
    uniform -= np.log(e_V / e_V.sum()).mean()
  padding = ~np.array(MASK)
  logits[padding], targets[padding] = 1e30, 0  # Which would be right.
  batch = batch_of(targets, MASK)
  _, minimised, values = scored(logits, batch)
  np.testing.assert_allclose(minimised, total / 3, rtol=1e-6)
  want = {
    "loss": total / 3,
    "neg_log_perplexity": -total / 3,
    "accuracy": 2 / 3,
  }
  assert values.keys() == want.keys()
  for key, value in want.items():
    np.testing.assert_allclose(values[key], value, rtol=1e-6)
  # These coefficients change what is minimised, and nothing that is reported.
  for options, want in (
    ({"z_loss": 0.5}, total + 0.5 * squares),
    ({"label_smoothing": 0.1}, 0.9 * total + 0.1 * uniform),
  ):
    _, more, same = scored(logits, batch, **options)
    np.testing.assert_allclose(more, want / 3, rtol=1e-6)
    assert same == values


def test_bits_per_byte_are_of_the_text_of_the_targets():
  batch = batch_of([[1, 4, 2], [0, 1, 1]], MASK)
  sizes = np.array([1, 3, 9, 9, 0], np.int32)  # Token 4 ends a text.
  _, _, values = scored(
    np.zeros((2, 3, 5), np.float32), batch, num_bytes_V=sizes
  )
  want = 3 * math.log2(5) / (3 + 0 + 1)
  np.testing.assert_allclose(values["bits_per_byte"], want, rtol=1e-6)


def test_padding_reaches_no_gradient():
  logits = np.ones((2, 3, 5), np.float32)
  logits[~np.array(MASK)] = 3e38
  batch = batch_of(np.zeros((2, 3)), MASK)
  task = sequence_to_sequence.scoring(LENGTHS, 5, z_loss=0.1)

  def total(logits):
    loss, *_ = task.loss(model_of(logits), {}, batch, None, 0, train=True)
    return loss.total

  gradient = jax.grad(total)(logits)
  assert np.isfinite(gradient).all()
  assert (gradient[~np.array(MASK)] == 0).all()
  assert (gradient[np.array(MASK)] != 0).all()


def test_what_the_model_is_called_with():
  batch = batch_of(np.ones((2, 3)), MASK)
  model, *_ = scored(np.zeros((2, 3, 5), np.float32), batch)
  variables, inputs, targets, rng = model.args
  assert (variables, rng) == ({}, "key")
  assert model.options == {"first": 7, "train": True, "collect": None}
  for text, names in (
    (inputs, ("inputs", "inputs_mask", "inputs_document")),
    (targets, ("decoder_inputs", "targets_mask", "targets_document")),
  ):
    assert isinstance(text, Text)
    for array, name in zip(text, names):
      np.testing.assert_array_equal(array, batch[name])


# The tasks of configs.


class PairCorpus(small.SmallCorpus):
  """Each text of `SmallCorpus` is four tokens and an end."""

  def tokens(self, split, domain):
    tokens = super().tokens(split, domain).copy()
    tokens[4::5] = V - 1
    return tokens[: tokens.size // 10 * 10]


def span_task(**options):
  c = small.config()
  own = {"inputs_length": small.L, "separate_documents": True}
  corruption = spans.Corruption(**own | options)
  return span_corruption.of_corpus(c, small.SmallCorpus(), corruption)


def pair_task(**options):
  own = {"inputs_length": small.L, "targets_length": 10}
  packing = pairs.Packing(**own | options)
  return translation.of_corpus(small.config(), PairCorpus(), packing)


TASKS = {"span_corruption": span_task, "translation": pair_task}


@pytest.mark.parametrize("name", TASKS)
def test_the_spec_is_that_of_the_batches(name):
  task = TASKS[name]()
  micro = small.config().data.batch_size // 2
  stream = task.train(0, None)
  batch = stream[0]
  for key, x in task.spec.items():
    assert (batch[key].shape, batch[key].dtype) == (
      (2, micro, *x.shape),
      x.dtype,
    )
  assert batch.keys() == {*task.spec, "domain"}
  assert task.lengths == {k: batch[k].shape[-1] for k in ("inputs", "targets")}
  some = task.train(0, np.arange(2))[0]
  np.testing.assert_array_equal(some["targets"], batch["targets"][:, :2])
  for domain, batch in task.validation(None):
    for key, x in task.spec.items():
      assert batch[key].shape == (small.config().eval.batch_size, *x.shape)
    assert domain in task.domains
  assert (task.name, task.fingerprint) == ("small", "0")
  assert task.by_domain == ("neg_log_perplexity",)


def test_what_the_model_is_told():
  """The vocabulary with its sentinels, and no end of a document."""
  own = spans.Corruption(inputs_length=512)
  assert own.num_sentinels == 28
  task = span_corruption.of_corpus(
    small.config(), corpora.Corpus("none", small.BYTES), own
  )
  assert task.given == {"vocab_size": V + 28, "end_of_document": None}
  assert task.lengths == {"inputs": 512, "targets": 114}
  assert pair_task().given == {"vocab_size": V, "end_of_document": None}


@pytest.mark.parametrize(
  "name, own, size",
  [
    ("span_corruption", {"end": 1, "start": 0, "sentinels": (300, -1)}, 301),
    ("span_corruption", {"end": 1, "start": 0, "sentinels": (3, 1)}, V - 1),
    ("span_corruption", {"end": 1, "start": 0}, None),
    ("translation", {"end": 1, "start": 0}, V - 1),
    ("translation", {"start": 400}, 401),
  ],
)
def test_tokens_that_a_published_model_knows(name, own, size):
  """In the place of ours and of nothing else; the model has these alone."""
  spans_of_a_row = {} if name == "translation" else {"noise_density": 0.45}
  task, usual = (TASKS[name](**given, **spans_of_a_row) for given in (own, {}))
  assert task.given["vocab_size"] == (size or usual.given["vocab_size"])
  assert (task.end, task.start) == (own.get("end"), own.get("start"))
  batch, old = (made.train(0, None)[0] for made in (task, usual))
  end, start = own.get("end", V - 1), own.get("start", V - 1)
  first, step = own.get("sentinels", (V, 1))
  ours = {V - 1: end} | {V + n: first + step * n for n in range(9)}
  replace = np.vectorize(lambda token: ours.get(token, token))
  for side in ("inputs", "targets"):
    mask = old[f"{side}_mask"]
    wanted = np.where(mask, replace(old[side]), 0)
    np.testing.assert_array_equal(batch[side], wanted)
    assert (old[side] == V - 1).any()
  if name != "translation":
    assert (old["inputs"] >= V).sum(axis=-1).min() > 1
  before = old["decoder_inputs"]
  document = old["targets_document"]
  begins = np.ones_like(document, bool)
  begins[..., 1:] = document[..., 1:] != document[..., :-1]
  wanted = np.where(begins, start, replace(before)) * old["targets_mask"]
  np.testing.assert_array_equal(batch["decoder_inputs"], wanted)
  domain, batch = next(iter(task.validation(None)))
  assert (batch["inputs"] == end).any()
  assert ((batch["inputs"] == V - 1).any()) == ("end" not in own)


@pytest.mark.parametrize("name", TASKS)
def test_the_tokenizer_alone_gives_a_task_of_the_same_shapes(name):
  """The task without its data, as for counting parameters or for a plan."""
  c = tiny.get_config()
  c.task = {"name": name, "targets_length": 40, "z_loss": 1e-4}
  c.data.name = "nothing_that_is_there"
  task = program.build_task(c, prepare=False)
  assert task.lengths == {"inputs": 64, "targets": 40}
  assert task.given["vocab_size"] == V + 3 * (name == "span_corruption")
  c.task = {"name": name}
  lengths = program.build_task(c, prepare=False).lengths
  assert lengths["targets"] == {"span_corruption": 14, "translation": 64}[name]


def test_options_reach_the_batches():
  c = tiny.get_config()
  c.task = {"name": "translation", "packing": False, "too_long": "drop"}
  special = {"end": 1, "start": 0}
  c.task.update(special)
  made = program.build_task(c, prepare=False)
  want = pairs.Packing(
    inputs_length=64,
    targets_length=64,
    several=False,
    too_long="drop",
    **special,
  )
  for call in (made.train, made.validation):
    assert call.keywords["packing"] == want
  special["sentinels"] = (300, -1)
  c.task = {"name": "span_corruption", "mean_span": 4.0, "noise_density": 0.2}
  c.task.update(special)
  for separate in (True, False):
    c.data.separate_documents = separate
    made = program.build_task(c, prepare=False)
    want = spans.Corruption(
      inputs_length=64,
      mean_span=4.0,
      noise_density=0.2,
      separate_documents=separate,
      **special,
    )
    for call in (made.train, made.validation):
      assert call.keywords["corruption"] == want


@pytest.mark.parametrize(
  ("task", "data", "match"),
  [
    (
      ("span_corruption", {"noise_density": 1.0}),
      {},
      "task.noise_density = 1.0",
    ),
    (
      ("span_corruption", {"noise_density": 0.0}),
      {},
      "task.noise_density = 0.0",
    ),
    (
      ("span_corruption", {"mean_span": 0.5}),
      {},
      "task.mean_span = 0.5 is not",
    ),
    (
      ("span_corruption", {"targets_length": 3}),
      {},
      "targets_length = 3 is less",
    ),
    (
      ("span_corruption", {"sentinels": (1, -1)}),
      {},
      r"task.sentinels = \(1, -1\) must be the first",
    ),
    (
      ("span_corruption", {"sentinels": (254, 1)}),
      {},
      "the token 254, which stands for text",
    ),
    (("span_corruption", {"sentinels": (2, 0)}), {}, "task.sentinels = "),
    (("span_corruption", {"end": -1}), {}, "task.end = -1"),
    (("span_corruption", {"z_loss": -1.0}), {}, "task.z_loss = -1.0 is not"),
    (("span_corruption", {}), {"seq_len": 2}, "data.seq_len = 2 has no room"),
    (("translation", {"targets_length": 0}), {}, "targets_length = 0 is not"),
    (
      ("translation", {"too_long": "cut"}),
      {},
      "too_long = 'cut' .* \"truncate\"",
    ),
    (
      ("translation", {"packing": 1}),
      {},
      "task.packing = 1 is not True or False",
    ),
    (("translation", {"source": None}), {}, "task.source = None is not a text"),
    (
      ("translation", {"sauce": "de"}),
      {},
      'task has no "sauce"; did .* "source"',
    ),
    (
      ("translation", {}),
      {"separate_documents": False},
      "data.separate_documents = False is not for the task translation",
    ),
    (
      ("translation", {"source": "de", "target": "en"}),
      {"name": "king_james"},
      'the feature "de" of dataset king_james is not there; set'
      " task.source to a feature of text: text",
    ),
  ],
)
def test_impossible_options_are_refused(task, data, match, tmp_path):
  c = tiny.get_config()
  c.task = {"name": task[0], **task[1]}
  c.data.update(cache_dir=str(tmp_path), **data)
  with pytest.raises(ConfigError, match=match):
    program.build_task(c, prepare="name" in data)


class TwoTexts(nn.Module):
  """Logits from the mean of the inputs' vectors and the token before."""

  def example(self, batch):
    token_BL = jnp.zeros((batch, 1), jnp.int32)
    text = Text(token_BL, jnp.ones_like(token_BL, bool), token_BL)
    return text, text

  @nn.compact
  def __call__(
    self, inputs, targets, rng=None, *, first=0, train=False, collect=None
  ):
    embed = nn.Embed(V + 8, 16)
    mask_BL1 = inputs.mask_BL[..., None]
    total_B1D = (embed(inputs.token_BL) * mask_BL1).sum(axis=1, keepdims=True)
    x_BLD = embed(targets.token_BL) + total_B1D / mask_BL1.sum(
      axis=1, keepdims=True
    )
    return nn.Dense(V + 8)(x_BLD), {}


@pytest.mark.parametrize("name", TASKS)
def test_a_model_of_two_texts_learns(name):
  task, model = TASKS[name](), TwoTexts()
  task.check(model)
  variables = models.init(model, jax.random.key(0))
  batch = {k: jnp.asarray(x[0]) for k, x in task.train(0, None)[0].items()}

  @jax.jit
  def loss(variables):
    mean, *_ = task.loss(model, variables, batch, None, 0, train=True)
    return mean.value()

  before = loss(variables)
  gradient = jax.grad(loss)(variables)
  after = loss(jax.tree.map(lambda x, g: x - 0.1 * g, variables, gradient))
  assert np.isfinite(before) and after < before


def test_a_model_of_one_text_is_refused():
  class OneText(nn.Module):
    def __call__(self, tokens_BL, mask_BL=None):
      return tokens_BL

  with pytest.raises(
    ConfigError, match="OneText takes tokens_BL, mask_BL; set model.name"
  ):
    span_task().check(OneText())
