"""The published decoders: counts to the unit, routing as described, training."""

import functools
import importlib
import itertools
import math
import pathlib
import re

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

from moe_jax import models
from moe_jax.core import registry
from moe_jax.core.errors import ConfigError
from moe_jax.models import counts
from moe_jax.moe.types import Side
from moe_jax.run import config as config_lib
from moe_jax.training import train_step
from tests import mesh_cases, small

ROOT = pathlib.Path(__file__).parents[1]
FAMILIES = (
  *("mixtral", "dbrx", "deepseek_moe", "deepseek_v3", "llama4"),
  *("mistral_large_3", "olmoe", "qwen3_moe", "gpt_oss", "glam"),
  *("kimi", "deepseek_v2", "glm_4_5", "ernie_4_5"),
)


def load(name):
  family, _, variant = name.partition(":")
  return importlib.import_module(f"configs.{family}").get_config(variant)


@functools.cache
def build(name, mesh=None, dtype=None):
  c = load(name)
  if dtype is not None:
    c.model.dtype = dtype
  model = models.build(c.model, vocab_size=257, mesh=mesh)
  models.check(model, lengths={"inputs": 32}, batches={"rows": 8}, mesh=mesh)
  return model


def counted(name):
  model = build(name)
  return counts.count(model, models.variables(model))


