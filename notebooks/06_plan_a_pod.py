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
# # Plan a run on a pod
#
# DeepSeek-V3 has 671 billion parameters, and a laptop can say a lot about
# training it: how large it is, on how many chips it fits, how it should be split
# over them, and what a step costs at least. This notebook counts published
# models, ranks thousands of ways to split DeepSeek-V3 over 512 TPUs in closed
# form, and compiles Mixtral for 64 TPUs that are not there. It takes about three
# minutes on two CPU cores, and needs the TPU compiler (Linux on x86-64).
#
# On Colab, run this in a cell of its own first, with the address of your copy of
# the repository:
#
# ```
# !git clone ADDRESS moe_jax
# %cd moe_jax
# %pip install -q -e '.[notebooks,aot]'
# ```
#
# Compilers are chosen before jax is imported. If this kernel has imported it
# already, restart it.

# %%
import contextlib
import io
import json
import os
import pathlib
import tempfile

from matplotlib import pyplot as plt

from moe_jax import params
from moe_jax import plan as command
from moe_jax.core.errors import ConfigError
from moe_jax.run import config as config_lib
from moe_jax.training.planning import topologies

FAST = bool(os.environ.get("MOE_JAX_FAST"))  # As the tests run it.
os.chdir(tempfile.mkdtemp())  # Paths below are relative to this folder.
POD = "v5p:2x2x1" if FAST else "v5p:8x8x8"
CHIP, SHAPE = topologies.parse(POD)
topologies.prepare(CHIP, SHAPE)

# %% [markdown]
# ## How large is it?
#
# `python -m moe_jax.params` counts the parameters of any config without
# allocating them. *Active* are those that one token passes: 37 of 671 billion.

# %%
_ = params.main(["--config=deepseek_v3:671b"])

# %% [markdown]
# The same of five published models. Look at the distance between the two bars of a
# model: Mixtral uses more than a quarter of its parameters for a token, Kimi K2
# about a thirtieth. The right panel is what attention keeps of every token while
# text is generated. Latent attention, which DeepSeek-V3 and Kimi K2 have, needs
# about half of what Mixtral does, with far more layers and heads.

# %%
MODELS = {
  "DeepSeek-V3": "deepseek_v3:671b",
  "Kimi K2": "kimi:k2",
  "gpt-oss 120b": "gpt_oss:120b",
  "Mixtral 8x7B": "mixtral:8x7b",
  "OLMoE 1B-7B": "olmoe:1b_7b",
}
sizes = {}
for name, spec in MODELS.items():
  with contextlib.redirect_stdout(io.StringIO()):  # A table for each.
    params.main([f"--config={spec}", "--json=sizes.json"])
  sizes[name] = json.loads(pathlib.Path("sizes.json").read_text())

figure, (left, right) = plt.subplots(
  1, 2, figsize=(10, 3.4), layout="constrained", sharey=True
)
for number, size in enumerate(sizes.values()):
  left.barh(number - 0.2, size["total"] / 1e9, 0.4, color="tab:blue")
  left.barh(number + 0.2, size["active"] / 1e9, 0.4, color="tab:orange")
  cache = size["kv_cache_bytes_per_token_bf16"]
  right.barh(number, cache / 1e3, 0.5, color="grey")
left.set_yticks(range(len(sizes)), sizes)
left.invert_yaxis()
left.set(
  title="Parameters: all (blue), of a token (orange)",
  xlabel="10⁹ parameters",
  xscale="log",
  xlim=0.5,
)
right.set(title="Cache of a token, in bfloat16", xlabel="kB per token")
plt.show()

# %% [markdown]
# ## Does it fit?
#
# Training needs more than the parameters: with AdamW in float32 each of them
# takes 16 bytes, gradients included. `python -m moe_jax.plan` on 64 chips of v5p
# refuses in seconds, and says what would be enough.

# %%
model = "tiny" if FAST else "deepseek_v3:671b"
bound = ["model.moe.capacity_factor=1.25", "model.moe.dispatcher.name=sorted"]
bound += [f"model.moe.expert_buckets={4 if FAST else 64}"]
batch = 8 if FAST else 512
bound += [f"data.batch_size={batch}", f"eval.batch_size={batch}"]
flags = [f"--config.{text}" for text in bound]
try:
  command.main(
    [f"--config={model}", "--topology=v5p:4x4x4", "--mesh=expert:64", *flags]
  )
except ConfigError as error:
  print("error:", error)

# %% [markdown]
# ## How should it be split?
#
# A mesh has four axes, an expert can be reached in two ways, a block can be
# computed again in the backward pass or kept, and a batch can be cut into
# micro-batches. For every such choice that a run would accept, the closed form
# gives the memory of a device and the least time of a step: the FLOPs, the bytes
# of the memory and the bytes of the links over what the chip can do. A dropless
# buffer would have room for all rows that could ever come; the bound of 1.25 in
# 64 buckets makes it a small part of that.

# %%
from moe_jax.training.planning import search  # noqa: E402

config = config_lib.load(model, bound)
devices = topologies.devices(CHIP, SHAPE)
ranked = search.ranked(config, CHIP, devices, topologies.ring(POD))
print(len(ranked), "candidates for", POD)
for one in ranked[:3]:
  print(
    f"\n{one.memory / 1e9:.1f} GB, {one.low:.2f} to {one.high:.2f} s a step"
  )
  print(" ", one.flags.replace(" --", "\n  --"))

