"""Routers beside `top_k`, each against plain loops from its paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from moe_jax.core import registry
from moe_jax.core.errors import ConfigError
from moe_jax.moe import layer
from moe_jax.moe.routers import hash as hash_router
from moe_jax.moe.types import Side
from moe_jax.tasks import next_token
from moe_jax.training import program
from tests import oracle

T, D, E, V = 6, 5, 8, 40


def routed(router, kernel_DE, x_TD, side):
  """The decision of a router for one group, in float64."""
  with jax.enable_x64(True):
    recipe = layer.Recipe(E, router, None, None)
    routing = layer.route(
      recipe,
      {"kernel": jnp.asarray(kernel_DE)} if router.axes else {},
      {},
      jnp.asarray(x_TD)[None],
      jax.tree.map(lambda x: jnp.asarray(x)[None], side),
      None,
    )
    return jax.tree.map(lambda x: np.asarray(x)[0], routing)


def drawn(seed):
  rng = np.random.default_rng(seed)
  kernel_DE, x_TD = rng.normal(size=(D, E)), rng.normal(size=(T, D))
  token_T = rng.integers(0, V, T)
  return kernel_DE, x_TD, Side(np.arange(T) != 2, {"token_id": token_T})


def scores_by_hand(x_D, kernel_DE, score):
  """The scores of all experts for one token."""
  logits = [sum(x * w for x, w in zip(x_D, column)) for column in kernel_DE.T]
  if score == "sigmoid":
    return [1 / (1 + np.exp(-z)) for z in logits]
  whole = sum(np.exp(z) for z in logits)
  return [np.exp(z) / whole for z in logits]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_hash_weighs_the_experts_of_its_table(score, renormalize):
  options = {"score": score, "renormalize": renormalize, "scale": 2.5}
  router = registry.load("routers", "hash", top_k=3, vocab_size=V, **options)
  table_VK = hash_router.drawn(V, E, 3, seed=0)
  assert all(len({*row}) == 3 for row in table_VK.tolist())

  def weights_by_hand(kernel_DE, x_TD, side):
    rows = []
    for x_D, token in zip(x_TD, side.features["token_id"]):
      scores = scores_by_hand(x_D, kernel_DE, score)
      chosen = [scores[e] for e in table_VK[token]]
      whole = sum(chosen) if renormalize else 1
      rows.append([2.5 * w / whole for w in chosen])
    return np.array(rows)

  kernel_DE, x_TD, side = drawn(1)
  choice = routed(router, kernel_DE, x_TD, side).choice
  tokens_T = side.features["token_id"]
  np.testing.assert_array_equal(choice.expert_TK, table_VK[tokens_T])
  np.testing.assert_array_equal(
    choice.valid_TK, side.mask_T[:, None] & [True] * 3
  )
  expected_TK = weights_by_hand(kernel_DE, x_TD, side)
  np.testing.assert_allclose(choice.weight_TK, expected_TK, rtol=1e-9)

  # The gradient of the kernel, along a drawn direction.
  rng = np.random.default_rng(2)
  r_TK, towards_DE = rng.normal(size=(T, 3)), rng.normal(size=(D, E))
  towards_DE /= np.linalg.norm(towards_DE)
  numeric = oracle.gradient_along(
    lambda leaves: (r_TK * weights_by_hand(leaves[0], x_TD, side)).sum(),
    [kernel_DE],
    [towards_DE],
  )
  with jax.enable_x64(True):

    def projected(kernel_DE):
      choice = router.route(
        {"kernel": kernel_DE},
        jnp.asarray(x_TD),
        num_experts=E,
        select=None,
        side=jax.tree.map(jnp.asarray, side),
        rng=None,
      ).choice
      return (r_TK * choice.weight_TK).sum()

    exact = (jax.grad(projected)(jnp.asarray(kernel_DE)) * towards_DE).sum()
  assert float(exact) == pytest.approx(numeric, rel=1e-6)


def test_hash_with_equal_weights_has_nothing_to_learn():
  router = registry.load(
    "routers", "hash", top_k=2, vocab_size=V, weights="equal", seed=3
  )
  assert router.init(jax.random.key(0), D, E) == {}
  routing = routed(router, *drawn(0))
  assert (routing.choice.weight_TK == 0.5).all()
  assert routing.logits_TE is None
  expected_TE = np.zeros((T, E))
  for t, experts in enumerate(routing.choice.expert_TK):
    expected_TE[t, experts] = 0.5
  np.testing.assert_array_equal(routing.prob_TE, expected_TE)


def test_a_balanced_table_equals_loads(tmp_path):
  """Greedy by frequency: no expert has more than the rarest ids make up for."""
  rng = np.random.default_rng(0)
  count_V = (1000 / np.arange(1, 401) ** 1.1).round()
  rng.shuffle(count_V)
  table_VK = hash_router.balanced(count_V, E, 2, seed=1)
  assert all(len({*row}) == 2 for row in table_VK.tolist())

  def max_vio(table_VK):
    load_E = np.zeros(E)
    for count, experts in zip(count_V, table_VK):
      for e in experts:
        load_E[e] += count
    return oracle.max_vio(load_E)

  assert max_vio(table_VK) < 0.01
  assert max_vio(hash_router.drawn(400, E, 2, seed=1)) > 0.1
  # By loops: each id takes the two experts that have least.
  load_E = [0.0] * E
  for token in sorted(range(400), key=lambda i: -count_V[i]):
    least = sorted(load_E)[1]
    for e in table_VK[token]:
      assert load_E[e] <= least
    for e in table_VK[token]:
      load_E[e] += count_V[token]
  np.save(tmp_path / "counts.npy", count_V)
  found = hash_router.read_counts(str(tmp_path / "counts.npy"), 400)
  np.testing.assert_array_equal(found, count_V)


def test_what_hash_refuses(tmp_path):
  def refused(**options):
    with pytest.raises(ConfigError) as caught:
      registry.load(
        "routers", "hash", **{"top_k": 2, "vocab_size": V} | options
      )
    return str(caught.value)

  assert "cannot be read" in refused(counts=str(tmp_path / "none.npy"))
  for i, values in enumerate((np.ones(3), -np.ones(V), np.full(V, np.nan))):
    np.save(tmp_path / f"{i}.npy", values)
    text = refused(counts=str(tmp_path / f"{i}.npy"))
    assert f"is not {V} numbers of 0 or more" in text
  (tmp_path / "text.npy").write_text("hello")
  assert "cannot be read" in refused(counts=str(tmp_path / "text.npy"))
  assert "would learn nothing" in refused(top_k=1, renormalize=True)
  router = registry.load("routers", "hash", top_k=2, vocab_size=V)
  kernel_DE, x_TD, side = drawn(0)
  with pytest.raises(ConfigError, match="needs side.features"):
    routed(router, kernel_DE, x_TD, side.replace(features={}))


def test_a_decoder_chooses_by_token():
  """The same token has the same experts wherever it stands."""
  c = tiny.get_config()
  c.model.moe.router = {"name": "hash", "vocab_size": 257}
  task = next_token.build(c, prepare=False)
  model = program.build_model(c, task)
  rng = np.random.default_rng(0)
  tokens_BL = rng.integers(0, 257, (1, c.data.seq_len)).astype(np.int32)
  tokens_BL[0, 1::3] = 7
  variables = model.init(jax.random.key(0), tokens_BL)
  _, aux = model.apply(variables, tokens_BL, collect="routing")
  found = [
    x.expert_TK
    for x in jax.tree.leaves(aux, is_leaf=lambda x: hasattr(x, "expert_TK"))
    if hasattr(x, "expert_TK")
  ]
  assert found
  top_k = c.model.moe.top_k
  for expert in found:
    expert_LK = np.asarray(expert).reshape(-1, c.data.seq_len, top_k)[0]
    assert (expert_LK[1::3] == expert_LK[1]).all()
    assert len(np.unique(expert_LK, axis=0)) > 3
