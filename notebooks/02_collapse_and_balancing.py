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
# on the selection, and the load of every expert is drawn over time.

# %%
import os
import pathlib

import jax
import numpy as np
from matplotlib import pyplot as plt

import moe_jax
from moe_jax.run import config as config_lib
from moe_jax.training import metrics
from moe_jax.training.program import Program

FAST = bool(os.environ.get("MOE_JAX_FAST"))  # As the tests run it.
ROOT = pathlib.Path(moe_jax.__file__).parents[1]
STEPS = 4 if FAST else 300

# %% [markdown]
# ## The runs
#
# `configs/tiny.py` with sixteen experts, of which a token takes two. The gate is
# a sigmoid, renormalised over the chosen; one knob differs between the runs.

# %%
SHARED = [
  "model.moe.num_experts=16",
  "model.moe.router={'name': 'top_k', 'score': 'sigmoid', 'renormalize': True}",
  "optim.learning_rate=1e-2",
  f"train.num_steps={STEPS}",
  "optim.warmup_steps=1",
]
BALANCERS = {
  "nothing": {},
  "loss, 1e-2": {"loss": {"name": "switch", "coefficient": 1e-2}},
  "bias, 1e-2 a step": {"bias": {"name": "bias", "rate": 1e-2}},
}


def train(balancers):
  """Loads by step, layer and expert, the other metrics, and the last state."""
  config = config_lib.load(
    str(ROOT / "configs" / "tiny.py"),
    [*SHARED, f"model.moe.balancers={balancers!r}"],
  )
  program = Program(config)
  sublayers = program.model.sublayers
  state, batches = program.init(jax.random.key(0)), program.batches(0)
  load_SLE, lines = [], []
  for step in range(STEPS):
    state, sums = program.train_step(state, program.put(batches[step]))
    sums = jax.device_get(sums)
    layers = metrics.by_layer(sums["stats"], sublayers)
    load_SLE.append([layer.count_E for layer in layers.values()])
    means = metrics.routing(layers)
    lines.append(metrics.divide(means | {"loss": sums["loss"]}))
  return np.array(load_SLE), lines, state


runs = {name: train(balancers) for name, balancers in BALANCERS.items()}

# %% [markdown]
# ## Loads over time
#
# A column is a step, a row an expert of the second layer, and the shade its
# load over the balanced one. Without balancing a few rows stay dark and most are
# empty or almost so. The loss and the bias both keep all of them at work.

# %%
figure, panels = plt.subplots(
  len(runs), 1, figsize=(8, 7), layout="constrained", sharex=True
)
for axes, (name, (load_SLE, _, _)) in zip(panels, runs.items()):
  load_SE = load_SLE[:, 1] / load_SLE[:, 1].mean(axis=-1, keepdims=True)
  image = axes.imshow(
    load_SE.T,
    aspect="auto",
    cmap="Greys",
    vmin=0,
    vmax=4,
    origin="lower",
    interpolation="nearest",
  )
  axes.set(title=name, ylabel="expert")
panels[-1].set_xlabel("step")
figure.colorbar(image, ax=panels, label="load / balanced load", extend="max")
plt.show()

# %% [markdown]
# ## The same as a number
#
# MaxVio, the load of the fullest expert above the mean, relative to the mean.
# A router that draws at random is at the floor, not at zero. Lines are means of
# nine steps.

# %%
floor = metrics.max_vio_floor(int(load_SLE[0, 0].sum()) // 2, 16, 2)
figure, (left, right) = plt.subplots(
  1, 2, figsize=(9, 3.5), layout="constrained"
)
for (name, (_, lines, _)), style in zip(runs.items(), ("-", "--", ":")):
  for axes, metric in ((left, "max_vio"), (right, "dropped")):
    values = [line[metric] for line in lines]
    smooth = (
      np.convolve(values, np.ones(9) / 9, "valid") if not FAST else values
    )
    axes.plot(
      smooth, style, label=name, color="black" if style == "-" else None
    )
left.axhline(floor, color="grey", lw=3, alpha=0.5, label="random router")
left.set(xlabel="step", ylabel="MaxVio, mean over layers", ylim=0)
right.set(xlabel="step", ylabel="share of assignments dropped", ylim=0)
figure.legend(
  *left.get_legend_handles_labels(), loc="outside upper center", ncols=4
)
plt.show()

# %% [markdown]
# ## What it costs, and how the bias works
#
# Dropped assignments are not computed, so the run without balancing trains with
# part of its layer missing. The table says what that did to the loss, but it is
# one seed of a model of a hundred thousand weights: `experiments/load_balancing`
# has the seeds and the intervals.

# %%
for name, (_, lines, _) in runs.items():
  late = lines[-50:]
  mean = {k: np.mean([line[k] for line in late]) for k in late[0]}
  print(
    f"{name:20}loss {mean['loss']:.3f}   MaxVio {mean['max_vio']:.2f}"
    f"   dropped {mean['dropped']:.2f}   experts without a token"
    f" {mean['dead_experts']:.1f}"
  )

# %% [markdown]
# The bias is a number for each expert, added to the scores for choosing and for
# nothing else. It has moved up for experts that the router alone would leave
# empty, and down for the ones it would overfill; only differences matter.

# %%
_, _, state = runs["bias, 1e-2 a step"]
bias_RE = np.concatenate(
  [x.reshape(-1, 16) for x in map(np.asarray, jax.tree.leaves(state.balance))]
)
figure, axes = plt.subplots(figsize=(8, 2.8), layout="constrained")
for number, (bias_E, hatch) in enumerate(zip(bias_RE, ("", "///"))):
  axes.bar(
    np.arange(16) + 0.4 * number,
    bias_E,
    width=0.4,
    hatch=hatch,
    edgecolor="black",
    label=f"layer {number}",
  )
axes.axhline(0, color="black", lw=0.8)
axes.set(xlabel="expert", ylabel="bias on the selection score")
axes.set_xticks(range(16))
axes.legend()
plt.show()
