"""The published encoder-decoders: counts, capacity, routing, training."""

import functools
import json
import math

import jax
import numpy as np
import pytest

from moe_jax import main, models
from moe_jax.models import counts
from moe_jax.moe.types import Side
from moe_jax.run import config as config_lib
from moe_jax.training import program, train_step

TINY = ("switch", "gshard", "st_moe", "nllb_moe")


@functools.cache
def load(name):
  return config_lib.load(f"configs/{name}")


@functools.cache
def counted(name):
  model = models.build(load(name).model, vocab_size=100)
  return model, counts.count(model, models.variables(model))


def t5(d, layers, heads, width, f, E, sparse, gated, vocabularies, V=32_128):
  """(total, active) of T5 with top-1 experts, from its shapes."""
  att, n = 4 * d * heads * width, 3 if gated else 2
  total = vocabularies * V * d + 3 * layers * att
  total += (2 * layers + 1) * d + (3 * layers + 1) * d + 2 * 32 * heads
  total += 2 * (layers - sparse) * n * d * f
  active = total + 2 * sparse * (n * d * f + d * E)
  return total + 2 * sparse * (E * n * d * f + d * E), active


BASE = (768, 12, 12, 64, 3072)
SWITCH = {f"base_{e}": (*BASE, e, 6, False, 1) for e in (8, 16, 32, 64, 128)}
SWITCH |= {
  "base_256": (*BASE, 256, 6, False, 1),
  "large_128": (1024, 24, 16, 64, 4096, 128, 12, False, 1),
  "xxl_128": (4096, 24, 64, 64, 10_240, 128, 12, True, 2),
  "c_2048": (2080, 15, 32, 64, 6144, 2048, 15, False, 2),
}
# As they are published or counted from published dimensions.
KNOWN = {
  "t5_base": (222_903_552, 222_903_552),
  "base_8": (619_339_008, 222_977_280),
  "base_16": (1_072_397_568, 223_051_008),
  "base_32": (1_978_514_688, 223_198_464),
  "base_128": (7_415_217_408, 224_083_200),
  "large_128": (26_309_291_008, 740_813_824),
  # These were counted with one vocabulary, the embedding.
  "xxl_128": (394_543_476_736, 11_016_318_976),
  "c_2048": (1_571_308_972_448, 1_728_326_048),
}


@pytest.mark.parametrize("name", SWITCH)
def test_switch_to_the_unit(name):
  _, found = counted(f"switch.py:{name}")
  assert (found["total"], found["active"]) == t5(*SWITCH[name])


@pytest.mark.parametrize("name", KNOWN)
def test_switch_as_it_is_known(name):
  _, found = counted(f"switch.py:{name}")
  head = found.get("head", 0)
  assert (found["total"] - head, found["active"] - head) == KNOWN[name]


def test_st_moe_by_its_formula():
  """Without norms and position tables, which the formula leaves out."""
  model, found = counted("st_moe.py:32b")
  bare = found["norm"] + 2 * 32 * 64
  assert found["total"] - bare == 269_103_923_200
  assert found["active"] - bare == 35_061_760_000
  numbers = [x.numbers for x in model.sublayers.values()]
  assert numbers == [(3, 7, 11, 15, 19, 23), (27, 31, 35, 39, 43, 47)]


@pytest.mark.parametrize(
  "name, printed",
  [
    ("600b", 600e9),
    ("200b", 200e9),
    ("150b", 150e9),
    ("50b", 50e9),
    ("37b", 37e9),
    ("12b", 12.5e9),
  ],
)
def test_gshard_within_7_percent(name, printed):
  _, found = counted(f"gshard.py:{name}")
  assert abs(found["total"] / printed - 1) < 0.07
  E, layers = {
    "600b": (2048, 36),
    "200b": (2048, 12),
    "150b": (512, 36),
    "50b": (512, 12),
    "37b": (128, 36),
    "12b": (128, 12),
  }[name]
  d, H, half = 1024, 8192, layers // 2
  total = 96_000 * d + 3 * half * 4 * d * 16 * 128
  total += half * 2 * d * H + half * (E * 2 * d * H + d * E)
  assert found["total"] - found["norm"] - 2 * 32 * 16 == total


def test_nllb_to_the_unit():
  """Biases everywhere but in the router; sinusoids are no parameters."""
  _, found = counted("nllb_moe.py:54b")
  d, f, V, E = 2048, 8192, 256_206, 128
  att, ffn, norm = 4 * (d * d + d), 2 * d * f + f + d, 2 * d
  total = V * d + 72 * att + 36 * ffn + 12 * (E * ffn + d * E)
  total += (2 * 24 + 1 + 3 * 24 + 1) * norm
  assert found["total"] == total
  assert round(total / 1e9, 1) == 54.5


