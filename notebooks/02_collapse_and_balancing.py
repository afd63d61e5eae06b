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
# # Collapse and balancing
#
# A router that is left alone sends most tokens to few experts: those that are
# chosen learn, and are chosen more. Here a small decoder is trained three times
# on the same text, without balancing, with a loss on the loads, and with a bias
# on the selection, and the load of every expert is drawn over time. It takes
# about a minute on two CPU cores.
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
import sys
import tempfile

import jax
import numpy as np
from matplotlib import pyplot as plt

import moe_jax
from moe_jax.run import config as config_lib
from moe_jax.run import run_directory
from moe_jax.training import checkpoint, loop

sys.path.insert(0, str(pathlib.Path(moe_jax.__file__).parents[1]))
from notebooks import draw  # noqa: E402

FAST = bool(os.environ.get("MOE_JAX_FAST"))  # As the tests run it.
os.chdir(tempfile.mkdtemp())  # Paths below are relative to this folder.
STEPS, EVERY = (4, 2) if FAST else (300, 5)

# %% [markdown]
# ## The runs
#
# The config `tiny` with sixteen experts, of which a token takes two. The gate is
# a sigmoid, renormalised over the chosen; only the balancers differ between the
# runs. A run writes its metrics every five steps, and the load of every expert
# with them.

# %%
SHARED = [
  "model.moe.num_experts=16",
  "model.moe.router={'name': 'top_k', 'score': 'sigmoid', 'renormalize': True}",
  "optim.learning_rate=1e-2",
  "optim.warmup_steps=1",
  f"train.num_steps={STEPS}",
  f"train.log_every={EVERY}",
  f"train.loads_every={EVERY}",
]
BALANCERS = {
  "nothing": {},
  "loss, 1e-2": {"loss": {"name": "switch", "coefficient": 1e-2}},
  "bias, 1e-2 a step": {"bias": {"name": "bias", "rate": 1e-2}},
}
runs = {}
for name, balancers in BALANCERS.items():
  overrides = [*SHARED, f"model.moe.balancers={balancers!r}"]
  config = config_lib.load("tiny", overrides)
  runs[name] = pathlib.Path("runs", name.split(",")[0])
  with contextlib.redirect_stderr(sys.stdout):  # Progress goes to stderr.
    loop.train_and_evaluate(config, runs[name])

# %% [markdown]
# ## Loads over time
#
# A row is an expert of the second layer. White is its fair share, red is more,
# up to twice the share and beyond, and blue is less: dark blue experts get next
# to nothing. Without balancing a few rows stay dark red, and most are blue. With
# the loss and with the bias the colours fade within some tens of steps, so that all
# experts are at work.

# %%
loads = {
  name: run_directory.read_metrics(run, "loads") for name, run in runs.items()
}
draw.loads(
  [line["step"] for line in loads["nothing"]],
  {name: [line["01"] for line in lines] for name, lines in loads.items()},
)

# %% [markdown]
# ## The same as a number
#
# MaxVio is the load of the fullest expert above the mean, relative to the mean,
# and should be low. A router that draws at random is at the floor, not at zero.
# An expert has room for twice its fair share here, and what exceeds it is
# dropped: without balancing nearly a third of all assignments are not computed.

# %%
lines_of = {
  name: run_directory.read_metrics(run, "train") for name, run in runs.items()
}
panels = {
  "max_vio": ("MaxVio", "mean over layers"),
  "dropped": ("Dropped assignments", "share of all"),
}
figure, both = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
for axes, (metric, (title, label)) in zip(both, panels.items()):
  for (name, lines), style in zip(lines_of.items(), ("k-", "C0--", "C1-.")):
    steps = [line["step"] for line in lines]
    axes.plot(steps, [line[metric] for line in lines], style, label=name)
  axes.set(title=title, xlabel="training step", ylabel=label, ylim=0)
floor = lines[-1]["max_vio_floor"]
both[0].axhline(floor, color="grey", lw=3, alpha=0.5, label="random router")
figure.legend(
  *both[0].get_legend_handles_labels(), loc="outside upper center", ncols=4
)
plt.show()

# %% [markdown]
# ## What it costs, and how the bias works
#
# Dropped assignments are not computed, so the run without balancing trains with
# part of its layer missing. The table has the end of training, and it is one seed
# of a model of a hundred thousand weights: `experiments/load_balancing` has the
# seeds and the intervals.

# %%
METRICS = "loss", "max_vio", "dropped", "dead_experts"
print(" " * 20, *(f"{metric:>13}" for metric in METRICS))
for name, lines in lines_of.items():
  late = lines[-10:]
  means = [np.mean([line[metric] for line in late]) for metric in METRICS]
  print(f"{name:20}", *(f"{mean:13.3f}" for mean in means))

# %% [markdown]
# The bias is a number for each expert, added to the scores for choosing and for
# nothing else. It has moved up for experts that the router alone would leave
# empty, and down for the ones that it would overfill; only differences matter. A
# checkpoint keeps it with the parameters.

# %%
variables = checkpoint.load_variables(runs["bias, 1e-2 a step"])
(bias_RE,) = jax.tree.leaves(variables["balance"])  # Layers and experts.
draw.matrix(
  bias_RE,
  [f"layer {number}" for number in range(len(bias_RE))],
  [f"e{number}" for number in range(16)],
  "Bias on the selection score of every expert at the end",
)

# %% [markdown]
# ## Next
#
# - `03_train_a_moe` trains on text of your own and lets the model write.
# - `07_reproduce_a_table` has the same comparison with eight seeds.
# - `docs/balancing.md` explains the losses and their coefficients.
