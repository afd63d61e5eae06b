"""Texts: sampling as it is defined, batches as each text alone, the command."""

import argparse
import collections
import json
import re

import jax
import ml_collections
import numpy as np
import pytest

from configs import tiny
from moe_jax import evaluate, generate, hf, main, models
from moe_jax.core import parallel
from moe_jax.core.errors import ConfigError
from moe_jax.data import batches
from moe_jax.data.text import corpora
from moe_jax.models.encoder_decoder import Text
from moe_jax.models.generation import decoding
from moe_jax.models.generation.beam import Beams
from moe_jax.models.generation.decoding import Sampling
from moe_jax.training import checkpoint, program, trained
from tests import (
  beam_test,
  compiled,
  encoder_decoder_test,
  parity,
  tokenizers_test,
)
from tests.small import SmallCorpus

LOGITS = np.log([0.4, 0.3, 0.2, 0.06, 0.04]).astype(np.float32)


def drawn(n=4000, **options):
  """{token: share}."""
  rows = np.broadcast_to(LOGITS, (n, 5))
  tokens = decoding.sample(rows, jax.random.key(0), Sampling(**options))
  return {
    k: v / n
    for k, v in collections.Counter(np.asarray(tokens).tolist()).items()
  }


@pytest.mark.parametrize(
  "options,shares",
  [
    ({"temperature": 0}, [1]),
    ({"temperature": 1.0}, [0.4, 0.3, 0.2, 0.06, 0.04]),
    ({"temperature": 1.0, "top_k": 2}, [4 / 7, 3 / 7]),
    ({"temperature": 1.0, "top_p": 0.7}, [4 / 7, 3 / 7]),
    ({"temperature": 1.0, "top_p": 0.71}, [4 / 9, 3 / 9, 2 / 9]),
    ({"temperature": 1.0, "top_p": 0.01}, [1]),
    ({"temperature": 1.0, "top_k": 3, "top_p": 0.5}, [4 / 7, 3 / 7]),
    ({"temperature": 0.5, "top_k": 2}, [16 / 25, 9 / 25]),
  ],
)
def test_sampling_as_it_is_defined(options, shares):
  found = drawn(**options)
  assert set(found) == set(range(len(shares)))
  for token, share in enumerate(shares):
    assert abs(found[token] - share) < 0.03


@pytest.fixture(scope="module")
def loaded():
  return hf.load(parity.FOLDER / "gpt_oss_a")


def test_a_batch_is_each_prompt_alone(loaded):
  """Or among copies of itself, which takes fewer programs."""
  model, variables = loaded
  prompts = [[1, 2, 3, 4, 5, 6, 7], [9], [5, 5, 2]]
  together = decoding.generate(model, variables, prompts, 9, experts=True)
  for row, prompt in enumerate(prompts):
    more = 16 - len(prompt)  # The same cache for all.
    copies = [prompt] * len(prompts)
    alone = decoding.generate(model, variables, copies, more, experts=True)
    np.testing.assert_array_equal(
      together.tokens_BN[row], alone.tokens_BN[0, :9]
    )
    for layer, found in alone.experts.items():
      assert found.shape == (3, 15, 2)
      np.testing.assert_array_equal(
        np.sort(together.experts[layer][row, 7 - len(prompt) :]),
        np.sort(found[0, : len(prompt) + 8]),
      )


def test_experts_are_those_of_the_whole_forward_pass(loaded):
  model, variables = loaded
  made = decoding.generate(model, variables, [[3, 1, 4]], 6, experts=True)
  tokens = np.array([[3, 1, 4, *made.tokens_BN[0]]])[:, :-1]
  _, aux = compiled.apply(model, variables, tokens, collect="routing")
  for i in range(2):  # A repeat of two layers.
    whole = aux["decoder"][str(i)]["moe"]["choice"].expert_TK[0, 0]
    np.testing.assert_array_equal(
      np.sort(made.experts[f"{i:02d}"][0]), np.sort(whole)
    )


