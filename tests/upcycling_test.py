"""Experts made of dense networks: what is kept, what is new, what is refused."""

import json
import os
import tempfile
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from moe_jax import hf, main, models, upcycle
from moe_jax.core.errors import ConfigError
from moe_jax.data.text import tokenizers
from moe_jax.hf import architecture, config
from moe_jax.run import config as config_lib
from moe_jax.training import checkpoint, starts, trained
from moe_jax.training.starts import fit, upcycling
from moe_jax.training.starts.upcycling import Upcycling
from tests import compiled, parity, tiers

V, L = 40, 12
SUM_1 = {"name": "top_k", "renormalize": True}


def section(**moe):
  """Two layers whose networks have a width of 24; dropless."""
  c = tiny.get_config().model
  c.update(vocab_size=V, d_model=16, d_ff=24, head_dim=8, use_bias=True)
  c.moe.update(d_expert=24, capacity_factor=None, use_bias=True)
  c.moe.update(dispatcher={"name": "sorted"}, router=SUM_1)
  c.moe.update(moe)
  return c


def encoder_decoder(**moe):
  c = section(**moe)
  c.update(name="encoder_decoder", num_kv_heads=2)
  c.attention = {"rope": "none", "position_bias": "shared"}
  return c


def dense(c):
  c = c.copy_and_resolve_references()
  c.pattern = ("dense",)
  return c


def made(c, seed=0):
  """(model, random parameters)."""
  model = models.build(c, vocab_size=V)
  return model, drawn(model, seed)


def drawn(model, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: (rng.normal(size=x.shape) / 4).astype(x.dtype),
    nn.unbox(models.variables(model))["params"],
  )


def logits(model, params):
  rng, most = np.random.default_rng(5), model.arch.vocab_size
  token_BL = rng.integers(0, most, (2, L)).astype(np.int32)
  apply = jax.jit(
    lambda params, *texts: model.apply({"params": params}, *texts)[0]
  )
  return apply(params, *model.arguments(token_BL))


def up(source, target, **options):
  """(the target, its parameters) from configs, or from a made source."""
  source = source if isinstance(source, tuple) else made(source, seed=1)
  model, initial = made(target, seed=2)
  how = Upcycling(**options)
  (old, params), initial = source, {"params": initial}
  made_of = old, {"params": params}, model, initial, how
  return model, upcycling.upcycled(*made_of)["params"]


KEPT = {
  "copies": (section(), {}),
  "one expert of a token": (
    section(top_k=1, router=SUM_1 | {"allow_constant_weight": True}),
    {},
  ),
  "parts": (section(d_expert=12, num_experts=8), {"method": "granular"}),
  "two sets of parts": (
    section(d_expert=12, num_experts=8, top_k=4),
    {"method": "granular"},
  ),
  "encoder-decoder": (encoder_decoder(), {}),
  "relu": (section(activation="relu"), {}),
}


@pytest.mark.parametrize("name", KEPT)
def test_the_function_is_kept(name):
  c, options = KEPT[name]
  old = dense(c)
  old.activation = c.activation = c.moe.activation
  source = made(old, seed=1)
  model, params = up(source, c, **options)
  assert not fit.changes(source[0], model, Upcycling(**options))
  np.testing.assert_allclose(
    logits(model, params), logits(*source), atol=1e-5, rtol=1e-5
  )
  experts = params["decoder"]["0"]["moe"]["experts"]
  assert experts["down"].shape[1] == c.moe.num_experts


@pytest.mark.parametrize(
  "name, value",
  [("scale", 2.5), ("apply_to", "input"), ("output_masking", 0.2)],
)
def test_weights_that_do_not_add_up_to_1(name, value):
  source = made(dense(section()), seed=1)
  model, params = up(source, section(router=SUM_1 | {name: value}))
  assert fit.changes(source[0], model, Upcycling())
  assert np.abs(logits(model, params) - logits(*source)).max() > 1e-3


def test_a_softmax_of_the_chosen_adds_up_to_1():
  """Experts with the options of Mixtral."""
  chosen = {"name": "top_k", "score_before_top_k": False}
  source = made(dense(section()), seed=1)
  model, params = up(source, section(router=chosen))
  assert not fit.changes(source[0], model, Upcycling())
  np.testing.assert_allclose(
    logits(model, params), logits(*source), atol=1e-5, rtol=1e-5
  )


