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
# # Expert parallelism
#
# Experts are many and large, and a token needs few of them. So the experts of a
# layer lie on different devices, and rows travel to the devices of their experts
# and back. This notebook does so with eight devices that XLA makes of one CPU:
# it shows who holds what, how many rows go from device to device, and that the
# result is that of a single device. It takes about a minute on two CPU cores.
#
# On Colab, run this in a cell of its own first, with the address of your copy of
# the repository:
#
# ```
# !git clone ADDRESS moe_jax
# %cd moe_jax
# %pip install -q -e '.[notebooks]'
# ```
#
# The number of virtual devices has to be set before jax is imported. If this
# kernel has imported it already, restart it.

# %%
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import contextlib
import dataclasses
import functools
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot as plt

import moe_jax
from moe_jax.core import parallel
from moe_jax.moe import exchange, experts, groups
from moe_jax.moe.types import Side
from moe_jax.run import config as config_lib
from moe_jax.run import run_directory
from moe_jax.training import loop

sys.path.insert(0, str(pathlib.Path(moe_jax.__file__).parents[1]))
from notebooks import draw  # noqa: E402

FAST = bool(os.environ.get("MOE_JAX_FAST"))  # As the tests run it.
os.chdir(tempfile.mkdtemp())  # Paths below are relative to this folder.
print(jax.device_count(), "devices")

# %% [markdown]
# ## The mesh
#
# Devices stand in a grid with four named axes, of which this one uses two. Along
# `data` there are two copies of everything, each with half of the tokens. Along
# `expert` four devices share the experts of a layer. Tokens are split over all
# eight.

# %%
mesh = parallel.make_mesh((2, 1, 4, 1))
print(dict(mesh.shape))
print(np.vectorize(lambda device: device.id)(mesh.devices[:, 0, :, 0]))

# %% [markdown]
# ## Who holds what
#
# A layer with eight experts, of which a token takes two, without a capacity. Each
# parameter has logical axes, such as `expert` and `embed`, and one table says
# over which axes of the mesh these are split. Tokens come in groups, and groups
# are split over the devices.

# %%
E, K, D, F, G, T = 8, 2, 32, 64, 16, 64
recipe = moe_jax.Recipe(
  num_experts=E,
  router=moe_jax.load("routers", "top_k", top_k=K, renormalize=True),
  dispatcher=moe_jax.load("dispatchers", "sorted"),
  experts=experts.build(F),
)
params = {
  "router": recipe.router.init(jax.random.key(0), D, E),
  "experts": recipe.experts.init(jax.random.key(1), E, D),
}
x_GTD = jax.random.normal(jax.random.key(2), (G, T, D))


def placed(x, axes):
  """The array, laid out on the mesh as its logical axes say."""
  spec = parallel.spec(axes, x.shape, mesh)
  return jax.device_put(x, jax.NamedSharding(mesh, spec))


axes = {"router": recipe.router.axes, "experts": recipe.experts.axes}
there = {
  part: {name: placed(x, axes[part][name]) for name, x in arrays.items()}
  for part, arrays in params.items()
}
x_there = placed(x_GTD, ("batch", None, None))
for part, arrays in there.items():
  for name, x in arrays.items():
    print(f"{part}/{name:8}{x.shape!s:14}{x.sharding.spec}")
print(f"tokens          {x_there.shape!s:14}{x_there.sharding.spec}")

# %% [markdown]
# The same as a picture: a row is a device, and what it holds is dark. Each expert
# lies on two devices, its copies along `data`, and stays there. The matrix of the
# router is stored in four parts too, and gathered when the layer needs it, since
# every device scores all experts. Of the sixteen groups of tokens every device has
# two of its own.


# %%
def show_holders(x, axis, columns, title, panel):
  """Marks the parts of an axis of an array that each device has."""
  held = np.zeros((8, x.shape[axis]))
  for shard in x.addressable_shards:
    held[shard.device.id, shard.index[axis]] = 1
  panel.imshow(held, cmap="Blues", vmin=0, vmax=1.5, aspect="auto")
  panel.set_xticks(np.arange(x.shape[axis] + 1) - 0.5, [], minor=False)
  panel.set_yticks(range(8), [f"device {i}" for i in range(8)])
  panel.grid(axis="x", color="white", lw=2)
  panel.tick_params(length=0)
  panel.set(title=title, xlabel=columns)


figure, panels = plt.subplots(
  1, 3, figsize=(10, 3), layout="constrained", sharey=True
)
router, up = there["router"]["kernel"], there["experts"]["up"]
show_holders(router, 0, "32 rows of the matrix", "router", panels[0])
show_holders(up, 0, "experts 0 to 7", "weights of experts", panels[1])
show_holders(x_there, 0, "groups 0 to 15", "tokens", panels[2])
plt.show()

# %% [markdown]
# ## The layer, on one device and on eight
#
# It is the same function with one argument more. Inside of a `shard_map` every
# device routes its own tokens, sends rows along the expert axis, computes its own
# experts, and sends the results back.

# %%
side = Side(jnp.ones((G, T), bool))
alone = jax.jit(functools.partial(moe_jax.moe_ffn, recipe))
together = jax.jit(functools.partial(moe_jax.moe_ffn, recipe, mesh=mesh))
y_GTD, stats, _ = alone(params, {}, x_GTD, side)
y_there, stats_there, _ = together(there, {}, x_there, side)
print("largest |y|:", float(abs(y_GTD).max()))
print("largest difference:", float(abs(y_GTD - y_there).max()))
same = (stats.count_E == stats_there.count_E).all()
print("loads are equal, expert by expert and group by group:", bool(same))

