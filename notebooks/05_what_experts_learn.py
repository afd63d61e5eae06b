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
# # What do experts learn?
#
# A router that is balanced over many texts may still send each kind of text to
# experts of its own. This notebook trains a small model on three kinds of text,
# writes down which experts every token chose, and asks four questions of OLMoE
# ([2409.02060](https://arxiv.org/abs/2409.02060), section 5): does the choice
# depend on the kind of text, does it depend on the letter, which experts are
# chosen together, and when in training is it settled? It takes about three
# minutes on two CPU cores.
#
# On Colab, run this in a cell of its own first, with the address of your copy of
# the repository:
#
# ```
# !git clone ADDRESS moe_jax
# %cd moe_jax
# %pip install -q -e '.[notebooks,hf]'
# ```

# %%
import contextlib
import io
import os
import pathlib
import sys
import tempfile

import numpy as np
from matplotlib import pyplot as plt

import moe_jax
from moe_jax import evaluate
from moe_jax.data.text import tokenizers
from moe_jax.run import config as config_lib
from moe_jax.training import loop, traces

ROOT = pathlib.Path(moe_jax.__file__).parents[1]
sys.path.insert(0, str(ROOT))
from notebooks import draw  # noqa: E402

FAST = bool(os.environ.get("MOE_JAX_FAST"))  # As the tests run it.
os.chdir(tempfile.mkdtemp())  # Paths below are relative to this folder.

# %% [markdown]
# ## A run on three kinds of text
#
# The mixture has Python code and docstrings of installed packages, and the
# documentation of this repository. There are eight experts, of which a letter
# takes two, in each of three layers, and no capacity, so that every choice is
# computed. The balancing loss counts the loads of the whole batch
# (`scope=micro_batch`, the default): it asks all texts together to use all
# experts equally, and leaves every single text free to prefer some. Six
# checkpoints are kept.

# %%
STEPS, CHECKPOINTS = (4, 2) if FAST else (480, 6)
RUN = pathlib.Path("runs", "mixed")
documentation = {"name": "documentation", "dir": str(ROOT / "docs" / "*.md")}
config = config_lib.load(
  "tiny",
  [
    "data.mixture.python={'name': 'python_sources', 'weight': 2.0}",
    f"data.mixture.docs={documentation | {'weight': 1.0}}",
    "data.seq_len=128",
    "data.batch_size=16",
    "model.d_model=96",
    "model.num_layers=3",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.head_dim=24",
    "model.moe.num_experts=8",
    "model.moe.d_expert=96",
    "model.moe.dispatcher.name=sorted",
    "model.moe.capacity_factor=none",
    "model.moe.balancers.load.name=switch",
    "model.moe.balancers.load.coefficient=0.01",
    "optim.learning_rate=1e-2",
    f"optim.warmup_steps={STEPS // 20}",
    f"train.num_steps={STEPS}",
    f"checkpoint.every={STEPS // CHECKPOINTS}",
    f"checkpoint.keep_last={CHECKPOINTS}",
    f"eval.batches_per_domain={1 if FAST else 32}",
  ],
)
with contextlib.redirect_stderr(sys.stdout):  # Progress goes to stderr.
  final = loop.train_and_evaluate(config, RUN)
DOMAINS = ("python/code", "python/docstrings", "docs")
for domain in DOMAINS:
  print(f"{domain:20}{final[f'bits_per_byte/{domain}']:.3f} bits per byte")

# %% [markdown]
# ## A trace
#
# `python -m moe_jax.evaluate --checkpoint=RUN --trace=FILE` evaluates a
# checkpoint, here on the held-out text of the run, and writes down the experts of
# every token with their weights and scores. This makes a trace of each of the
# six checkpoints, all of the same text.

# %%
trace_of = {}
batches = f"--batches_per_domain={1 if FAST else 16}"
for step in sorted(int(p.name) for p in RUN.glob("checkpoints/[0-9]*")):
  checkpoint, file = RUN / "checkpoints" / str(step), f"{step}.trace"
  with contextlib.redirect_stdout(io.StringIO()):  # A page of metrics.
    evaluate.main([f"--checkpoint={checkpoint}", f"--trace={file}", batches])
  trace_of[step] = traces.load(file)
trace = trace_of[STEPS]
LAYERS, experts = list(trace.layers), [f"e{e}" for e in range(8)]
print("traces of the steps", *trace_of)
for name in ("token", "domain", "00/expert", "00/weight", "00/score"):
  array = trace.arrays[name]
  print(f"{name:12}{array.dtype} {array.shape}")

# %% [markdown]
# ## Does the choice depend on the kind of text?
#
# `traces.by_domain` has the share of the tokens of a domain that an expert got.
# Where a token takes two of eight experts, 25 % is fair, and white. Red experts
# are preferred by a kind of text, and blue ones are avoided. Compare the rows of a panel:
# where they are alike, the kind of text does not matter. In the first layer they
# mostly are; in the others an expert that one kind prefers is often one that
# another kind avoids.