def test_options_that_would_do_nothing():
  source = made(dense(section()), seed=1)
  with pytest.raises(ConfigError, match="ratio = 0.25 is of the method drop"):
    up(source, section(), ratio=0.25)
  with pytest.raises(ConfigError, match="router_noise = 0.1 .* leave it out"):
    up(source, section(), router_noise=0.1)


def test_the_target_may_have_more_tokens():
  """Such as the end that every tokenizer gets here; logits of others stay."""
  for tied in (True, False):
    old, c = dense(section()), section()
    old.tie_embeddings = c.tie_embeddings = tied
    c.vocab_size = V + 3
    source = made(old, seed=1)
    target = models.build(c, vocab_size=V + 3)
    variables = {"params": source[1]}, target, {"params": drawn(target, 2)}
    params = upcycling.upcycled(source[0], *variables)["params"]
    token_BL = np.arange(V, dtype=np.int32)[None, :L]
    found, wanted = (
      compiled.apply(model, {"params": params}, token_BL)[0]
      for model, params in ((target, params), source)
    )
    assert found.shape[-1] == V + 3
    np.testing.assert_allclose(found[..., :V], wanted, atol=1e-5, rtol=1e-5)
    new = params["embedding"][V:]
    np.testing.assert_array_equal(new, drawn(target, 2)["embedding"][V:])


@pytest.mark.parametrize(
  "key, name",
  [("vocab_size", "embedding"), ("source_vocab_size", "source_em.*")],
)
def test_the_target_may_not_have_fewer_tokens(key, name):
  c = encoder_decoder()
  c.source_vocab_size = V
  old = dense(c)
  old[key] = V + 3
  source = models.build(old, vocab_size=V)
  with pytest.raises(
    ConfigError, match=f"target's {name} is for {V} tokens.* for {V + 3}"
  ):
    up((source, drawn(source, 1)), c)


def test_more_experts_of_experts():
  """4 to 8, and a token takes both copies of what it took."""
  source = made(section(num_experts=4, top_k=2), seed=1)
  model, params = up(source, section(num_experts=8, top_k=4))
  assert not fit.changes(source[0], model, Upcycling())
  np.testing.assert_allclose(
    logits(model, params), logits(*source), atol=1e-5, rtol=1e-5
  )
  moe = params["decoder"]["0"]["moe"]
  kernel = moe["router"]["kernel"]
  np.testing.assert_array_equal(kernel[..., :4], kernel[..., 4:])
  model, params = up(source, section(num_experts=8, top_k=2))
  assert fit.changes(source[0], model, Upcycling())
  assert np.abs(logits(model, params) - logits(*source)).max() > 1e-3
  model, params = up(source, section(num_experts=8, top_k=4), router_noise=0.01)
  assert fit.changes(source[0], model, Upcycling(router_noise=0.01))
  noisy = params["decoder"]["0"]["moe"]["router"]["kernel"]
  np.testing.assert_array_equal(noisy[..., :4], kernel[..., :4])
  share = (noisy - kernel)[..., 4:].std() / kernel[..., :4].std()
  assert 0.005 < share < 0.02


def test_a_share_of_units_begins_anew():
  """Drop-Upcycling: whole units, others in each expert, with old moments."""
  source = made(dense(section()), seed=1)
  model, params = up(source, section(), method="drop", ratio=0.25)
  assert fit.changes(source[0], model, Upcycling("drop"))
  old = source[1]["decoder"]["0"]["mlp"]
  new = params["decoder"]["0"]["moe"]["experts"]
  drawn = []
  for expert in range(4):
    changed = {
      "down": (new["down"][0, expert] != old["down"][0]).all(-1),
      "up": (new["up"][0, expert] != old["up"][0]).all(0),
      "gate": (new["gate"][0, expert] != old["gate"][0]).all(0),
    }
    assert all(x.sum() == 6 for x in changed.values())
    assert (changed["down"] == changed["up"]).all()
    assert (changed["gate"] == changed["up"]).all()
    drawn.append(changed["up"].tolist())
    units = changed["up"]
    ratio = new["up"][0, expert][:, units].std() / old["up"][0][:, units].std()
    assert 0.6 < ratio < 1.6
  assert len({*map(tuple, drawn)}) == 4
  for name in ("up_bias", "down_bias"):
    np.testing.assert_array_equal(new[name][0, 3], old[name][0])