# %% [markdown]
# Gradients agree too. That of an expert is summed over its two copies, and that
# of the router over all eight devices.


# %%
def loss(run, params, x_GTD):
  return (run(params, {}, x_GTD, side)[0] ** 2).mean()


gradients = [
  jax.device_get(jax.grad(functools.partial(loss, run))(weights, x))
  for run, weights, x in ((alone, params, x_GTD), (together, there, x_there))
]
for (path, one), other in zip(
  jax.tree.leaves_with_path(gradients[0]), jax.tree.leaves(gradients[1])
):
  name = jax.tree_util.keystr(path, simple=True, separator="/")
  difference = np.linalg.norm(one - other) / np.linalg.norm(one)
  print(f"{name:16}differs by {difference:.0e} of its norm")

# %% [markdown]
# ## The all-to-all
#
# The statistics of a layer say how many rows of each group went to each expert.
# Summed over the groups of a device, and over the experts of one, they are the
# rows that go from device to device. Rows never leave their half of the mesh: the
# four devices of each copy exchange among themselves. With equal loads every
# number would be 64, which is white. A red column is a device whose experts are in
# demand.

# %%
kept_GE = np.asarray(stats_there.kept_E).sum(1)
sent = kept_GE.reshape(2, 4, G // 8, 4, E // 4).sum((2, 4))
figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
for copy, (rows_4x4, panel) in enumerate(zip(sent, panels)):
  names = [f"{4 * copy + i}" for i in range(4)]
  title = f"copy {copy}: rows that are sent"
  words = {"y": "from device", "x": "to device", "digits": 0, "white": 64}
  draw.matrix(rows_4x4, names, names, title, axes=panel, **words)
plt.show()
print("rows that devices have to compute:", sent.sum(1).ravel().tolist())

# %% [markdown]
# The slowest device decides how long a step takes, so that balance between
# experts is speed on a mesh. Arrays on an accelerator have a fixed size, too: a
# device needs room for all rows that could come. Without a capacity these are all
# rows of the four devices, if every token wants the two experts of one. A bound in
# buckets of two experts, one bucket for a device, makes room for 1.5 times the
# balanced load, and drops what exceeds it.

# %%
bounded = dataclasses.replace(recipe, bound=groups.capacity(1.5, T, K, 4))
tokens_and_groups = {"tokens": T, "groups": G // 8, "devices": 4}
print("balanced load of a device: ", G * T * K // 8, "rows")
for name, one in (("dropless", recipe), ("in buckets, 1.5", bounded)):
  rows = exchange.buffer_rows(one, **tokens_and_groups)
  print(f"room of a device, {name}: {rows} rows")

# %% [markdown]
# `exchange="all_gather"` is the other way to bring tokens to experts: every
# device gets the tokens of the four, computes what its experts have to say, and
# the answers are added up. It sends less where a token takes many experts, and the
# numbers are the same.

# %%
ring = dataclasses.replace(recipe, exchange="all_gather")
gathered = jax.jit(functools.partial(moe_jax.moe_ffn, ring, mesh=mesh))
y_ring, _, _ = gathered(there, {}, x_there, side)
print("largest difference:", float(abs(y_GTD - y_ring).max()))

# %% [markdown]
# ## A run on two meshes
#
# A config has the mesh as four numbers, and nothing else in it changes. The same
# run, once with all devices along `data` and once with experts split over four,
# has the same losses up to rounding, because groups, capacities and random
# numbers come from the config and never from the devices.

# %%
MESHES = {"data:8": (8, 1, 1, 1), "data:2,expert:4": (2, 1, 4, 1)}
STEPS = 3 if FAST else 10
losses = {}
for name, sizes in MESHES.items():
  config = config_lib.load(
    "tiny",
    [
      f"mesh={sizes}",
      f"train.num_steps={STEPS}",
      "train.log_every=1",
      "optim.warmup_steps=2",
      "eval.batches_per_domain=1",
    ],
  )
  folder = pathlib.Path("runs", name.replace(",", "-"))
  with contextlib.redirect_stderr(sys.stdout):  # Progress goes to stderr.
    loop.train_and_evaluate(config, folder)
  lines = run_directory.read_metrics(folder, "train")
  losses[name] = [line["loss"] for line in lines]

# %% [markdown]
# The two curves lie on each other, so that the second panel shows their
# difference. Numbers in float32 between 4 and 8 have distances of 4.8 × 10⁻⁷, so
# that the runs differ by the last bit of the loss or not at all. Over many steps
# such differences grow, as those of two orders of summation do on one device.

# %%
figure, (left, right) = plt.subplots(
  1, 2, figsize=(9, 3.2), layout="constrained"
)
for (name, values), style in zip(losses.items(), ("-", "o")):
  left.plot(range(1, len(values) + 1), values, style, label=name)
left.set(title="Loss", xlabel="training step", ylabel="nats per byte")
left.legend()
difference = 1e7 * np.subtract(*losses.values())
right.bar(range(1, len(difference) + 1), difference, color="grey")
right.axhline(0, color="black", lw=0.8)
right.set(
  title="Difference between the meshes",
  xlabel="training step",
  ylabel="10⁻⁷ nats per byte",
)
plt.show()

# %% [markdown]
# ## Next
#
# - `06_plan_a_pod` compiles such a step for hundreds of devices that are not
#   there, and counts what they hold, compute and send.
# - `docs/parallel.md` has the axes `fsdp` and `tensor`, several processes, and
#   clusters.