def test_an_end_is_the_last_token(loaded):
  model, variables = loaded
  free = decoding.generate(model, variables, [[1, 2], [7, 8]], 12).tokens_BN
  end = int(free[0, 3])
  made = decoding.generate(
    model, variables, [[1, 2], [7, 8]], 12, ends=[end]
  ).tokens_BN
  for row, before in zip(made, free):
    stop = before.tolist().index(end) + 1 if end in before else 12
    stop = min(stop, made.shape[1])
    np.testing.assert_array_equal(row[:stop], before[:stop])
    assert (row[stop:] == -1).all()


def test_seeds_and_temperatures(loaded):
  model, variables = loaded

  def once(**options):
    sampling = Sampling(**options)
    made = decoding.generate(model, variables, [[1, 2]], 12, sampling)
    return made.tokens_BN.tolist()

  assert once(temperature=1.0, seed=1) == once(temperature=1.0, seed=1)
  assert once(temperature=1.0, seed=1) != once(temperature=1.0, seed=2)
  assert once(temperature=1.0, top_k=1, seed=1) == once()


@pytest.mark.parametrize(
  "prompts,options,words",
  [
    ([], {}, "at least one token"),
    ([[]], {}, "at least one token"),
    ([[43]], {}, "a prompt's token = 43 is not .* from 0 to 42"),
    ([[1, -1]], {}, "a prompt's token = -1"),
    ([[1]], {"temperature": -1.0}, "temperature = -1.0 is not .* 0 or more"),
    ([[1]], {"temperature": np.inf}, "temperature = inf"),
    ([[1]], {"temperature": np.nan}, "temperature = nan"),
    ([[1]], {"top_k": 99}, "top_k = 99 is not .* from 1 to 43"),
    ([[1]], {"top_p": 0.0}, "top_p = 0.0"),
    ([[1]], {"seed": -1}, "seed = -1"),
  ],
)
def test_impossible_values(loaded, prompts, options, words):
  with pytest.raises(ConfigError, match=words):
    decoding.generate(*loaded, prompts, 4, Sampling(**options))


@pytest.fixture(scope="module")
def two_texts():
  """An encoder-decoder with tokens that differ from text to text."""
  model, variables = beam_test.encoder_decoder("float32")
  return model, jax.tree.map(np.float32, variables)


def test_an_encoder_decoder_with_padding_on_both_sides(two_texts):
  """Every text is what whole passes without a cache say of it."""
  model, variables = two_texts
  prompts, starts = beam_test.PROMPTS, beam_test.STARTS
  options = {"start": starts, "experts": True}
  made = decoding.generate(model, variables, prompts, 6, **options)
  whole = model, variables, prompts, starts, made.tokens_BN.tolist()
  logits_BLV, aux = beam_test.whole_pass(*whole, collect="routing")
  args = (
    Text(*decoding._padded(prompts, 1, after=True)),
    Text(*decoding._padded(starts, 1)),
  )
  cache = {}
  for place, token_B in enumerate(made.tokens_BN.T):
    cache, found_BV, _ = decoding.step(model, 9, True, variables, cache, *args)
    last = np.array([*map(len, starts)]) + place - 1
    wanted_BV = logits_BLV[np.arange(3), last]
    np.testing.assert_allclose(found_BV, wanted_BV, atol=1e-5)
    np.testing.assert_array_equal(token_B, wanted_BV.argmax(-1))
    args = decoding._next(model, token_B)
  assert {k: x.shape for k, x in made.experts.items()} == {
    "01": (3, 7, 2),
    "03": (3, 3 + 6 - 1, 2),
  }
  expert_BLK = aux["decoder"]["1"]["moe"]["choice"].expert_TK.reshape(3, -1, 2)
  for row, start in enumerate(starts):
    found, size = made.experts["03"][row, 3 - len(start) :], len(start) + 5
    np.testing.assert_array_equal(
      np.sort(found), np.sort(expert_BLK[row, :size])
    )