def test_experts_that_were_there_stay():
  """Where the source has experts, only parameters that are added begin anew."""
  source = made(section(num_experts=2), seed=1)
  _, params = up(source, section(), method="drop")
  old = source[1]["decoder"]["0"]["moe"]["experts"]["up"]
  new = params["decoder"]["0"]["moe"]["experts"]["up"]
  np.testing.assert_array_equal(new[:, :2], old)
  assert (new[:, 2:] != old).any((0, 2, 3)).all()


class State(NamedTuple):
  """The attributes of a state that `starts.replaced` reads."""

  params: dict
  balance: dict
  ema: dict | None = None

  def replace(self, **fields):
    return self._replace(**fields)


@pytest.mark.parametrize("average", [False, True])
def test_what_a_run_takes_from_its_start(average, tmp_path):
  """Parameters, their average too, and the state of the same balancers."""
  given = {"params": {"w": np.ones(3)}, "balance": {"bias": np.ones(2)}}
  same = tiny.get_config()
  params, balance = {"w": jnp.zeros(3)}, {"bias": jnp.zeros(2)}
  state = State(params, balance, params if average else None)
  found = starts.replaced(state, given, None, same, str(tmp_path), 0)
  assert found.params["w"].tolist() == [1, 1, 1]
  assert found.balance["bias"].tolist() == [1, 1]
  assert (found.ema is not None) == average
  if (
    average
  ):  # A step gives up the arrays of a state, so that none is there twice.
    assert found.ema["w"].tolist() == [1, 1, 1]
    assert found.ema["w"] is not found.params["w"]
  other = State(params, {"bias": jnp.zeros(4)})
  found = starts.replaced(other, given, None, same, str(tmp_path), 0)
  assert found.balance["bias"].tolist() == [0] * 4


def test_the_parts_of_a_network():
  """Expert e G + g is part g, and its output is times G."""
  source = made(dense(section()), seed=1)
  target = section(d_expert=12, num_experts=8)
  _, params = up(source, target, method="granular")
  old = source[1]["decoder"]["0"]["mlp"]
  new = params["decoder"]["0"]["moe"]
  for expert in range(8):
    part = slice(0, 12) if expert % 2 == 0 else slice(12, 24)
    ours = {k: x[0, expert] for k, x in new["experts"].items()}
    np.testing.assert_array_equal(ours["up"], old["up"][0][:, part])
    np.testing.assert_array_equal(ours["down"], 2 * old["down"][0][part])
  kernel = new["router"]["kernel"][0]
  np.testing.assert_array_equal(kernel[:, ::2], kernel[:, 1::2])
  assert len(np.unique(kernel[0])) == 4


def test_layers_may_stay_dense():
  """Every second one gets experts, and no other weight changes."""
  c = section()
  c.pattern = ("dense", "moe")
  source = made(dense(section()), seed=1)
  model, params = up(source, c)
  np.testing.assert_allclose(
    logits(model, params), logits(*source), atol=1e-5, rtol=1e-5
  )
  ours, old = params["decoder"], source[1]["decoder"]["0"]
  np.testing.assert_array_equal(ours["0"]["mlp"]["up"][0], old["mlp"]["up"][0])
  np.testing.assert_array_equal(
    ours["1"]["attention"]["query"][0], old["attention"]["query"][1]
  )


def switched(key, value, **moe):
  c = section(**moe)
  c[key] = value
  return c


@pytest.mark.parametrize(
  "target, options, words",
  [
    (encoder_decoder(), {}, ["Decoder", "EncoderDecoder", "model.name"]),
    (switched("d_model", 32), {}, ["d_model = 32", "16"]),
    (switched("num_layers", 4), {}, ["num_layers = 4", "2"]),
    (switched("norm", "layer"), {}, ["norm", "layer", "rms"]),
    (switched("rope_theta", 1e6), {}, ["rope_theta", "layer 0, attention"]),
    (section(d_expert=16), {}, ["d_expert = 16", "24"]),
    (section(d_expert=12), {}, ["d_expert = 12", "granular"]),
    (section(d_expert=7), {"method": "granular"}, ["d_expert = 7"]),
    (
      section(d_expert=8, num_experts=4),
      {"method": "granular"},
      ["num_experts = 4", "3 parts"],
    ),
    (section(activation="relu"), {}, ["relu", "swiglu"]),
    (section(use_bias=False), {}, ["have biases", "use_bias = True"]),
    (section(num_shared_experts=1), {}, ["shared experts", "nothing"]),
    (switched("pattern", ("moe+dense",)), {}, ["after its experts"]),
  ],
)
def test_sources_that_do_not_fit(target, options, words):
  with pytest.raises(ConfigError) as e:
    up(dense(section()), target, **options)
  for word in words:
    assert word in str(e.value), str(e.value)