@pytest.mark.parametrize(
  "name, tokens, train, evaluation",
  [
    # floor(1.25 T / E) and floor(2 T / E), but 4 at least.
    ("switch.py:base_8", (8192, 7296), (1280, 1140), (2048, 1824)),
    ("switch.py:base_128", (8192, 7296), (80, 71), (128, 114)),
    ("switch.py:c_2048", (2048, 1824), (2, 2), (2, 2)),
    ("switch.py:xxl_128", (4096, 3648), (40, 35), (128, 114)),
    # Not times two choices, as the paper counts.
    ("st_moe.py:32b", (4096, 3648), (80, 71), (128, 114)),
    # 2 N / E of a group of N tokens.
    ("gshard.py:37b", (2048, 2048), (32, 32), (32, 32)),
    ("gshard.py:600b", (2048, 2048), (2, 2), (2, 2)),
    ("nllb_moe.py:54b", (512, 512), (8, 8), (512, 512)),
  ],
)
def test_capacities(name, tokens, train, evaluation):
  model, _ = counted(name)
  c = load(name)
  lengths = program.build_task(c, prepare=False).lengths
  for side, T, *slots in zip(lengths, tokens, train, evaluation):
    parts = next(x for x in model.sublayers.values() if x.sequence == side)
    for is_train, want in zip((True, False), slots):
      found, recipe = parts.grouping.resolve(
        parts.recipe, lengths[side], is_train
      )
      assert found == T
      assert (recipe.bound and recipe.bound.slots) == want


GSHARD = ("600b", "200b", "150b", "50b", "37b", "12b")
SIZES = [f"switch.py:{size}" for size in (*SWITCH, "t5_base")]
SIZES += [*(f"gshard.py:{size}" for size in GSHARD), "st_moe.py:32b"]


@pytest.mark.parametrize("name", [*SIZES, "nllb_moe.py:54b"])
def test_batches_are_whole_groups(name):
  """Checks slots of training and of evaluation, as a run does before it begins."""
  c = load(name)
  task = program.build_task(c, prepare=False)
  assert program.build_model(c, task).arch.stacks


def routed(name, seed=0, tokens=5):
  """(logits, choice) of random tokens in a published router, in evaluation."""
  model, _ = counted(name)
  parts = next(iter(model.sublayers.values()))
  E = parts.recipe.num_experts
  rng = np.random.default_rng(seed)
  x_TD, kernel_DE = rng.normal(size=(tokens, 8)), rng.normal(size=(8, E))
  choice = parts.recipe.router.route(
    {"kernel": kernel_DE},
    x_TD,
    num_experts=E,
    select=lambda score_TE: score_TE,
    side=Side(np.ones(tokens, bool)),
    rng=None,
  ).choice
  return x_TD @ kernel_DE, jax.device_get(choice)


@pytest.mark.parametrize(
  "name, top_k, factor",
  [
    ("switch.py:base_16", 1, None),
    ("gshard.py:12b", 2, 1.0),
    ("st_moe.py:32b", 2, 1.0),
    ("nllb_moe.py:54b", 2, 0.8),
  ],
)
def test_routing_as_it_is_told(name, top_k, factor):
  """Switch: the probability itself. The others: the two best over their sum."""
  logits_TE, choice = routed(name)
  for logits, chosen, weights in zip(
    logits_TE, choice.expert_TK, choice.weight_TK
  ):
    p = np.exp(logits - logits.max())
    p /= p.sum()
    best = np.argsort(-p)[:top_k]
    np.testing.assert_array_equal(chosen, best)
    want = p[best] if factor is None else factor * p[best] / p[best].sum()
    np.testing.assert_allclose(weights, want, rtol=1e-5)


def test_balancing_as_it_is_told():
  """Switch and GShard: E sum f P of first choices, in every group, times 0.01."""
  for name in ("switch.py:base_8", "gshard.py:12b", "st_moe.py:32b"):
    model, _ = counted(name)
    for parts in model.sublayers.values():
      load = dict(parts.recipe.balancers)["load"]
      assert load.spec.name == "switch"
      assert load.spec.options["coefficient"] == 0.01
      assert load.spec.options["scope"] == "group"


def test_rates_of_t5():
  """1 / sqrt(max(n, 10^4)), from the first step on."""
  c = load("switch.py:base_8")
  model = models.build(load("switch.py:tiny").model, vocab_size=288)
  rates = train_step.numbers(c, model)["optim"]["schedule"]
  from moe_jax.training.optimizers import schedules

  rate = schedules.rate(rates)
  for step in (0, 1, 9_999, 10_000, 40_000, 549_999):
    want = 1 / math.sqrt(max(step + 1, 10_000))
    assert float(rate(step)) == pytest.approx(want, rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", TINY)
def test_tiny_learns(name, tmp_path):
  """Real text, through the command; the loss falls, and metrics are there."""
  flags = [
    f"--config=configs/{name}.py:tiny",
    "--config.train.num_steps=30",
    "--config.train.log_every=5",
    "--config.optim.learning_rate=0.03",
    "--config.optim.decay_steps=10000",
    "--config.optim.warmup_steps=0",
    "--config.optim.optimizer.name=adafactor",
    "--config.model.dropout=0.1",
    "--config.model.remat=none",  # It compiles faster.
    f"--workdir={tmp_path}",
  ]
  main.main(flags)
  text = (tmp_path / "metrics.jsonl").read_text()
  lines = [*map(json.loads, text.splitlines())]
  losses = [x["loss"] for x in lines if x["split"] == "train"]
  assert losses[-1] < losses[0] - 0.3
  last = lines[-1]
  assert last["neg_log_perplexity"] == -last["loss"]
  assert 0 <= last["dropped"] < 0.8 and last["max_vio_global"] > 0


def test_sizes_of_tiny():
  """They have the routing of the models that they stand for."""
  for name in TINY:
    c = load(f"{name}.py:tiny")
    task = program.build_task(c, prepare=False)
    model = program.build_model(c, task)
    sizes = counts.count(model, models.variables(model))
    assert sizes["total"] < 60_000
    assert {x.sequence for x in model.sublayers.values()} == {
      *("inputs", "targets"),
    }