@pytest.mark.parametrize(
  "options,words",
  [
    ({}, "needs a token that its texts begin with; give start"),
    ({"start": []}, "needs a token that its texts begin with"),
    ({"start": [[0], []]}, "start has tokens for 1 texts, and there are 2"),
    ({"start": [[0]]}, "start has tokens for 1 texts, and there are 2"),
    ({"start": [40]}, "a token of start = 40 is not .* from 0 to 39"),
    ({"start": [0], "prompts": [[1], [40]]}, "a prompt's token = 40"),
    ({"start": [0], "prompts": [[1], []]}, "at least one token"),
    ({"start": [0], "num_tokens": 0}, "num_tokens = 0"),
  ],
)
def test_impossible_texts(two_texts, options, words):
  given = {"prompts": [[1], [2]], "num_tokens": 4, **options}
  with pytest.raises(ConfigError, match=words):
    decoding.generate(*two_texts, **given)


def test_a_decoder_has_no_start(loaded):
  with pytest.raises(ConfigError, match=r"start = \[0\] is for an encoder-dec"):
    decoding.generate(*loaded, [[1]], 4, start=[0])


ON_MESHES = [("deepseek_v3_a", (1, 2, 2, 2)), ("gpt_oss_a", (1, 1, 4, 1))]


@pytest.mark.long  # `test_the_command_on_a_run` has a mesh too.
@pytest.mark.parametrize("name,sizes", ON_MESHES)
def test_a_mesh_changes_nothing(name, sizes):
  """Nor does it matter that three texts do not divide over the devices."""
  devices = jax.devices()[: np.prod(sizes)]
  mesh = parallel.make_mesh(sizes, devices)
  loaded = hf.load(parity.FOLDER / name)
  spread = hf.load(parity.FOLDER / name, mesh)
  assert len(spread[1]["params"]["embedding"].devices()) == len(devices)
  prompts = [[1, 2, 3, 4, 5, 6, 7], [9], [5, 5, 2]]
  for sampling in (Sampling(), Sampling(1.0, top_p=0.9, seed=3)):
    one, other = (
      decoding.generate(*found, prompts, 9, sampling, experts=True)
      for found in (loaded, spread)
    )
    np.testing.assert_array_equal(one.tokens_BN, other.tokens_BN)
    for layer, chosen in one.experts.items():
      np.testing.assert_array_equal(
        np.sort(chosen), np.sort(other.experts[layer])
      )


@pytest.mark.parametrize("command", [generate, evaluate, main])
def test_arguments_that_are_not_utf8(command):
  """They stand in sys.argv as surrogates, and nothing is loaded before."""
  argument = b"--prompt=a\xff".decode("utf-8", "surrogateescape")
  with pytest.raises(ConfigError, match=r"'--prompt=a\\udcff' is not UTF-8"):
    command.main(["--checkpoint=none", "--config=none", argument])


@pytest.mark.parametrize("command", [generate, evaluate])
def test_every_flag_says_what_it_is(command, capsys):
  with pytest.raises(SystemExit):
    command.main(["--help"])
  options = capsys.readouterr().out.partition("options:")[2]
  flags = re.split(r"\n  (?=-)", options)[1:]
  assert len(flags) > 8
  for flag in flags:
    assert re.search(r"\s{2,}\w", flag), flag