def test_experts_that_are_no_multiple():
  for moe in ({"num_experts": 6}, {"num_experts": 8, "d_expert": 12}):
    with pytest.raises(ConfigError, match="no multiple of the 4"):
      up(section(num_experts=4), section(**moe))
  with pytest.raises(ConfigError, match="none there"):
    up(section(), dense(section()))
  plain = dense(section())
  plain.use_bias = False
  with pytest.raises(ConfigError, match="no biases .*use_bias = False"):
    up(plain, section())
  biased = section(num_experts=8, router=SUM_1 | {"use_bias": True})
  with pytest.raises(ConfigError, match="moe/router/kernel_bias .* not there"):
    up(section(num_experts=4), biased)


SHARED = {"num_shared_experts": 1, "shared_gate": True}


@pytest.mark.parametrize("pattern, more", [("moe+dense", {}), ("moe", SHARED)])
def test_networks_beside_the_experts_are_kept(pattern, more):
  """ST-MoE's dense network, and shared experts, where both sides have them."""
  old, c = section(**more), section(num_experts=8, top_k=4, **more)
  old.pattern = c.pattern = (pattern,)
  source = made(old, seed=1)
  model, params = up(source, c)
  assert not fit.changes(source[0], model, Upcycling())
  np.testing.assert_allclose(
    logits(model, params), logits(*source), atol=1e-5, rtol=1e-5
  )


def changed(c, **keys):
  c.update(keys)
  return c


@pytest.mark.parametrize(
  "source, target, words",
  [
    (section(**SHARED), section(num_experts=8), "moe/shared/down.* layer 0"),
    (switched("pattern", ("moe+dense",)), section(), "mlp/down"),
    (
      dense(switched("activation", "relu")),
      dense(section()),
      "activation = 'swiglu' is 'relu' .* dense network",
    ),
    (
      dense(section()),
      dense(switched("use_bias", False)),
      "mlp/down_bias, mlp/gate_bias, mlp/up_bias in inputs, layer 0",
    ),
    (section(router=SUM_1 | {"use_bias": True}), section(), "kernel_bias"),
    (
      changed(encoder_decoder(), source_vocab_size=V),
      encoder_decoder(),
      "the source has source_embedding, and the target",
    ),
  ],
)
def test_nothing_of_the_source_is_dropped(source, target, words):
  with pytest.raises(ConfigError, match=words):
    up(source if isinstance(source, tuple) else made(source), target)


@pytest.mark.parametrize(
  "router",
  [
    SUM_1 | {"score": "sigmoid"},
    SUM_1 | {"cosine": True},
    SUM_1 | {"num_expert_groups": 2, "top_expert_groups": 1},
  ],
)
def test_other_choices_keep_no_function(router):
  source, _ = made(section(num_experts=4))
  target, _ = made(section(num_experts=8, top_k=4, router=router))
  assert fit.changes(source, target, Upcycling())
  # Groups of neighbours are others where experts are copied.
  if "num_expert_groups" in router:
    source, _ = made(section(num_experts=4, router=router))
    assert fit.changes(source, target, Upcycling())
  slots = {"capacity_factor": 1.0, "dispatcher": {"name": "gather"}}
  source, _ = made(section(num_experts=4, **slots))
  same, _ = made(section(num_experts=8, top_k=4))
  assert fit.changes(source, same, Upcycling())


def test_a_bias_of_selection_goes_on():
  """A copy has the bias of the expert that it copies."""
  bias = {"load": {"name": "bias", "rate": 0.1}}
  old, c = (
    section(num_experts=n, top_k=k, balancers=bias) for n, k in ((4, 2), (8, 4))
  )
  rng = np.random.default_rng(0)
  (source, params), (model, initial) = made(old, seed=1), made(c, seed=2)
  shapes = nn.unbox(models.variables(source))["balance"]
  state = jax.tree.map(lambda x: rng.normal(size=x.shape), shapes)
  zeros = nn.unbox(models.variables(model))["balance"]
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), zeros)
  found = upcycling.upcycled(
    source,
    {"params": params, "balance": state},
    model,
    {"params": initial, "balance": zeros},
  )
  assert not fit.changes(source, model, Upcycling())
  (was,), (now,) = map(jax.tree.leaves, (state, found["balance"]))
  np.testing.assert_allclose(now, np.concatenate([was, was], -1), rtol=1e-6)
  token_BL = np.arange(L, dtype=np.int32)[None]
  given = {"params": params, "balance": state}
  wanted, ours = (
    compiled.apply(one, weights, token_BL)[0]
    for one, weights in ((source, given), (model, found))
  )
  np.testing.assert_allclose(ours, wanted, atol=1e-5, rtol=1e-5)


