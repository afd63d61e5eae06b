"""BLEU of a run: of which pairs, and what sacrebleu says."""

import argparse
import json

import jax
import numpy as np
import pytest
import sacrebleu

from configs import tiny
from moe_jax import evaluate, generate, models
from moe_jax.core.errors import ConfigError
from moe_jax.models.generation import decoding
from moe_jax.run import config as config_lib
from moe_jax.tasks import bleu, translation
from moe_jax.training import checkpoint, program, trained
from tests import beam_test, encoder_decoder_test

PAIRS = [(f"{i} grapes", f"{i} sour grapes hang too high") for i in range(6)]


@pytest.fixture
def translator(tmp_path, monkeypatch):
  """The folder of a run of translation in two domains, with the run's slots."""
  c = tiny.get_config()
  for name, texts in (("a", PAIRS[:4]), ("b", PAIRS[4:])):
    (tmp_path / name).mkdir()
    lines = "".join(f"{source}\t{target}\n" for source, target in texts)
    for split in ("train", "validation"):
      (tmp_path / name / f"{split}.tsv").write_text(lines)
  c.data.mixture = {n: {"name": n, "dir": str(tmp_path / n)} for n in "ab"}
  c.data.cache_dir = str(tmp_path / "cache")
  c.task = {"name": "translation"}
  slots = {"capacity_factor": 2.0, "dispatcher": {"name": "gather"}}
  slots |= {"tokens_per_group": 64, "min_capacity": 4}
  c.model = encoder_decoder_test.section(encoder={"moe": slots})
  c.model.moe.update(slots)
  c.model.allow_noncausal = True
  (tmp_path / "config.json").write_text(c.to_json())
  task = program.build_task(c)
  model = models.build(c.model, **task.given)
  variables = jax.tree.map(np.float32, beam_test.random_variables(model))
  monkeypatch.setattr(checkpoint, "load_step", lambda *a: (7, variables))
  return tmp_path, task


@pytest.mark.long
def test_the_bleu_of_a_run(translator, tmp_path, capsys):
  """Also of a run whose slots no single token has."""
  run, _ = translator
  path = tmp_path / "out.json"
  flags = [f"--checkpoint={run}", "--bleu=3", "--beams=2", f"--json={path}"]
  assert evaluate.main(flags) == 0
  told = json.loads(path.read_text())
  assert told["metrics"]["bleu_pairs"] == 3
  assert told["metrics"]["bleu"] < 1
  assert "BLEU as sacrebleu computes it: nrefs:1" in capsys.readouterr().out
  assert "tok:13a" in told["bleu_signature"]


@pytest.mark.parametrize("name, texts", [("b", PAIRS[4:]), ("mine", PAIRS[:1])])
def test_another_dataset_than_that_of_the_run(name, texts, translator, capsys):
  """A part of its mixture, with the folder of that; or a folder of its own."""
  run, _ = translator
  folder = run / name
  folder.mkdir(exist_ok=True)
  flags = [f"--checkpoint={run}", f"--dataset={name}"]
  if name == "mine":
    (folder / "train.tsv").write_text("a\tb\n" * 20)
    (folder / "validation.tsv").write_text("{}\t{}\n".format(*texts[0]))
    flags += [f"--data_dir={folder}"]
  assert evaluate.main(flags) == 0
  number = sum(len(target) + 1 for _, target in texts)
  assert capsys.readouterr().out.startswith(f"{number} target tokens")


def test_what_has_no_bleu(monkeypatch):
  config = argparse.Namespace(task=argparse.Namespace(name="span_corruption"))
  with pytest.raises(ConfigError, match="this run has span_corruption"):
    bleu.check(config)
  config.task.name = "translation"
  monkeypatch.setattr(bleu.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ConfigError, match="extra bleu"):
    bleu.check(config)