# Total and active parameters, the embedding counted once where a token's row of
# it is looked up, as published or computed from the published dimensions.
COUNTS = {
  "mixtral:8x7b": (46_702_792_704, 12_879_925_248),
  "dbrx:132b": (131_596_523_520, 36_469_708_800),
  "deepseek_moe:16b": (16_375_728_128, 2_828_650_496),
  # The selection bias of 58 layers of 256 experts is not counted.
  "deepseek_v3:671b": (671_026_404_352, 37_552_297_472 - 58 * 256),
  "llama4:scout": (107_769_861_120, 17_172_894_720),
  "llama4:maverick": (400_711_848_960, 17_184_691_200),
  "mistral_large_3:675b": (673_421_089_792, 39_946_968_064),
  "deepseek_v2:236b": (235_741_434_880, 21_375_800_320),
  "deepseek_v2:lite": (15_706_484_224, 2_661_150_208),
  "kimi:k2": (1_026_408_209_408, 32_861_477_888),
  "kimi:moonlight": (15_960_108_544, 2_914_774_528),
  # Its files have 27 times 64 selection biases more.
  "ernie_4_5:21b_a3b": (21_825_437_888 - 27 * 64, 3_352_148_480),
  "glm_4_5:air": (106_852_245_504, 13_424_123_904),
  "glm_4_5:355b": (352_797_814_784, 33_632_251_904),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_to_the_unit(name):
  found = counted(name)
  assert (found["total"], found["active"]) == COUNTS[name]
  parts = {"embedding", "head", "attention", "dense", "experts", "shared"}
  parts |= {"router", "norm"}
  assert sum(v for k, v in found.items() if k in parts) == found["total"]


def test_counts_of_the_newer_ones_by_arithmetic():
  """From their dimensions alone, part by part."""

  def latent(d, heads, q_rank, kv_rank=512, nope=128, rope=64, v=128):
    query = d * heads * (nope + rope)
    if q_rank:
      query = d * q_rank + q_rank + q_rank * heads * (nope + rope)
    keys = d * (kv_rank + rope) + kv_rank + kv_rank * heads * (nope + v)
    return query + keys + heads * v * d

  def grouped(d, heads, kv, hd, bias, norms):
    turned = (heads + 2 * kv) * hd
    return d * turned + bias * turned + norms * 2 * hd + heads * hd * d

  def total(V, d, L, dense, attention, ff, f, E, shared, tied=False):
    moe = (E + shared) * 3 * d * f + d * E
    layers = L * (attention + 2 * d) + dense * 3 * d * ff + (L - dense) * moe
    return (1 if tied else 2) * V * d + layers + d

  def same(name, *args, **options):
    assert counted(name)["total"] == total(*args, **options), name

  V = 163_840
  attention = latent(7168, 64, 1536)
  same("kimi:k2", V, 7168, 61, 1, attention, 18_432, 2048, 384, 1)
  attention = latent(2048, 16, None)
  same("kimi:moonlight", V, 2048, 27, 1, attention, 11_264, 1408, 64, 2)
  attention = grouped(4096, 96, 8, 128, 1, 0)
  same("glm_4_5:air", 151_552, 4096, 46, 1, attention, 10_944, 1408, 128, 1)
  attention = grouped(5120, 96, 8, 128, 1, 1)
  same("glm_4_5:355b", 151_552, 5120, 92, 3, attention, 12_288, 1536, 160, 1)
  attention = grouped(2560, 20, 4, 128, 0, 0)
  sizes = 103_424, 2560, 28, 1, attention, 12_288, 1536, 64, 2
  same("ernie_4_5:21b_a3b", *sizes, tied=True)


def test_recipes_of_routing():
  """LongCat's copies and DeepSeek-V4's tables, in a decoder of our own."""
  model = build("routing_recipes:longcat_flash")
  (parts,) = model.sublayers.values()
  recipe = parts.recipe
  assert (recipe.num_experts, recipe.pool, recipe.experts_per_token) == (
    *(512, 768, 8.0),
  )
  ((_, bias),) = recipe.balancers
  assert sum(bias.targets[:512]) == pytest.approx(8 / 12)
  model = build("routing_recipes:deepseek_v4")
  names = {}
  for parts in model.sublayers.values():
    router = parts.recipe.router.spec
    names |= dict.fromkeys(parts.numbers, router.name)
    assert router.options["score"] == "sqrt_softplus"
    assert router.options["scale"] == 1.5 and router.options["renormalize"]
    assert len(parts.recipe.balancers) == (0 if router.name == "hash" else 2)
  assert [names[i] for i in range(6)] == ["hash"] * 3 + ["top_k"] * 3
  with pytest.raises(ConfigError, match='no variant "longcat"'):
    load("routing_recipes:longcat")


def test_deepseek_v3_selection_biases_and_input_embedding():
  found = counted("deepseek_v3:671b")
  assert found["selection_bias"] == 58 * 256
  assert found["total"] + found["selection_bias"] == 671_026_419_200
  # Its README leaves out the input embedding.
  assert round(found["active_without_embedding"] / 1e9, 3) == 36.626


def test_counts_by_arithmetic():
  """Those that are not printed to the unit, from the dimensions."""

  def like_mixtral(V, d, L, heads, kv, hd, f, E, k, *, norms=0):
    attention = 2 * d * heads * hd + 2 * d * kv * hd
    expert, router = 3 * d * f, d * E
    layer = attention + E * expert + router + 2 * d + norms
    total = 2 * V * d + L * layer + d
    return total, total - L * (E - k) * expert

  for name, args, more in (
    ("mixtral:8x22b", (32_000, 6144, 56, 48, 8, 128, 16_384, 8, 2), 0),
    ("olmoe:1b_7b", (50_304, 2048, 16, 16, 16, 128, 1024, 64, 8), 2 * 2048),
    ("qwen3_moe:30b_a3b", (151_936, 2048, 48, 32, 4, 128, 768, 128, 8), 256),
    ("qwen3_moe:235b_a22b", (151_936, 4096, 94, 64, 4, 128, 1536, 128, 8), 256),
  ):
    found = counted(name)
    wanted = like_mixtral(*args, norms=more)
    assert (found["total"], found["active"]) == wanted, name
  assert counted("qwen3_moe:30b_a3b")["total"] == 30_532_122_624
  assert counted("mixtral:8x22b")["total"] == 140_620_634_112
  assert counted("olmoe:1b_7b")["total"] == 6_919_161_856

  def gpt_oss(L, E, V=201_088, d=2880, f=2880, heads=64, kv=8, hd=64, k=4):
    q, key = heads * hd, kv * hd
    attention = d * (q + 2 * key) + q + 2 * key + q * d + d + heads
    expert = 3 * d * f + 2 * f + d
    layer = attention + E * expert + d * E + E + 2 * d
    total = 2 * V * d + L * layer + d
    return total, total - L * (E - k) * expert

  for name, sizes in (("gpt_oss:120b", (36, 128)), ("gpt_oss:20b", (24, 32))):
    found = counted(name)
    assert (found["total"], found["active"]) == gpt_oss(*sizes)
  assert counted("gpt_oss:120b")["total"] == 116_829_156_672


@pytest.mark.parametrize(
  "name,total,active",
  [
    ("glam:64b_64e", 1_161_755_099_136, 96_603_209_728),
    ("glam:8b_64e", 142.94e9, 9.799e9),
    ("glam:1b7_64e", 26.84e9, 1.8790e9),
  ],
)
def test_glam_without_norms(name, total, active):
  """Whose formula leaves out norms, and its position bias; to what is printed."""
  found = counted(name)
  for key, wanted in (("total", total), ("active", active)):
    arch = build(name).arch
    tables = 32 * arch.layer("moe").attention.num_heads * arch.num_layers
    ours = found[key] - found["norm"] - tables
    if isinstance(wanted, int):
      assert ours == wanted
    else:
      assert abs(ours - wanted) < 0.5 * 10 ** (
        math.floor(math.log10(wanted)) - 3
      )


def test_kv_caches():
  """Numbers of a token in all layers."""
  for name, wanted in (
    ("mixtral:8x7b", 32 * 2 * 8 * 128),
    ("deepseek_v3:671b", 61 * (512 + 64)),
    ("gpt_oss:120b", 36 * 2 * 8 * 64),
  ):
    assert counts.kv_cache_per_token(build(name)) == wanted


# Routing, from each system's own description, a token at a time.


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def best(scores, k):
  return np.argsort(-scores, kind="stable")[:k]


def mixtral(x, bias):
  """Softmax over the two best logits (2401.04088, 2.1)."""
  chosen = best(x, 2)
  return chosen, softmax(x[chosen])


def dbrx(x, bias):
  """Softmax over 16, the four best over their L1 norm."""
  p = softmax(x)
  chosen = best(p, 4)
  return chosen, p[chosen] / np.abs(p[chosen]).sum()


def deepseek_moe(x, bias):
  """The six largest of a softmax over 64, as they are (2401.06066, eq. 10)."""
  p = softmax(x)
  chosen = best(p, 6)
  return chosen, p[chosen]


def deepseek_v3(x, bias):
  """2412.19437, 2.1.2: choose by s + b in the best 4 of 8 groups, each as good
  as its two best; weigh by s over its sum, times 2.5."""
  s = sigmoid(x)
  biased = s + bias
  groups = biased.reshape(8, -1)
  order = best(np.sort(groups, 1)[:, -2:].sum(1), 4)
  inside = np.full_like(groups, -np.inf)
  inside[order] = groups[order]
  chosen = best(inside.ravel(), 8)
  return chosen, 2.5 * s[chosen] / s[chosen].sum()


def llama4(x, bias):
  """The best logit, and its sigmoid, which multiplies the expert's input."""
  chosen = best(x, 1)
  return chosen, sigmoid(x[chosen])


def mistral_large_3(x, bias):
  p = softmax(x)
  chosen = best(p, 4)
  return chosen, p[chosen] / p[chosen].sum()


def olmoe(x, bias):
  """norm_topk_prob = false: what is chosen does not sum to one."""
  p = softmax(x)
  chosen = best(p, 8)
  return chosen, p[chosen]


def qwen3_moe(x, bias):
  p = softmax(x)
  chosen = best(p, 8)
  return chosen, p[chosen] / p[chosen].sum()


def gpt_oss(x, bias):
  chosen = best(x, 4)
  return chosen, softmax(x[chosen])


def glam(x, bias):
  """GShard's two gates over their sum; outside of training both are used."""
  p = softmax(x)
  chosen = best(p, 2)
  return chosen, p[chosen] / p[chosen].sum()


def kimi(x, bias):
  """DeepSeek-V3 without groups of experts; times 2.827."""
  s = sigmoid(x)
  chosen = best(s + bias, 8)
  return chosen, 2.827 * s[chosen] / s[chosen].sum()


def deepseek_v2(x, bias):
  """2405.04434, 2.2.2: the best six of the three groups with the best experts, by
  softmax scores, which weigh as they are, times 16."""
  p = softmax(x)
  groups = p.reshape(8, -1)
  order = best(groups.max(1), 3)
  inside = np.full_like(groups, -np.inf)
  inside[order] = groups[order]
  chosen = best(inside.ravel(), 6)
  return chosen, 16 * p[chosen]


def glm_4_5(x, bias):
  s = sigmoid(x)
  chosen = best(s + bias, 8)
  return chosen, s[chosen] / s[chosen].sum()


def ernie_4_5(x, bias):
  """The bias is added to softmax scores."""
  p = softmax(x)
  chosen = best(p + bias, 6)
  return chosen, p[chosen] / p[chosen].sum()


ROUTERS = {
  f.__name__: f
  for f in (
    *(mixtral, dbrx, deepseek_moe, deepseek_v3, llama4),
    *(mistral_large_3, olmoe, qwen3_moe, gpt_oss, glam),
    *(kimi, deepseek_v2, glm_4_5, ernie_4_5),
  )
}


@pytest.mark.parametrize("family", FAMILIES)
def test_routing_as_its_authors_describe_it(family):
  c = load(f"{family}:{next(iter(variants(family)))}")
  moe = c.model.moe
  found, x_TE, bias_E = routed(
    dict(moe.router), moe.num_experts, moe.top_k, "bias" in moe.balancers
  )
  for t, x_E in enumerate(x_TE):
    chosen, weight = ROUTERS[family](x_E, bias_E)
    order = np.argsort(found.expert_TK[t])
    np.testing.assert_array_equal(found.expert_TK[t][order], np.sort(chosen))
    np.testing.assert_allclose(
      found.weight_TK[t][order], weight[np.argsort(chosen)], rtol=2e-5
    )
  assert found.weight_input == (family == "llama4")


def routed(options, num_experts, top_k, biased, shift=0.0, tokens=40):
  """(TokenChoice, logits, selection bias) of random tokens."""
  rng = np.random.default_rng(0)
  router = registry.from_config("routers", options, "router", top_k=top_k)
  d_model = 16
  kernel = {
    k: rng.normal(size=v.shape).astype(np.float32) / 4
    for k, v in router.init(jax.random.key(0), d_model, num_experts).items()
  }
  x_TD = rng.normal(size=(tokens, d_model)).astype(np.float32)
  bias_E = (shift + 0.3 * rng.normal(size=num_experts)) * biased
  found = router.route(
    kernel,
    x_TD,
    num_experts=num_experts,
    select=lambda s: s + bias_E.astype(np.float32)[None],
    side=Side(np.ones(tokens, bool)),
    rng=None,
  )
  logits = np.float64(x_TD) @ np.float64(kernel["kernel"])
  return (
    jax.device_get(found.choice),
    logits + kernel.get("kernel_bias", 0),
    bias_E,
  )


def variants(family):
  """Sizes that its file names in its docstring's commands, the first first."""
  text = (ROOT / "configs" / f"{family}.py").read_text()
  return re.findall(r'"(\w+)": _\w+', text)


def test_both_values_of_the_group_mask():
  """They differ where kept scores are below zero: codes that mask with 0 then
  choose among the experts of the other groups, those with -inf never do."""
  options = dict(load("deepseek_v3:671b").model.moe.router)
  for shift, same in ((1.0, True), (-2.0, False)):
    found = {}
    for mask in ("-inf", "0"):
      choice, x_TE, bias_E = routed(
        options | {"expert_group_mask": mask}, 256, 8, True, shift=shift
      )
      found[mask] = np.sort(choice.expert_TK)
    assert ((found["-inf"] == found["0"]).all(1) == same).all()
    for t, x_E in enumerate(x_TE):
      chosen, _ = deepseek_v3(x_E, bias_E)
      np.testing.assert_array_equal(found["-inf"][t], np.sort(chosen))


def test_scaling_the_input_is_not_scaling_the_output():
  """Experts are not linear: Llama 4 changes if weights scale the output."""
  model = build("llama4:tiny")
  tokens = np.arange(32, dtype=np.int32)[None] % 256
  variables = jax.jit(model.init)(jax.random.key(0), tokens)
  c = load("llama4:tiny")
  c.model.moe.router.apply_to = "output"
  other = models.build(c.model, vocab_size=257)
  one, two = (jax.jit(m.apply)(variables, tokens)[0] for m in (model, other))
  assert np.abs(one - two).max() > 1e-2


# Training.


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_on_a_mesh_and_without_one(family):
  """Compares loss, counts and new parameters, in float64 without noise."""
  found = []
  with jax.enable_x64(True):
    for sizes in (None, (1, 2, 2, 2)):
      mesh = None if sizes is None else mesh_cases.make_mesh(sizes)
      found.append(step(build(f"{family}:tiny", mesh, "float64")))
  distance, leaf = mesh_cases.worst(found[1], found[0])
  assert distance <= 1e-9, leaf
  assert np.isfinite(found[0]["sums"]["loss"].total)


def step(model):
  """Parameters, balance and sums after a step of SGD on random numbers."""
  parts = {
    "model": model,
    "task": small.task(np.ones(288, np.int32), 32, model.arch.mesh),
    "optimizer": lambda *_: optax.sgd(0.1),
  }
  numbers = mesh_cases.numbers_of(model)
  init = functools.partial(train_step.init_state, **parts, numbers=numbers)
  boxed = jax.eval_shape(init, jax.random.key(0))
  rng = np.random.default_rng(0)

  def leaf(path, x):
    names = [getattr(p, "key", getattr(p, "name", "")) for p in path]
    if names[0] == "rng":
      return jax.random.key(0)
    if names[0] not in ("params", "balance"):
      return np.zeros(x.shape, x.dtype)
    value = rng.normal(size=x.shape)
    return 1 + value / 9 if names[-1] == "scale" else value / 3

  state = jax.tree_util.tree_map_with_path(leaf, nn.unbox(boxed))
  batch = {
    "inputs": rng.integers(0, 256, (1, 8, 32)).astype(np.int32),
    "targets": rng.integers(0, 256, (1, 8, 32)).astype(np.int32),
    "mask": np.arange(32) < rng.integers(20, 33, (1, 8, 1)),
  }
  if model.arch.mesh is not None:
    state = jax.device_put(state, train_step.shardings(boxed, model.arch.mesh))
  run = jax.jit(
    functools.partial(train_step.train_step, **parts, numbers=numbers)
  )
  run = run.lower(state, batch).compile()
  new, sums = jax.device_get(run(state, batch))
  return {"params": new.params, "balance": new.balance, "sums": sums}


def test_every_variant_is_a_config():
  for family in FAMILIES:
    for variant in (*variants(family), "tiny"):
      config_lib.load(f"{ROOT}/configs/{family}.py:{variant}")
    small = counted(f"{family}:tiny")
    assert small["total"] < 30_000
  with pytest.raises(
    ConfigError, match='no variant "8x7"; did you mean "8x7b"'
  ):
    load("mixtral:8x7")


def test_no_model_is_named_in_the_package():
  """But in what reads their files; elsewhere only as whose idea something is."""
  code = re.compile(
    r"[\"'](" + "|".join([*FAMILIES, "qwen", "deepseek", "llama"]) + ")"
  )
  files = [
    f
    for f in (ROOT / "moe_jax").rglob("*.py")
    if "hf" not in f.relative_to(ROOT).parts
  ]
  found = [
    (f.name, line)
    for f in files
    for line in f.read_text().splitlines()
    if code.search(line.lower()) and not line.lstrip().startswith("#")
  ]
  assert not found
  assert len(files) > 40


def test_attention_flops_of_a_layout():
  """Twice the multiplications of scores and of the sum of values."""
  for name, pair in (
    ("mixtral:8x7b", 32 * 4 * 32 * 128),
    ("deepseek_v3:671b", 61 * 2 * 128 * (128 + 64 + 128)),
  ):
    model = build(name)
    sizes = counted(name)
    one, two = (
      counts.train_flops_per_token(model, sizes, {"inputs": n})
      for n in (32, 64)
    )
    assert two - one == 3 * 32 * pair


def test_all_of_these_are_used():
  assert set(ROUTERS) == set(FAMILIES)
  every = itertools.chain.from_iterable(
    [f"{f}:{v}" for v in variants(f)] for f in FAMILIES
  )
  assert len(set(every)) == 23
