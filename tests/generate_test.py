"""Texts: sampling as it is defined, batches as each text alone, the command."""

import collections

import jax
import numpy as np
import pytest

from moe_jax import generate, main
from moe_jax.core import parallel
from moe_jax.core.errors import ConfigError
from moe_jax.hf import huggingface
from moe_jax.training import trained
from tests import parity

LOGITS = np.log([0.4, 0.3, 0.2, 0.06, 0.04]).astype(np.float32)


def drawn(n=4000, **options):
  """{token: share}."""
  rows = np.broadcast_to(LOGITS, (n, 5))
  tokens = generate.sample(rows, jax.random.key(0), **options)
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
  return huggingface.load(parity.FOLDER / "gpt_oss_a")


def test_a_batch_is_each_prompt_alone(loaded):
  model, variables = loaded
  prompts = [[1, 2, 3, 4, 5, 6, 7], [9], [5, 5, 2]]
  together = generate.generate(model, variables, prompts, 9, experts=True)
  for row, prompt in enumerate(prompts):
    alone = generate.generate(model, variables, [prompt], 9, experts=True)
    np.testing.assert_array_equal(together.tokens_BN[row], alone.tokens_BN[0])
    for layer, found in alone.experts.items():
      assert found.shape == (1, len(prompt) + 8, 2)
      np.testing.assert_array_equal(
        np.sort(together.experts[layer][row, 7 - len(prompt) :]),
        np.sort(found[0]),
      )


def test_experts_are_those_of_the_whole_forward_pass(loaded):
  model, variables = loaded
  made = generate.generate(model, variables, [[3, 1, 4]], 6, experts=True)
  tokens = np.array([[3, 1, 4, *made.tokens_BN[0]]])[:, :-1]
  _, aux = model.apply(variables, tokens, collect="routing")
  for i in range(2):  # A repeat of two layers.
    whole = aux["decoder"][str(i)]["expert_GTK"][0, 0]
    np.testing.assert_array_equal(
      np.sort(made.experts[f"{i:02d}"][0]), np.sort(whole)
    )


def test_an_end_is_the_last_token(loaded):
  model, variables = loaded
  free = generate.generate(model, variables, [[1, 2], [7, 8]], 12).tokens_BN
  end = int(free[0, 3])
  made = generate.generate(
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
    made = generate.generate(model, variables, [[1, 2]], 12, **options)
    return made.tokens_BN.tolist()

  assert once(temperature=1.0, seed=1) == once(temperature=1.0, seed=1)
  assert once(temperature=1.0, seed=1) != once(temperature=1.0, seed=2)
  assert once(temperature=1.0, top_k=1, seed=1) == once()


@pytest.mark.parametrize(
  "prompts,options,words",
  [
    ([], {}, "at least one token"),
    ([[]], {}, "at least one token"),
    ([[43]], {}, "token 43, and the model's are from 0 to 42"),
    ([[-1]], {}, "token -1"),
    ([[1]], {"temperature": -1.0}, "temperature = -1.0 is negative"),
    ([[1]], {"top_k": 99}, "top_k = 99"),
    ([[1]], {"top_p": 0.0}, "top_p = 0.0"),
  ],
)
def test_impossible_values(loaded, prompts, options, words):
  with pytest.raises(ConfigError, match=words):
    generate.generate(*loaded, prompts, 4, **options)


@pytest.mark.parametrize(
  "name,sizes", [("deepseek_v3_a", (1, 2, 2, 2)), ("gpt_oss_a", (1, 1, 4, 1))]
)
def test_a_mesh_changes_nothing(name, sizes):
  """Nor does it matter that three texts do not divide over the devices."""
  devices = jax.devices()[: np.prod(sizes)]
  mesh = parallel.make_mesh(sizes, devices)
  loaded = huggingface.load(parity.FOLDER / name)
  spread = huggingface.load(parity.FOLDER / name, mesh)
  assert len(spread[1]["params"]["embedding"].devices()) == len(devices)
  prompts = [[1, 2, 3, 4, 5, 6, 7], [9], [5, 5, 2]]
  for options in ({}, {"temperature": 1.0, "top_p": 0.9, "seed": 3}):
    one, other = (
      generate.generate(*found, prompts, 9, experts=True, **options)
      for found in (loaded, spread)
    )
    np.testing.assert_array_equal(one.tokens_BN, other.tokens_BN)
    for layer, chosen in one.experts.items():
      np.testing.assert_array_equal(
        np.sort(chosen), np.sort(other.experts[layer])
      )


def test_the_command_on_a_run(tmp_path, capsys):
  """Byte for byte what the model says of whole texts."""
  run = tmp_path / "run"
  main.main(
    [
      *("--config=configs/tiny.py", "--config.mesh=(8,1,1,1)"),
      *("--config.train.num_steps=3", "--config.train.log_every=3"),
      "--config.optim.warmup_steps=1",
      "--config.eval.batches_per_domain=1",
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
  made = generate.generate(found.model, found.variables, prompts, 5)
  tokens = [*prompts[0], *made.tokens_BN[0].tolist()]
  text = found.tokenizer.decode([t for t in tokens if t != 256])
  assert "\n".join(lines).startswith(text)
  logits = found.model.apply(found.variables, np.array([tokens[:-1]]))[0]
  assert logits[0, -5:].argmax(-1).tolist() == tokens[-5:]
  mesh = "--mesh=1,2,4,1"
  assert generate.main([f"--checkpoint={run}", *flags, mesh]) == 0
  assert capsys.readouterr().out.splitlines() == lines
  with pytest.raises(ConfigError, match="no work directory"):
    generate.main([f"--checkpoint={tmp_path / 'none'}", "--prompt=x"])


def test_the_command_on_published_weights(tmp_path, capsys):
  """With a tokenizer.json of 43 tokens, the first of which begins a text."""
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
  made = generate.generate(found.model, found.variables, [[42, 3, 5]], 4)
  says = " ".join(f"w{t}" for t in made.tokens_BN[0] if t != 42)
  assert lines[0].replace(" ", "") == f"w3w5{says}".replace(" ", "")
  assert len(lines) == 1 + 3 + 4 - 1
  words |= {f"more{i}": 43 + i for i in range(9)}
  library = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0"))
  library.save(str(tmp_path / "m" / "tokenizer.json"))
  with pytest.raises(ConfigError, match="has 52 tokens, and the model 43"):
    generate.main(flags)