def test_tokens_that_targets_begin_with(translator, monkeypatch):
  """They are given to the search, and no part of either text."""
  run, _ = translator
  c = config_lib.load(str(run / "config.json"))
  c.task = {"name": "translation", "target_begin": (7, 8)}
  loaded, task = trained.of_run(str(run)), program.build_task(c)

  def written(model, variables, prompts, most, *, start, beams, **options):
    assert start == (256, 7, 8) and beams.length_before == 2
    texts = dict(PAIRS)
    rows = [[*texts[loaded.tokenizer.decode(p[:-1])].encode()] for p in prompts]
    assert len({*map(len, rows)}) == 1
    return decoding.Generated(np.array(rows), {}, None)

  monkeypatch.setattr(decoding, "generate", written)
  found, _ = bleu.of_run(loaded, task, 4, num_beams=2, begin=(7, 8))
  assert found["bleu"] == pytest.approx(100)
  assert translation.begins(c) == ((), (7, 8))
  values = c.to_dict()
  values["data"]["mixture"]["a"]["target_begin"] = (9,)
  two = config_lib.locked(values)
  with pytest.raises(ConfigError, match="2 different pairs .* the parts a, b"):
    translation.begins(two)
  assert translation.begins(two, "a") == ((), (9,))
  with pytest.raises(ConfigError, match="the part of data.mixture"):
    translation.begins(two, "c")
  values["data"]["mixture"]["b"]["target_begin"] = (9,)
  assert translation.begins(config_lib.locked(values)) == ((), (9,))


def test_bleu_is_of_the_first_pairs_of_all_domains(translator, monkeypatch):
  """Every text is right but one, and sacrebleu says what that is worth."""
  run, task = translator
  loaded, asked = trained.of_run(str(run)), []

  def written(model, variables, prompts, *args, **options):
    texts = [loaded.tokenizer.decode(prompt[:-1]) for prompt in prompts]
    asked.extend(texts)
    answers = {s: t for s, t in PAIRS} | {PAIRS[1][0]: "five sweet apples"}
    rows = [[*answers[text].encode(), 256] for text in texts]
    longest = max(map(len, rows))
    filled = [row + [-1] * (longest - len(row)) for row in rows]
    return decoding.Generated(np.array(filled), {}, None)

  monkeypatch.setattr(decoding, "generate", written)
  found, _ = bleu.of_run(loaded, task, 4, num_beams=1)
  first = [PAIRS[i] for i in (0, 4, 1, 5)]
  assert asked == [source for source, _ in first]
  said = [t if t != PAIRS[1][1] else "five sweet apples" for _, t in first]
  wanted = sacrebleu.corpus_bleu(said, [[t for _, t in first]]).score
  assert found == {"bleu": wanted, "bleu_pairs": 4.0} and 10 < wanted < 95


def test_prompts_of_a_run_get_the_tokens_of_its_languages(
  translator, monkeypatch, capsys
):
  """Before the source, and before what is written, of the part that is asked for."""
  run, _ = translator
  values = json.loads((run / "config.json").read_text())
  values["task"] |= {"source_begin": (5,), "target_begin": (7, 8)}
  (run / "config.json").write_text(json.dumps(values))
  asked, whole = [], decoding.generate

  def seen(model, variables, prompts, *args, **options):
    asked.append((prompts, options["start"], options["beams"].length_before))
    return whole(model, variables, prompts, *args, **options)

  monkeypatch.setattr(decoding, "generate", seen)
  flags = [f"--checkpoint={run}", "--prompt=a", "--num_tokens=2", "--beams=2"]
  assert generate.main([*flags, "--start=b"]) == 0
  assert asked == [([[5, 97, 256]], [256, 7, 8, 98], 3)]
  values["data"]["mixture"]["a"]["target_begin"] = (9,)
  (run / "config.json").write_text(json.dumps(values))
  with pytest.raises(ConfigError, match="choose one of the parts a, b"):
    generate.main(flags)
  assert generate.main([*flags, "--part=a"]) == 0
  assert asked[1] == ([[5, 97, 256]], [256, 9], 1)


def test_a_dataset_that_several_parts_have(translator):
  """Two directions of a language pair, say; their labels tell them apart."""
  run, _ = translator
  values = json.loads((run / "config.json").read_text())
  for part in values["data"]["mixture"].values():
    part["name"] = "pairs"
  (run / "config.json").write_text(json.dumps(values))
  flags = [f"--checkpoint={run}", "--bleu=2", "--beams=2"]
  with pytest.raises(ConfigError, match="several parts .*: a, b"):
    evaluate.main([*flags, "--dataset=pairs"])
  assert evaluate.main([*flags, "--dataset=b"]) == 0
