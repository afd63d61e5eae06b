# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train a Mixture of Experts on text of your own
#
# This notebook goes the whole way once: a folder of plain text, a config, a
# training run, its curves, the loads of its experts, and at the end text that
# the model writes, with the expert of every letter. It takes about two
# minutes on two CPU cores. Put your own files into the folder, and it is your
# model.
#
# On Colab, run this in a cell of its own first, with the address of your copy of
# the repository:
#
# ```
# !git clone ADDRESS moe_jax
# %cd moe_jax
# %pip install -q -e '.[notebooks]'
# ```

# %%
import contextlib
import os
import pathlib
import shutil
import sys
import tempfile

from matplotlib import pyplot as plt

import moe_jax
from moe_jax import generate
from moe_jax.models.generation import decoding
from moe_jax.run import config as config_lib
from moe_jax.run import run_directory, summary
from moe_jax.training import loop, trained

ROOT = pathlib.Path(moe_jax.__file__).parents[1]
sys.path.insert(0, str(ROOT))
from notebooks import draw  # noqa: E402

FAST = bool(os.environ.get("MOE_JAX_FAST"))  # As the tests run it.
os.chdir(tempfile.mkdtemp())  # Paths below are relative to this folder.

# %% [markdown]
# ## A folder of texts
#
# Here the texts are those that every copy of this repository has: its
# documentation, which is English prose, and the source code of its layer. A
# file is a document, and the first folder that it is in is its *domain*.
# Metrics are given for each domain too.

# %%
TEXTS = {"prose": "docs/*.md", "code": "moe_jax/moe/**/*.py"}
for domain, pattern in TEXTS.items():
  folder = pathlib.Path("texts", domain)
  folder.mkdir(parents=True)
  for path in ROOT.glob(pattern):
    shutil.copy(path, folder / "_".join(path.relative_to(ROOT).parts))
  sizes = [path.stat().st_size for path in folder.iterdir()]
  print(f"{domain:6}{len(sizes):4} files{sum(sizes) / 1000:7.0f} kB")

# %% [markdown]
# ## A config
#
# A config is a Python file, and any value of it can be replaced by name. This
# takes `configs/tiny.py`, `tiny` for short, points it at the folder, and makes the
# model somewhat larger: three layers of eight experts each, of which a byte takes two. Tokens
# are bytes, so that no tokenizer is needed. A small loss on the loads keeps all
# experts at work. Without the notebook the same run is
#
# ```
# python -m moe_jax.main --config=tiny --workdir=runs/mine \
#   --config.data.name=text --config.data.dir=texts --config.model.d_model=96 ...
# ```

# %%
STEPS = 4 if FAST else 400
config = config_lib.load(
  "tiny",
  [
    "data.name=text",
    "data.dir=texts",
    "data.cache_dir=tokens",
    "data.seq_len=256",
    "data.batch_size=8",
    "model.d_model=96",
    "model.num_layers=3",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.head_dim=24",
    "model.moe.num_experts=8",
    "model.moe.d_expert=96",
    "model.moe.balancers.load.name=switch",
    "model.moe.balancers.load.coefficient=0.01",
    "optim.learning_rate=1e-2",
    f"optim.warmup_steps={STEPS // 20}",
    f"train.num_steps={STEPS}",
    f"train.log_every={STEPS // 40 or 1}",
    f"train.loads_every={STEPS // 40 or 1}",
    f"eval.every={STEPS // 8 or 1}",
  ],
)

# %% [markdown]
# ## A run
#
# `train_and_evaluate` holds out one document in sixteen, compiles the step, trains and
# evaluates, and returns the last metrics of the held-out documents. It first says
# what it is about to do, and then writes a line of progress every ten seconds. All
# that it leaves is in one folder; the same call with the same folder would resume
# a run that was stopped.

# %%
RUN = pathlib.Path("runs", "mine")
with contextlib.redirect_stderr(sys.stdout):  # Progress goes to stderr.
  final = loop.train_and_evaluate(config, RUN)