def test_the_command_on_a_run(tmp_path, capsys):
  """Byte for byte what the model says of whole texts."""
  run = tmp_path / "run"
  main.main(
    [
      *("--config=configs/tiny.py", "--config.mesh=(8,1,1,1)"),
      "--config.train.check_mesh=False",
      *("--config.train.num_steps=3", "--config.train.log_every=3"),
      "--config.optim.warmup_steps=1",
      "--config.eval.batches_per_domain=1",
      "--config.train.ema=0.01",  # nearly the parameters
      # Groups of whole batches, which no text fills.
      "--config.model.moe.tokens_per_group=64",
      f"--workdir={run}",
    ]
  )
  capsys.readouterr()
  flags = ["--prompt=def f(", "--prompt=x", "--num_tokens=5", "--experts"]
  assert generate.main([f"--checkpoint={run}", *flags]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith("def f(")
  rows = [line for line in lines if "  00: " in line and "  01: " in line]
  assert len(rows) == (6 + 5 - 1) + (1 + 5 - 1)
  assert rows[0].lstrip().startswith("'d'")
  found = trained.of_run(str(run / "checkpoints" / "3"))
  prompts = [list(b"def f("), list(b"x")]
  made = decoding.generate(found.model, found.variables, prompts, 5)
  tokens = [*prompts[0], *made.tokens_BN[0].tolist()]
  text = found.tokenizer.decode([t for t in tokens if t != 256])
  assert "\n".join(lines).startswith(text)
  logits = compiled.apply(
    found.model, found.variables, np.array([tokens[:-1]])
  )[0]
  assert logits[0, -5:].argmax(-1).tolist() == tokens[-5:]
  flags += ["--mesh=1,2,4,1", "--ema"]
  assert generate.main([f"--checkpoint={run}", *flags]) == 0
  assert capsys.readouterr().out.splitlines() == lines
  average = trained.of_run(str(run), ema=True).variables["params"]
  same = jax.tree.map(np.array_equal, average, found.variables["params"])
  assert not any(jax.tree.leaves(same))
  left = run / "config.json"
  right = left.read_text()
  edited = json.loads(right)
  edited["eval"]["batch_size"] = None
  left.write_text(json.dumps(edited))
  with pytest.raises(ConfigError, match="eval.batch_size = None is not"):
    trained.of_run(str(run))
  left.write_text(right)
  evaluated = ["--batch_size=8", "--batches_per_domain=1"]
  assert evaluate.main([f"--checkpoint={run}", *evaluated]) == 0
  said = capsys.readouterr().out
  assert re.search(r"bits_per_byte +\d\.\d+  bits per byte of text\n", said)
  assert "Other than" not in said
  with pytest.raises(ConfigError, match="give the text .* --dataset=NAME"):
    evaluate.main([f"--hf={parity.FOLDER / 'mixtral_a'}"])
  with pytest.raises(ConfigError, match="--ema"):
    generate.main([f"--hf={run}", "--ema", "--prompt=x"])
  with pytest.raises(ConfigError, match="has no config.json of a run; give"):
    generate.main([f"--checkpoint={tmp_path / 'none'}", "--prompt=x"])


@pytest.fixture
def t5(tmp_path, monkeypatch):
  """The folder of a run of span corruption, with random parameters."""
  c = tiny.get_config()
  c.task.name = "span_corruption"
  own = {"capacity_factor": 0.5, "dispatcher": {"name": "gather"}}
  c.model = encoder_decoder_test.section(encoder={"moe": own})
  (tmp_path / "config.json").write_text(c.to_json())
  task = program.build_task(c, prepare=False)
  model = models.build(c.model, **task.given)
  variables = jax.tree.map(np.float32, beam_test.random_variables(model))
  monkeypatch.setattr(checkpoint, "load_step", lambda *a: (7, variables))
  return tmp_path


def test_the_command_on_an_encoder_decoder(t5, capsys):
  loaded = generate.with_sentinels(trained.of_run(str(t5)))
  assert (loaded.start, loaded.ends) == ((256,), (256,))
  for parts in loaded.model.sublayers.values():
    assert parts.grouping.capacity_factor is None
  tokenizer = loaded.tokenizer
  assert tokenizer.decode([257, 257, 104, 105, 258]) == (
    "<extra_id_0><extra_id_0>hi<extra_id_1>"
  )
  flags = ["--prompt=a<extra_id_1>b", "--prompt=", "--num_tokens=5"]
  flags += ["--beams=3", "--num_returned=2", "--length_penalty=0.5"]
  flags += ["--start=x<extra_id_0>", "--experts"]
  assert generate.main([f"--checkpoint={t5}", *flags]) == 0
  lines = capsys.readouterr().out.splitlines()
  prompts, start = [[97, 258, 98, 256], [256]], [256, 120, 257]
  made = decoding.generate(
    *loaded[:2],
    prompts,
    5,
    ends=[256],
    start=start,
    experts=True,
    beams=Beams(3, 0.5, num_returned=2, length_before=2),
  )
  wanted, texts = [], beam_test.texts_of(made)
  for row, tokens in enumerate(texts):
    score, prompt = made.score_B[row], prompts[row // 2]
    said = tokenizer.decode([t for t in tokens if t != 256])
    wanted.append(f"{score:9.4f}  {said}")
    experts = {k: x[row] for k, x in made.experts.items()}
    of_prompt = {"01": experts.pop("01")}
    if row % 2 == 0:
      wanted.insert(len(wanted) - 1, f"{['a<extra_id_1>b', ''][row // 2]}:")
      wanted.append(generate.table(tokenizer, prompt, of_prompt))
    text = [*start, *tokens][:-1]
    wanted.append(generate.table(tokenizer, text, experts))
  assert lines == "\n".join(wanted).splitlines()
  assert wanted[2].splitlines()[1].startswith("'<extra_id_1>'  01: ")
  assert generate.main([f"--checkpoint={t5}", *flags, "--mesh=1,2,4,1"]) == 0
  assert capsys.readouterr().out.splitlines() == lines
  with pytest.raises(ConfigError, match="<extra_id_9> in a prompt is no sent"):
    generate.main([f"--checkpoint={t5}", "--prompt=<extra_id_9>"])
  for flag in ("--top_k=3", "--top_p=0.5", "--seed=1"):
    with pytest.raises(ConfigError, match="is of draws: give a --temperature"):
      generate.main([f"--checkpoint={t5}", "--prompt=a", flag])
  with pytest.raises(ConfigError, match="--num_returned is of a beam search"):
    generate.main([f"--checkpoint={t5}", "--prompt=a", "--num_returned=2"])


def test_sentinels_that_a_published_model_knows(t5):
  """They descend, as T5's, and what has no number is text."""
  loaded = trained.of_run(str(t5))
  sentinels = {"name": "span_corruption", "sentinels": (260, -1)}
  config = argparse.Namespace(task=ml_collections.ConfigDict(sentinels))
  own = generate.with_sentinels(loaded._replace(config=config)).tokenizer
  found = own.prompt(b"a<extra_id_0>b<extra_id_2>")
  assert found.tolist() == [97, 260, 98, 258]
  assert own.decode([260, 104, 105, 258]) == "<extra_id_0>hi<extra_id_2>"


def test_published_files_may_name_a_start(monkeypatch, tmp_path):
  for start, wanted in ((0, (0,)), (None, ())):
    source = hf.config.Source(ends=(1,), start=start)
    arch = argparse.Namespace(vocab_size=300, source=source)
    model = argparse.Namespace(arch=arch)
    monkeypatch.setattr(hf, "load", lambda *a, m=model, **k: (m, {}))
    loaded = trained.published(str(tmp_path))
    assert (loaded.start, loaded.ends) == (wanted, (1,))


def begin_of_evaluation(flags, monkeypatch):
  """The tokens that `evaluate` begins its rows with."""

  class Seen(Exception):
    pass

  def spy(corpus, **options):
    raise Seen(options["begin"])

  monkeypatch.setattr(corpora, "prepare", lambda *a, **k: SmallCorpus())
  monkeypatch.setattr(batches, "validation_batches", spy)
  with pytest.raises(Seen) as e:
    evaluate.main([*flags, "--dataset=small"])
  return e.value.args[0]


def test_a_run_begins_no_text(tmp_path, monkeypatch):
  """It trains on text alone, also where the tokenizer is a published one's."""
  made = tokenizers_test.by_bytes()
  made.add_special_tokens(["<s>"])
  made.post_processor = tokenizers_test.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 256)]
  )
  found = tokenizers_test.load(tmp_path, made)
  assert found.prompt(b"a<s>")[[0, -1]].tolist() == [256, 256]
  c = tiny.get_config()
  c.data.tokenizer = found.name
  (tmp_path / "config.json").write_text(c.to_json())
  monkeypatch.setattr(trained, "weights", lambda *a: (0, {}))
  found = trained.of_run(str(tmp_path)).tokenizer
  assert found.begin == ()
  for text in (b"a<s>", b""):
    np.testing.assert_array_equal(found.prompt(text), found.encode(text))
  assert 256 not in found.prompt(b"<s>")