# %%
figure, panels = plt.subplots(3, figsize=(7.5, 6), layout="constrained")
for axes, layer in zip(panels, LAYERS):
  share_DE = traces.by_domain(trace)[layer]
  draw.matrix(
    100 * share_DE,
    list(trace.domains),
    experts,
    f"layer {layer}: share of the tokens of a kind, %",
    digits=0,
    white=25,
    axes=axes,
  )
plt.show()

# %% [markdown]
# ## Does it depend on the letter?
#
# `traces.by_token` has the same shares for every token, which here is a byte. In
# the first layer nearly every letter has an expert that gets all of its tokens,
# which is the number 100: this router sees little but the letter itself. In the
# last layer a letter is spread over more experts, because its context counts
# there, too.

# %%
LETTERS = " \n.etaskq_(=0"
figure, panels = plt.subplots(
  1, 2, figsize=(10, 4.5), layout="constrained", sharey=True
)
for axes, layer in zip(panels, (LAYERS[0], LAYERS[-1])):
  share_VE = traces.by_token(trace, vocab_size=257)[layer]
  draw.matrix(
    100 * share_VE[[ord(letter) for letter in LETTERS]],
    [repr(letter)[1:-1] if letter != " " else "blank" for letter in LETTERS],
    experts,
    f"layer {layer}: share of the tokens of a letter, %",
    digits=0,
    white=25,
    axes=axes,
  )
plt.show()

# %% [markdown]
# `traces.vocabulary` makes one number of it: the share of its tokens that the
# favourite expert of a letter has, mean over letters. It is 1 where the letter
# alone decides.

# %%
for layer, value in traces.vocabulary(trace, vocab_size=257).items():
  print(f"layer {layer}: {value:.2f} (a router that draws at random: 0.25)")

# %% [markdown]
# The same in the text itself: each letter of two pieces of held-out code lies on
# the colour of its first-choice expert. In the first layer equal letters have equal
# colours. In the last one look at the beginnings and ends of words, and at runs
# of blanks.

# %%
number = trace.domains.index("python/code")
code = np.flatnonzero(trace.arrays["domain"] == number)[1:3]
tokenizer = tokenizers.load("bytes")
letters = [
  tokenizer.decode([token]) for token in trace.arrays["token"][code].ravel()
]
for layer in (LAYERS[0], LAYERS[-1]):
  expert_N = trace.arrays[f"{layer}/expert"][code, :, 0].ravel()
  draw.text(letters, expert_N, 8, f"First-choice experts in layer {layer}")

# %% [markdown]
# ## Which experts are chosen together?
#
# `traces.coactivation` has, for two experts, the share of the tokens of the first
# (row) that the second (column) has too. A token has one other expert of seven,
# so chance is 14 %, and white. A red pair works together; a pair that is blue in
# both directions has become two alternatives.

# %%
figure, panels = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
for axes, layer in zip(panels, LAYERS):
  share_EE = traces.coactivation(trace)[layer]
  draw.matrix(
    np.where(np.eye(8, dtype=bool), np.nan, 100 * share_EE),
    experts,
    experts,
    f"layer {layer}: chosen together, %",
    digits=0,
    white=100 / 7,
    y="expert",
    x="chosen beside it",
    axes=axes,
  )
plt.show()

# %% [markdown]
# ## When is it settled?
#
# `traces.saturation` compares two traces of the same text: the share of a token's
# final experts that it had in the earlier checkpoint already. Chance is 25 %.
# OLMoE finds that routing settles early in training, and so it does here: after a
# sixth of the steps the first layer already has more than half of its final
# choices, where the letter decides, and the other layers follow. The learning
# rate falls to a tenth at the end, so that the last points are close to 100 % for
# that reason, too.

# %%
figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
saturation = {s: traces.saturation(t, trace) for s, t in trace_of.items()}
for layer, style in zip(LAYERS, ("o-", "s--", "D:")):
  values = [100 * shares[layer] for shares in saturation.values()]
  axes.plot([*saturation], values, style, label=f"layer {layer}")
axes.axhline(25, color="grey", lw=3, alpha=0.5, label="random choices")
axes.set(
  title="How much of the final routing is there already",
  xlabel="training step of the earlier trace",
  ylabel="share of the final experts, %",
  ylim=(0, 105),
)
axes.legend(ncols=2)
plt.show()

# %% [markdown]
# ## Next
#
# - `python -m moe_jax.report EARLY LATE --out=DIR` makes tables and figures of
#   these analyses, also for traces of published weights (`evaluate --hf`).
# - The hook `trace` writes the same file of training batches, and a run can be
#   replayed with the experts of a trace: `docs/runs.md`.
# - This was one seed of a small model, so a pattern may be an accident.
#   `07_reproduce_a_table` shows how differences are told from accidents.