MORE = ["--config.model.moe.router={'name': 'top_k', 'renormalize': True}"]
MORE += ["--config.model.moe.capacity_factor=None"]
MORE += ["--config.model.moe.dispatcher={'name': 'sorted'}"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A dense run of a few steps, and flags of its config."""
  folder = tmp_path_factory.mktemp("upcycling")
  flags = ["--config=configs/tiny.py", "--config.model.d_ff=32"]
  flags += ["--config.train.num_steps=6", "--config.eval.batches_per_domain=1"]
  shared = f"{tempfile.gettempdir()}/moe_jax_tests_{os.getuid()}/moe_jax"
  flags += [f"--config.data.cache_dir={shared}"]
  pattern = "--config.model.pattern=('dense',)"
  main.main([*flags, pattern, f"--workdir={folder}/dense"])
  return folder, flags


KEPT_STILL = "--config.optim.learning_rate=0"


@pytest.mark.long
def test_from_a_run_to_a_run(run, capsys, monkeypatch):
  folder, flags = run
  out = folder / "moe"
  given = [f"--checkpoint={folder}/dense", *flags, *MORE, f"--out={out}"]
  upcycle.main(given)
  assert "function of the source is kept" in capsys.readouterr().out
  assert [p.name for p in folder.iterdir()].count("moe") == 1
  more = [f"--config.init_from={out}", f"--workdir={folder}/up"]
  main.main([*flags, *MORE, KEPT_STILL, *more])
  found, wanted = map(checkpoint.load_params, (folder / "up", out))
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
  # A run that has begun goes on without what it started from.
  metrics = folder / "up" / "metrics.jsonl"
  lines = metrics.read_text().splitlines(keepends=True)
  metrics.write_text("".join(x for x in lines if "validation" not in x))
  moved = out.rename(folder / "moved")
  main.main([*flags, *MORE, KEPT_STILL, *more])
  assert metrics.read_text().count("validation") == 1
  moved.rename(out)
  monkeypatch.setattr(
    upcycle.trained, "load", None
  )  # It does not come to this.
  with pytest.raises(ConfigError, match="not an empty folder"):
    upcycle.main(given)


def test_weights_of_another_model(run, capsys):
  folder, flags = run
  place = f"--config.init_from={folder}/dense"
  other = folder / "other"
  with pytest.raises(ConfigError, match="moe-jax upcycle"):
    main.main([*flags, *MORE, KEPT_STILL, place, f"--workdir={other}"])
  # The folder takes another config.
  assert not (other / "run.json").exists()
  assert not any(other.glob("checkpoints/*"))
  assert not (other / "config.json").exists()
  place = f"--config.init_from={other}"
  with pytest.raises(
    ConfigError, match=r"init_from = .*: there is no checkpoint"
  ):
    main.main([*flags, *MORE, KEPT_STILL, place, f"--workdir={other}"])
  with pytest.raises(ConfigError, match="init_from = nowhere is no folder"):
    main.main(
      [*flags, "--config.init_from=nowhere", f"--workdir={folder}/none"]
    )


def test_nothing_is_left_of_a_refused_one(run):
  folder, flags = run
  before = sorted(p.name for p in folder.iterdir())
  wide = "--config.model.moe.d_expert=48"
  with pytest.raises(ConfigError, match="d_expert = 48"):
    upcycle.main(
      [f"--checkpoint={folder}/dense", *flags, wide, f"--out={folder}/wide"]
    )
  assert sorted(p.name for p in folder.iterdir()) == before


def test_a_run_may_make_its_experts_itself(run):
  """The parameters are those that the command makes."""
  folder, flags = run
  more = [f"--config.init_from={folder}/dense", KEPT_STILL]
  # The seed of the run counts too.
  more += ["--config.upcycle={'method': 'drop', 'seed': 0}", "--config.seed=1"]
  main.main([*flags, *more, *MORE, f"--workdir={folder}/itself"])
  given = [f"--checkpoint={folder}/dense", *flags, *MORE, "--method=drop"]
  given += ["--seed=1"]
  upcycle.main([*given, f"--out={folder}/made"])
  found = checkpoint.load_params(folder / "itself")
  wanted = checkpoint.load_params(folder / "made")
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
  with pytest.raises(ConfigError, match="no weights to begin with"):
    main.main([*flags, *more[1:], *MORE, "--workdir=x"])
  with pytest.raises(ConfigError, match='upcycle has no "metod"'):
    main.main([*flags, "--config.upcycle={'metod': 1}", "--workdir=x"])


@pytest.mark.parametrize("name", tiers.only(["llama"], ["llama", "t5"]))
def test_the_sizes_of_published_weights(name, tmp_path, capsys):
  """A config of any sizes will do where those of the source are asked for."""
  c = dense(section() if name == "llama" else encoder_decoder())
  c.update(use_bias=False, vocab_size=288, d_model=24, d_ff=20)
  c.scale_embedding = False
  c.update(activation="swiglu" if name == "llama" else "relu")
  flags, task = ["--config=configs/tiny.py", *MORE], "next_token"
  if name == "t5":
    c.attention["scale_scores"] = False
    c.scale_output = True
    task = "span_corruption"
    flags += [f"--config.task={{'name': '{task}'}}"]
  model = models.build(c, vocab_size=288)
  params = drawn(model, 3)
  tokens = {"eos_token_id": 1, "decoder_start_token_id": 0}
  folder = tmp_path / name
  hf.save(folder, model, {"params": params}, model_type=name, extra=tokens)
  out = tmp_path / "out"
  upcycle.main([f"--hf={folder}", *flags, "--like_source", f"--out={out}"])
  assert "function of the source is kept" in capsys.readouterr().out
  made = trained.of_run(str(out))
  assert made.config.model.pattern == ("moe",)
  assert made.model.arch.d_model == 24 and made.config.task.name == task
  found = logits(made.model, made.variables["params"])
  np.testing.assert_allclose(found, logits(model, params), atol=1e-5)
  words = "d_model = .* is 24 in the source"
  if name == "t5":
    assert (made.ends, made.start) == ((1,), (0,))
    words = "task.end = 1, and the config has None"
  with pytest.raises(ConfigError, match=words):
    upcycle.main([f"--hf={folder}", *flags, f"--out={tmp_path}/other"])


def test_tokens_that_mean_something_else():
  """A vocabulary that is large enough does not make them the same."""
  source = trained.Trained(*made(section()), tokenizers.load(), (256,))
  fit.check_text(source, tiny.get_config(), "there")
  other = source.tokenizer._replace(name="words.json", key="words")
  with pytest.raises(
    ConfigError, match="there has data.tokenizer = words.json, .* has bytes"
  ):
    fit.check_text(source._replace(tokenizer=other), tiny.get_config(), "there")


def test_weights_of_other_tokens_begin_no_run(run, monkeypatch, caplog):
  """Also where a run only goes on with them; other options are told."""
  folder, flags = run
  c = config_lib.load(flags[0].partition("=")[2], [x[9:] for x in flags[1:]])
  c.model.pattern = ("dense",)
  c.model.norm_eps = 1e-3
  starts.variables(f"{folder}/dense", c)
  assert (
    "model of" in caplog.text and "norm_eps = 1e-06, here 0.001" in caplog.text
  )
  # A run of an older version, whose config has no task, had the only one.
  path = folder / "dense" / "config.json"
  whole = path.read_text()
  bare = {k: x for k, x in json.loads(whole).items() if k != "task"}
  path.write_text(json.dumps(bare))
  starts.variables(f"{folder}/dense", c)
  path.write_text(whole)
  c.data.tokenizer = "words.json"
  with pytest.raises(
    ConfigError, match="data.tokenizer = bytes, .* words.json"
  ):
    starts.variables(f"{folder}/dense/checkpoints/6", c)
  old = {"task": {"name": "span_corruption", "sentinels": [9, -1], "end": 1}}
  old["data"] = {"tokenizer": "words.json"}
  c.task = {"name": "span_corruption", "sentinels": (9, -1), "end": 1}
  fit.check_run(old, c, "there")
  c.task.sentinels = None
  with pytest.raises(ConfigError, match=r"task.sentinels = \(9, -1\), .* None"):
    fit.check_run(old, c, "there")
  c.task = {"name": "translation", "end": 2}
  with pytest.raises(ConfigError, match="task.end = 1, .* 2"):
    fit.check_run(old, c, "there")


def test_the_encoder_of_a_source_keeps_its_width():
  """With the routing of the config's encoder, where that has one of its own."""
  old, new = encoder_decoder(), encoder_decoder(num_experts=16)
  old.encoder = {"moe": {"d_expert": 20}}
  new.encoder = {"moe": {"tokens_per_group": 24}}
  new.moe.d_expert = 7
  c = tiny.get_config()
  c.task = {"name": "span_corruption"}
  source = trained.Trained(models.build(old, vocab_size=V), {}, None, ())
  c.model = old
  source = source._replace(config=c)
  target = tiny.get_config()
  target.model = new
  found = upcycle._like(target, source, None).model
  assert found.moe.num_experts == 16 and found.moe.d_expert == 24
  wanted = {"d_expert": 20, "tokens_per_group": 24}
  assert found.encoder.moe.to_dict() == wanted


def test_routing_is_that_of_the_config(tmp_path):
  """With the sizes of the source: of T5 in both stacks, or of fewer experts."""
  t5 = dense(encoder_decoder())
  t5.update(use_bias=False, vocab_size=288, d_model=24, d_ff=20)
  t5.update(activation="relu", scale_embedding=False, scale_output=True)
  t5.attention["scale_scores"] = False
  sparse = section(num_experts=4, use_bias=False, d_expert=12)
  sparse.update(use_bias=False, vocab_size=288, scale_embedding=False)
  for name, c, model_type, file, more in (
    ("t5", t5, "t5", "configs/switch.py:base_16", []),
    ("mixtral", sparse, "mixtral", "configs/tiny.py", ["num_experts=8"]),
  ):
    model = models.build(c, vocab_size=288)
    folder, out = tmp_path / name, tmp_path / f"{name}-out"
    extra = {"eos_token_id": 1, "decoder_start_token_id": 0}
    params = {"params": drawn(model, 3)}
    hf.save(folder, model, params, model_type=model_type, extra=extra)
    flags = [f"--hf={folder}", f"--config={file}", f"--out={out}"]
    flags += [f"--config.model.moe.{x}" for x in more]
    upcycle.main([*flags, "--like_source"])
    made, wanted = trained.of_run(str(out)).config, config_lib.load(file)
    moe, own = made.model.moe.to_dict(), wanted.model.moe.to_dict()
    own |= {"d_expert": 20 if name == "t5" else 12, "activation": c.activation}
    own |= {"num_experts": 8} if more else {}
    assert moe == own
    if name == "t5":
      assert made.model.encoder.moe.tokens_per_group == 8192
      assert made.model.encoder.pattern == made.model.pattern == ("moe",)


def test_the_sizes_of_a_run(run):
  folder, flags = run
  given = [f"--checkpoint={folder}/dense", f"--out={folder}/alike", *MORE]
  given += ["--config=configs/tiny.py", "--like_source"]
  upcycle.main(given)
  made = trained.of_run(str(folder / "alike"))
  (experts,) = {x.recipe.experts.width for x in made.model.sublayers.values()}
  assert experts == made.config.model.d_ff == 32


@pytest.mark.parametrize("name", ["llama_b", "mistral_a", "qwen2_a", "t5_a"])
def test_published_dense_models_get_experts(name):
  """Their function is kept, in decoders and in both stacks of T5."""
  fields, _ = config.load(parity.FOLDER / name)
  _, ours, _ = config.read(fields, name)
  for stack in ("", "encoder."):
    if f"{stack}layers" in ours:
      ours[f"{stack}layers"] = ["moe"] * ours[f"{stack}num_layers"]
  ours |= {"moe.num_experts": 3, "moe.top_k": 2, "moe.d_expert": ours["d_ff"]}
  ours["moe.router.renormalize"] = True
  target = architecture.build(ours, name)
  source, variables = hf.load(parity.FOLDER / name)
  wanted = logits(source, variables["params"])
  initial = {"params": drawn(target, 0)}
  params = upcycling.upcycled(source, variables, target, initial)["params"]
  assert not fit.changes(source, target, Upcycling())
  np.testing.assert_allclose(logits(target, params), wanted, atol=1e-5)