def test_the_command_on_published_weights(tmp_path, capsys, monkeypatch):
  """The tokenizer.json has 43 tokens, and one of them begins a text."""
  import shutil

  import tokenizers

  shutil.copytree(parity.FOLDER / "gpt_oss_a", tmp_path / "m")
  words = {f"w{i}": i for i in range(42)} | {"<s>": 42}
  library = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0"))
  library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  library.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 42)]
  )
  library.add_special_tokens(["<s>"])
  library.save(str(tmp_path / "m" / "tokenizer.json"))
  flags = [f"--hf={tmp_path / 'm'}", "--prompt=w3 w5", "--num_tokens=4"]
  assert generate.main([*flags, "--experts"]) == 0
  lines = capsys.readouterr().out.splitlines()
  found = trained.published(str(tmp_path / "m"))
  made = decoding.generate(found.model, found.variables, [[42, 3, 5]], 4)
  says = " ".join(f"w{t}" for t in made.tokens_BN[0] if t != 42)
  assert lines[0].replace(" ", "") == f"w3w5{says}".replace(" ", "")
  assert len(lines) == 1 + 3 + 4 - 1
  path = tmp_path / "m" / "config.json"
  path.write_text(
    json.dumps(json.loads(path.read_text()) | {"eos_token_id": 1})
  )
  assert begin_of_evaluation(flags[:1], monkeypatch) == (42,)
  words |= {f"more{i}": 43 + i for i in range(9)}
  library = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0"))
  library.save(str(tmp_path / "m" / "tokenizer.json"))
  with pytest.raises(ConfigError, match="has 52 tokens, and the model 43"):
    generate.main(flags)


