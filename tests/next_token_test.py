"""Next-token prediction: its loss, and what it is counted in."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.core.errors import ConfigError
from moe_jax.tasks import next_token
from tests import small

V = small.V


def model_of(logits_BLV):
  """A model that always has these logits."""
  return types.SimpleNamespace(apply=lambda *args, **kwargs: (logits_BLV, {}))


def test_the_loss_is_of_unpadded_tokens():
  """And NaN in the logits of padding reaches neither the loss nor gradients."""
  rng = np.random.default_rng(0)
  logits_BLV = rng.normal(size=(2, 3, 5)).astype(np.float32)
  target_BL = rng.integers(0, 5, (2, 3))
  mask_BL = np.array([[True, True, False], [True, False, False]])
  total = 0.0
  for b, t in zip(*np.nonzero(mask_BL)):
    p_V = np.exp(np.float64(logits_BLV[b, t]))
    total -= math.log(p_V[target_BL[b, t]] / p_V.sum())
  found = next_token.cross_entropy(logits_BLV, target_BL, mask_BL)
  np.testing.assert_allclose(found.total, total, rtol=1e-6)
  assert found.weight == 3
  logits_BLV[~mask_BL] = 1e30
  gradient = jax.grad(
    lambda x: next_token.cross_entropy(x, target_BL, mask_BL).total
  )(logits_BLV)
  assert (gradient[~mask_BL] == 0).all() and np.isfinite(gradient).all()


def test_bytes_are_no_ends_of_documents():
  targets = np.array([[1, 255, 256], [256, 3, 4]])
  mask = np.array([[True, True, True], [True, True, False]])
  batch = {"inputs": targets, "targets": targets, "mask": mask}
  task = small.task()
  loss, sums, aux = task.loss(
    model_of(np.zeros((2, 3, V), np.float32)), {}, batch, None, 0, train=False
  )
  assert sums["bytes"] == 3 and aux == {}
  assert task.weight(batch) == loss.weight == 5
  found = task.metrics(loss, sums)
  np.testing.assert_allclose(found["loss"].value(), math.log(V), rtol=1e-6)
  bits = 5 * math.log2(V) / 3
  np.testing.assert_allclose(found["bits_per_byte"].value(), bits, rtol=1e-6)


def test_what_the_model_is_told():
  """The vocabulary; and the end of a document where documents are separate."""
  c = small.config()
  for separate, end in ((True, V - 1), (False, None)):
    c.data.separate_documents = separate
    task = next_token.of_corpus(c, small.SmallCorpus())
    assert task.given == {"vocab_size": V, "end_of_document": end}
  assert (task.name, task.fingerprint) == ("small", "0")
  # The tokenizer alone gives the same, without a text.
  c.data.name = "nothing_that_is_there"
  unread = next_token.build(c, prepare=False)
  assert unread.given == task.given and unread.spec == task.spec


def test_z_loss_is_minimised_and_not_reported():
  """coefficient * mean of log(sum of exp(logits))^2 (PaLM, GLaM)."""
  rng = np.random.default_rng(0)
  logits_BLV = jnp.asarray(rng.normal(size=(2, 3, 5)) + 2)
  mask_BL = np.array([[1, 1, 0], [1, 0, 0]], bool)
  batch = {"inputs": mask_BL, "targets": mask_BL.astype(int), "mask": mask_BL}

  class Fixed:
    def apply(self, *args, **kwargs):
      return logits_BLV, {}

  plain, with_z = (
    next_token.scoring(np.ones(5, np.int32), 3, z_loss=z) for z in (0.0, 0.1)
  )
  (less, _, _), (more, sums, _) = (
    task.loss(Fixed(), {}, batch, None, 0, True) for task in (plain, with_z)
  )
  want = sum(
    np.log(np.exp(logits_BLV[b, i]).sum()) ** 2
    for b, i in zip(*np.nonzero(mask_BL))
  )
  assert float(more.total - less.total) == pytest.approx(0.1 * want, rel=1e-5)
  assert more.weight == less.weight == 3
  assert with_z.metrics(more, sums)["loss"].total == less.total


def test_ranges_of_tokens_have_losses_of_their_own():
  """Images and text in one vocabulary, whose end belongs to neither."""
  rng = np.random.default_rng(1)
  logits_BLV = rng.normal(size=(2, 3, 6)).astype(np.float32)
  targets = np.array([[0, 3, 5], [1, 4, 2]])
  mask = np.array([[True, True, True], [True, False, True]])
  ranges = {"text": (0, 2), "image": (2, 5)}
  task = next_token.scoring(np.ones(6, np.int32), 3, token_ranges=ranges)
  batch = {"inputs": targets, "targets": targets, "mask": mask}
  loss, sums, _ = task.loss(
    model_of(logits_BLV), {}, batch, None, 0, train=False
  )
  found = task.metrics(loss, sums)
  log_p = np.log(np.exp(logits_BLV) / np.exp(logits_BLV).sum(-1, keepdims=True))
  own = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
  # The padding is of an image too.
  text, image = (own[0, 0] + own[1, 0]) / 2, (own[0, 1] + own[1, 2]) / 2
  np.testing.assert_allclose(found["loss_text"].value(), text, rtol=1e-5)
  np.testing.assert_allclose(found["loss_image"].value(), image, rtol=1e-5)
  whole = own[mask].mean()
  np.testing.assert_allclose(found["loss"].value(), whole, rtol=1e-5)


@pytest.mark.parametrize("ends", [(3, 3), (4, 2), (0, 7)])
def test_a_range_that_is_none(ends):
  with pytest.raises(ConfigError, match="token_ranges.image = .* is no range"):
    next_token.scoring(np.ones(6, np.int32), 3, token_ranges={"image": ends})