# %% [markdown]
# Every point is a candidate. What lies to the right of the line has too much on a
# device, and among the others the lowest are the best. The fastest of all would
# need a terabyte on a device, because they keep everything and compute nothing
# again. The time is that of a step in which nothing overlaps.

# %%
figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
for kind, color in (("all_to_all", "tab:blue"), ("all_gather", "tab:orange")):
  some = [one for one in ranked if one.settings["model.moe.exchange"] == kind]
  axes.scatter(
    [one.memory / 1e9 for one in some],
    [one.high for one in some],
    s=9,
    alpha=0.4,
    color=color,
    label=kind,
  )
axes.axvline(CHIP.memory / 1e9, color="black", lw=1, label="memory of a chip")
axes.set(
  title=f"{len(ranked)} ways to train {'a tiny model' if FAST else 'DeepSeek-V3'}"
  f" on {POD}",
  xlabel="memory of a device, GB",
  ylabel="seconds of a step without overlap",
  xscale="log",
  ylim=0,
)
axes.legend()
plt.show()

# %% [markdown]
# ## What the compiler says
#
# A closed form can be wrong, and the compiler decides. This compiles the training
# step of Mixtral 8x7B for 64 chips, as a run would, and prints what a device
# holds, computes and sends. DeepSeek-V3 is compiled in the same way
# (`docs/planning.md` has its numbers), but takes two to seven minutes.

# %%
if FAST:
  flags = ["--config=tiny", "--topology=v5p:2x2x1"]
  flags += ["--mesh=fsdp:2,expert:2"]
else:
  flags = ["--config=mixtral:8x7b", "--topology=v5p:4x4x4"]
  flags += ["--mesh=fsdp:8,expert:8", "--config.data.batch_size=64"]
  flags += ["--config.eval.batch_size=64"]
_ = command.main([*flags, "--json=plan.json"])
plan = json.loads(pathlib.Path("plan.json").read_text())

# %% [markdown]
# What fills the memory of a device? Parameters and optimizer are split evenly
# over all devices; temporaries are activations, weights that are gathered just in
# time, and gradients.

# %%
parts = dict(plan["memory_bytes_per_device"])
total = parts.pop("total")
figure, axes = plt.subplots(figsize=(9, 1.9), layout="constrained")
before = 0.0
for name, size in parts.items():
  if size > total / 1000:
    label = f"{name}: {size / 1e9:.1f} GB"
    axes.barh(0, size / 1e9, left=before / 1e9, height=0.6, label=label)
    before += size
axes.axvline(plan["hbm_limit_bytes"] / 1e9, color="black", lw=1, label="limit")
axes.set(
  title=f"Memory of a device of {plan['topology']}: {total / 1e9:.1f} GB",
  xlabel="GB",
  yticks=(),
)
figure.legend(loc="outside right")
plt.show()

# %% [markdown]
# Where does the time go? A bar is a part of the step. Dark is the least time,
# the longest of computing, reading memory and sending; light is what it takes if
# nothing overlaps. The parts with a long light end are those in which overlap, or
# another mesh, would pay.

# %%
stages = plan["stages"]
figure, axes = plt.subplots(
  figsize=(8, 0.8 + 0.32 * len(stages)), layout="constrained"
)
for number, stage in enumerate(stages):
  low, high = stage["roofline_seconds"]
  axes.barh(number, 1e3 * high, color="lightsteelblue")
  axes.barh(number, 1e3 * low, color="tab:blue")
axes.set_yticks(range(len(stages)), [stage["name"] for stage in stages])
axes.invert_yaxis()
low, high = plan["roofline_seconds"]
axes.set(
  title=f"Least time of a step: {low:.2f} s if all overlaps, {high:.2f} s if"
  " nothing does",
  xlabel="milliseconds (dark: with overlap, light: without)",
)
plt.show()

# %% [markdown]
# What is sent? The bytes of the arrays that the compiled program gathers,
# scatters, sums or exchanges, beside those of the closed form that ranked the
# candidates. The two should agree: that is what makes the ranking worth
# something.

# %%
sent = {
  c["axis"]: (c["axis_bytes"], c["formula_bytes"]) for c in plan["collectives"]
}
figure, axes = plt.subplots(figsize=(7.5, 2.8), layout="constrained")
for number, (compiled, formula) in enumerate(sent.values()):
  axes.barh(number - 0.2, compiled / 1e9, 0.4, color="black")
  axes.barh(number + 0.2, formula / 1e9, 0.4, color="silver")
axes.set_yticks(range(len(sent)), sent)
axes.invert_yaxis()
axes.set(
  title="Bytes of the collectives of a step, by mesh axes",
  xlabel="GB (black: compiled program, grey: closed form)",
)
plt.show()

# %% [markdown]
# ## Next
#
# - `docs/planning.md` explains every number of the page, plans of generation
#   (`--decode`), and GPU topologies.
# - `--search` ranks and compiles the best candidates by one command.
# - `--load=RUN/metrics.jsonl` says what the loads of a run of yours would mean on
#   such devices.