def test_a_run_is_evaluated_with_its_own_settings(monkeypatch):
  """Plugins and caches always; features and folder for its own data."""
  seen = {}
  monkeypatch.setattr(corpora, "prepare", lambda name, **o: seen.update(o))
  run = tiny.get_config()
  run.plugins = ("mine",)
  run.data.update(name="own", dir="there", text_feature="body", cache_dir="c")
  tokenizer = argparse.Namespace(name="bytes")
  loaded = trained.Trained(None, {}, tokenizer, (256,), run)
  for name, own in (("own", True), ("other", False)):
    seen.clear()
    args = argparse.Namespace(dataset=name, data_dir=None)
    evaluate._text(args, loaded)
    assert (seen["plugins"], seen["cache_dir"]) == (("mine",), "c")
    assert seen["data_dir"] == ("there" if own else None)
    assert seen.get("text_feature") == ("body" if own else None)
  run.data.mixture = {"a": {"name": "part", "dir": "here"}}
  args = argparse.Namespace(dataset="part", data_dir=None)
  evaluate._text(args, loaded)
  assert seen["data_dir"] == "here"
  args = argparse.Namespace(
    seq_len=None, batch_size=None, batches_per_domain=None
  )
  run.data.update(seq_len=48, separate_documents=False)
  run.eval.batch_size = 3
  loaded = loaded._replace(model=models.build(run.model, vocab_size=9))
  settings = evaluate._settings(args, loaded)
  assert (settings["seq_len"], settings["batch_size"]) == (48, 3)
  assert settings["separate_documents"] is False
  with pytest.raises(ConfigError, match="--dataset=NAME"):
    evaluate.main(["--checkpoint=any", "--data_dir=there"])