print("\n" + summary.end(final, RUN, config))
print("In this folder:", *sorted(path.name for path in RUN.glob("[a-z]*")))

# %% [markdown]
# ## The loss
#
# `metrics.jsonl` has a JSON object a line, and `read_metrics` reads the lines of
# one split. All three curves should fall, and code is easier to predict than
# prose. A few hundred kilobytes are soon known by heart: where the curves of the
# held-out documents turn upwards, a run was too long for its text.

# %%
train, validation = (
  run_directory.read_metrics(RUN, split) for split in ("train", "validation")
)
figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
axes.plot(
  [line["step"] for line in train],
  [line["bits_per_byte"] for line in train],
  color="black",
  label="training batches",
)
for domain, marker in zip(TEXTS, "os"):
  axes.plot(
    [line["step"] for line in validation],
    [line[f"bits_per_byte/{domain}"] for line in validation],
    f"{marker}--",
    label=f"held-out {domain}",
  )
axes.set(
  title="The model learns prose and code",
  xlabel="training step",
  ylabel="bits per byte (lower is better)",
)
axes.legend()
plt.show()

# %% [markdown]
# ## The loads
#
# The lines of the split `loads` have the number of tokens that every expert got
# in a step. White is an expert with its fair share, red one with more and blue
# one with less, and the darkest red is twice the share or more. The router
# begins with a few experts in each layer; then the balancing loss evens the
# colours out. The first layer takes longest, perhaps because it sees little but
# the letter itself, and letters are not equally frequent.

# %%
lines = run_directory.read_metrics(RUN, "loads")
draw.loads(
  [line["step"] for line in lines],
  {
    f"layer {layer}": [line[layer] for line in lines]
    for layer in ("00", "01", "02")
  },
)

# %% [markdown]
# ## Text from the model
#
# The command `python -m moe_jax.generate` continues a prompt. With `--experts`
# it also prints, for each token, the experts that it used in each layer, the
# first choice first. Called from Python it is a function of the same flags.

# %%
flags = [f"--checkpoint={RUN}", "--temperature=0.6", "--seed=1"]
flags += ["--prompt=The router ", "--num_tokens=6", "--experts"]
with contextlib.redirect_stderr(sys.stdout):
  generate.main(flags)

# %% [markdown]
# A longer text is easier to read in colours. It has as many letters as the rows of
# the training batches, because the model knows no longer ones. Every letter lies
# on the colour of the first-choice expert that it had in the last layer. Look for what a colour
# has in common: blanks, ends of words, vowels, or brackets and underscores in
# code. Experts of a small model divide letters among themselves, and know little
# of topics.

# %%
loaded = trained.of_run(str(RUN))
tokenizer, prompts = loaded.tokenizer, ("The router ", "def routed(")
made = decoding.generate(
  loaded.model,
  loaded.variables,
  [tokenizer.prompt(prompt.encode()).tolist() for prompt in prompts],
  8 if FAST else 240,
  decoding.Sampling(temperature=0.6, seed=1),
  experts=True,
)
for row, prompt in enumerate(prompts):
  written = [
    tokenizer.decode([token]) for token in made.tokens_BN[row].tolist()
  ]
  draw.text(
    [*prompt, *written][:-1],  # The last letter has been through no layer.
    made.experts["02"][row, :, 0],
    num_experts=8,
    title=f'What follows "{prompt}", and the first expert of every letter',
  )

# %% [markdown]
# ## Next
#
# - `04_expert_parallelism` lays the experts of a layer out over eight devices.
# - `05_what_experts_learn` asks which experts belong to which kind of text.
# - `docs/data.md` says what else can be read: JSON lines, parquet, datasets of
#   TFDS, mixtures of several, and tokenizers.
# - `docs/runs.md` describes the folder of a run, and how runs are resumed.
# - `python -m moe_jax.report runs/mine --open` draws a run as a page in the browser,
#   with all of its metrics.
