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
# # Reproduce a table
#
# The tables of this repository are made from rows that are committed beside each
# question, a row for each arm and seed. This notebook takes the rows of
# `experiments/load_balancing` and makes everything that its README shows,
# without training: means with intervals, differences between arms, the table and
# its LaTeX. Then it trains one of the runs again and compares the result with the
# committed row, which takes about two minutes on two CPU cores.
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

from matplotlib import pyplot as plt

import moe_jax

ROOT = pathlib.Path(moe_jax.__file__).parents[1]
sys.path.insert(0, str(ROOT))
from experiments import (  # noqa: E402
  columns,
  intervals,
  launch,
  questions,
  report,
  runs,
)

FAST = bool(os.environ.get("MOE_JAX_FAST"))  # As the tests run it.
os.chdir(tempfile.mkdtemp())  # Paths below are relative to this folder.

# %% [markdown]
# ## The rows
#
# The question is how to keep experts equally loaded: with a loss, with a bias on
# the selection, or not at all. Each of its seven *arms* was trained with eight
# seeds at the scale `cpu`. A row has the arm, the seed, a digest of the config,
# the revision of the code, and some sixty metrics.

# %%
question = questions.load("load_balancing")
rows = runs.read_scale(question.folder / "results.csv", "cpu")
curves = runs.read_scale(question.folder / "curves.csv", "cpu")
print(question.title)
print(len(rows), "rows with", len(rows[0]), "columns. Some of the first one:")
for name in ("arm", "seed", "config_digest", "bits_per_byte", "max_vio_global"):
  print(f"  {name:16}{rows[0][name]}")

# %% [markdown]
# ## Means and intervals
#
# A column of the table knows its metric, and gives the values by arm and seed.
# The interval of an arm is Student's: the mean over the $n$ seeds ± half of it,
# $t_{0.975,\,n-1} \, s / \sqrt{n}$, where $s$ is their standard deviation.

# %%
bits_of = columns.BITS_PER_BYTE.values(rows)
interval_of = {arm: intervals.of([*x.values()]) for arm, x in bits_of.items()}
for arm, interval in interval_of.items():
  print(f"{arm:14}{interval.mean:.3f} ± {interval.half:.3f}")

# %% [markdown]
# Small points are seeds, and large ones with bars are means with their intervals.
# Seeds differ by as much as arms do, which is why a single run of each would
# decide nothing.

# %%
figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
for place, interval in enumerate(interval_of.values()):
  values = interval.values
  axes.plot([place + 0.2] * len(values), values, "k.", ms=4, alpha=0.6)
  axes.errorbar(place, interval.mean, interval.half, fmt="o", capsize=4)
axes.set_xticks(range(len(interval_of)), interval_of)
axes.set(
  title="Load balancing at the scale cpu: eight seeds of each arm",
  ylabel="validation bits per byte (lower is better)",
)
plt.show()

# %% [markdown]
# ## Differences, paired by seed
#
# Runs of the same seed see the same batches in the same order, and share what is
# lucky about them. So two arms are compared seed by seed, and the interval is that
# of the differences. Each line of the left panel joins the two runs of a seed. The
# arms overlap, but every line falls: with every seed the bias is better. The right
# panel has the differences, and zero is far from their interval.

# %%
PAIR = "bias", "loss_1e-2"
difference = intervals.paired(*(bits_of[arm] for arm in PAIR))
figure, (left, right) = plt.subplots(
  1, 2, figsize=(9, 3.6), layout="constrained"
)
for seed in bits_of["bias"]:
  left.plot(PAIR[::-1], [bits_of[arm][seed] for arm in PAIR[::-1]], "o-")
left.set(title="A line is a seed", ylabel="validation bits per byte")
right.plot([0.1] * len(difference.values), difference.values, "k.")
right.errorbar(0, difference.mean, difference.half, fmt="o", capsize=4)
right.axhline(0, color="grey", lw=3, alpha=0.5)
right.set(
  title="bias minus loss_1e-2, with the 95 % interval",
  ylabel="difference in bits per byte",
  xlim=(-0.5, 0.6),
  xticks=(),
)
plt.show()
decided = "excludes" if difference.decides else "includes"
print(f"{difference.mean:+.3f} ± {difference.half:.3f} {decided} zero")

# %% [markdown]
# ## The table
#
# `report.write` makes the report of any rows: the table, the claims that compare
# two arms, figures, and a LaTeX file. The question's own `plot.py` asks for ten
# columns; these are four of them and four claims, with a sentence each.

# %%
shown = report.Report(
  columns=(
    columns.BITS_PER_BYTE,
    columns.MAX_VIO_GLOBAL,
    columns.DROPPED,
    columns.TRAIN_FLOPS,
  ),
  claims=(
    report.Claim("bits_per_byte", "bias", "loss_1e-2"),
    report.Claim("bits_per_byte", "bias", "dense"),
    report.Claim("max_vio_global", "bias", "loss_1e-2"),
    report.Claim("bits_per_byte", "bias_1e-3", "loss_1e-3"),
  ),
)
folder = pathlib.Path("report")
print(report.write(folder, question.title, shown, rows, curves))

# %% [markdown]
# The same for a paper. A value is bold where it differs significantly from that of
# every other arm.

# %%
print((folder / "table.tex").read_text())

# %% [markdown]
# ## Train a run again
#
# With `--fresh` a launch trains again what is committed, and compares the new row
# with the old one number by number. They are equal to the last bit on the same
# number of cores, with the same versions of the packages and of this one. The
# committed rows are older, and later revisions add up some numbers in another
# order (`CHANGELOG.md`). Over hundreds of steps a difference in the last bit grows,
# so that the result is another draw from the spread of the seeds. This is one arm
# and one seed; without these flags it would be the whole table.

# %%
flags = ["load_balancing", "--arm=bias", "--seeds=1", "--fresh"]
flags += ["--workdir=again"]
if FAST:
  flags += ["--scale=demo", "--config.train.num_steps=4"]
  flags += ["--config.optim.warmup_steps=1"]
  flags += ["--config.eval.batches_per_domain=1"]
else:
  flags += ["--scale=cpu"]
with contextlib.redirect_stderr(sys.stdout):  # Progress goes to stderr.
  launch.main(flags)

# %% [markdown]
# Where does the new run lie? The star belongs among the eight points of its arm.
# The interval is that of the mean. It is narrower than the spread of the points,
# and a single run need not lie in it.

# %%
(again,) = runs.read_csv(pathlib.Path("again", "report", "results.csv"))
old, interval = bits_of["bias"], interval_of["bias"]
figure, axes = plt.subplots(figsize=(8, 2.2), layout="constrained")
axes.plot([*old.values()], [0] * len(old), "ko", ms=5, label="committed seeds")
axes.errorbar(
  interval.mean,
  -0.5,
  xerr=interval.half,
  fmt="s",
  capsize=4,
  label="their mean, 95 % interval",
)
axes.plot(again["bits_per_byte"], 0.5, "r*", ms=14, label="trained just now")
axes.set(
  title=f"Seed 0 of the arm bias: {again['bits_per_byte']:.4f} now,"
  f" {old[0]:.4f} committed",
  xlabel="validation bits per byte",
  yticks=(),
  ylim=(-1, 1),
)
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# ## Next
#
# - `python -m experiments.launch load_balancing --scale=cpu --report` makes the
#   whole report, and without `--report` trains what is not finished.
# - `08_write_a_router` has a question of its own, from the idea to the table.
# - `docs/experiments.md` explains arms, tuning and reports.
