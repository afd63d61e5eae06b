"""The leak of expert choice: it reads later tokens."""

import flax.linen as nn
import jax
import pytest

from experiments.routers import leak
from moe_jax.core.errors import ConfigError
from moe_jax.data.text import tokenizers
from moe_jax.training import program, trained
from tests import small


def of(router: dict) -> trained.Trained:
  """A model that knows nothing, with large weights, so that experts matter."""
  c, task = small.config(), small.task()
  c.data.separate_documents = False
  c.model.allow_noncausal = True
  c.model.moe.update(router=router)
  c.model.moe.balancers = {}
  model = program.build_model(c, task)
  inputs = jax.numpy.zeros((2, small.L), int)
  mask = inputs == 0
  variables = nn.unbox(model.init(jax.random.key(0), inputs, mask))
  variables = jax.tree.map(lambda w: 3 * w, variables)
  tokenizer = tokenizers.load()._replace(begin=())
  return trained.Trained(model, variables, tokenizer, (small.V - 1,), c)


@pytest.mark.parametrize(
  "router,leaks",
  [({"name": "expert_choice"}, True), ({"name": "top_k"}, False)],
)
def test_later_tokens_matter_to_expert_choice_alone(router, leaks):
  loaded = of(router)
  found = leak.measure(loaded, small.SmallCorpus(), small.L, 4)
  assert found["difference"] == found["other"] - found["own"]
  assert (abs(found["difference"]) > 1e-4) == leaks, found
  if not leaks:
    assert found["difference"] == 0


def test_first_halves_stay_and_second_halves_come_from_another_batch():
  loaded, half = of({"name": "top_k"}), small.L // 2
  pairs = list(leak.halves(loaded, small.SmallCorpus(), small.L, 4))
  for (own, changed), (other, _) in zip(pairs, pairs[1:] + pairs[:1]):
    for name in ("inputs", "mask"):
      assert (changed[name][:, :half] == own[name][:, :half]).all()
      assert (changed[name][:, half:] == other[name][:, half:]).all()
    assert (own["inputs"][:, half:] != other["inputs"][:, half:]).any()


def test_a_text_of_one_batch_is_refused():
  loaded = of({"name": "top_k"})
  with pytest.raises(ConfigError, match="fills 0 batches of 64 rows"):
    leak.measure(loaded, small.SmallCorpus(), small.L, 64)
