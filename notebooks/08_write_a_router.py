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
# # Write a router
#
# From an idea to a table with seeds, without a line changed in the package: a
# router in a file of one's own, the contract that every router keeps, a layer, a
# question with arms, and a paired difference. It takes two to three minutes on two
# CPU cores.
#
# On Colab, run this in a cell of its own first, with the address of your copy of
# the repository:
#
# ```
# !git clone ADDRESS moe_jax
# %cd moe_jax
# %pip install -q -e '.[notebooks,test]'
# ```

# %%
import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np
from matplotlib import pyplot as plt

import moe_jax

ROOT = pathlib.Path(moe_jax.__file__).parents[1]
sys.path.insert(0, str(ROOT))
from experiments import launch  # noqa: E402

FAST = bool(os.environ.get("MOE_JAX_FAST"))  # As the tests run it.
os.chdir(tempfile.mkdtemp())  # Paths below are relative to this folder.

# %% [markdown]
# ## The idea
#
# In an experiment of this repository with small models that read bytes
# (`experiments/routers/README.md`) the best router does not learn: hash routing, a
# fixed table from the id of a token to its experts. So the id may be worth something
# that a router does not see in a vector that attention has mixed. The idea is to give
# a learned router both: a matrix for the vector, as usual, and a learned table for the
# id,
#
# $$s_t = \text{softmax}(x_t W + B_{\text{id}(t)})$$
#
# The table starts at zero, so that this router begins as the router `top_k`.
#
# ## The file
#
# A router is a file with a function `build(**options)`, in a folder `routers`.
# Its options have annotations, from which wrong values are refused. `route` gets
# the tokens of one group, and returns the experts, the weights and the
# probabilities; `docs/extending.md` explains every field.

# %%
ROUTER = '''
"""Scores of the vector and of the token's id: softmax(x W + B[id])."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.core.options import integer
from moe_jax.moe import scores
from moe_jax.moe.types import Router, Routing

CONTRACT_OPTIONS = {"top_k": 2, "vocab_size": 1000}


def build(top_k: integer(1), vocab_size: integer(1)) -> Router:
  def init(rng, d_model, num_experts):
    linear = scores.linear(rng, d_model, num_experts)
    return linear | {"table": jnp.zeros((vocab_size, num_experts))}

  def route(params, x_TD, *, num_experts, select, side, rng):
    del num_experts, rng
    id_T = side.features["token_id"] % vocab_size
    of_id_TE = jnp.take(params["table"], id_T, axis=0)
    logits_TE = scores.logits(params, x_TD) + scores.wide(of_id_TE)
    prob_TE = jax.nn.softmax(logits_TE)
    selected_TE = jax.lax.stop_gradient(select(prob_TE))
    _, expert_TK = jax.lax.top_k(selected_TE, top_k)
    expert_TK = checkpoint_name(expert_TK, "expert")
    weight_TK = jnp.take_along_axis(prob_TE, expert_TK, axis=-1)
    choice = scores.choice(expert_TK, weight_TK, side.mask_T)
    return Routing(choice, prob_TE, logits_TE, score_TE=prob_TE)

  axes = scores.LINEAR_AXES | {"table": (None, None)}
  features = {"token_id": vocab_size}
  return Router(init, axes, route, True, top_k=top_k, features=features)
'''
PARTS = pathlib.Path("my_parts")
(PARTS / "routers").mkdir(parents=True)
(PARTS / "routers" / "with_id.py").write_text(ROUTER.lstrip())
os.environ["MOE_JAX_PLUGINS"] = str(PARTS.resolve())  # For the contract tests.

# %% [markdown]
# ## One call
#
# `moe_jax.load` finds the file by its name. Six tokens with the ids 7, 7, 7, 8,
# 8, 8 and different vectors choose among eight experts. As long as the table is
# zero the id means nothing; with a large entry for expert 3 in the row of id 7
# the tokens with that id all go there first.

# %%
router = moe_jax.load(
  "routers", "with_id", plugins=(str(PARTS),), top_k=2, vocab_size=16
)
side = moe_jax.moe.types.Side(
  np.ones(6, bool), {"token_id": np.array([7, 7, 7, 8, 8, 8])}
)
x_TD = jax.random.normal(jax.random.key(1), (6, 32))
params = router.init(jax.random.key(2), 32, 8)
for entry in (0.0, 5.0):
  params["table"] = params["table"].at[7, 3].set(entry)
  routing = router.route(
    params, x_TD, num_experts=8, select=lambda x: x, side=side, rng=None
  )
  print(f"B[7, 3] = {entry}: experts", routing.choice.expert_TK.tolist())

# %% [markdown]
# ## The contract
#
# The contract tests of this repository find the file by the variable
# `MOE_JAX_PLUGINS`, and check it as they check every other router: shapes and
# dtypes, weights that are finite and not negative, a gradient that reaches every
# parameter, equal treatment of experts and of tokens, padding that takes no slot,
# capacities, causality, and the same choice alone as beside other groups. They need the
# extra `test`.

# %%
command = [sys.executable, "-m", "pytest", "tests/contracts_test.py"]
command += ["-k", "with_id and not sorted", "-q", "-n0", "--color=no"]
done = subprocess.run(
  [*command, "-p", "no:cacheprovider"],
  cwd=ROOT,
  stdout=subprocess.PIPE,
  stderr=subprocess.STDOUT,
  text=True,
)
if done.returncode:
  print(done.stdout)
  raise RuntimeError(
    "The contract is not kept, or cannot be tested: see the lines above. If they say"
    " that a module is missing, run pip install -e '.[test]' in the repository."
  )
print(done.stdout.strip().splitlines()[-1].split(" in ")[0])

# %% [markdown]
# ## The question
#
# A question is a folder too. `sweep.py` has the arms, which are the values in
# which the configs differ; everything else they share, also the balancing loss.
# `plot.py` has the columns of the table and the claims, the differences that are
# to be judged. The hash router is there for comparison, as the other extreme: it sees
# the id alone.

# %%
SWEEP = f"""
from experiments import small, sweeps

def demo():
  c = small.demo_config()
  c.plugins = ({str(PARTS)!r},)
  c.model.num_layers = {1 if FAST else 3}
  c.train.num_steps = {4 if FAST else 200}
  c.train.log_every = {2 if FAST else 10}
  c.optim.warmup_steps = {1 if FAST else 20}
  c.eval.batches_per_domain = {1 if FAST else 8}
  c.model.moe.balancers = {{
    "load": {{"name": "switch", "coefficient": 0.01}},
  }}
  arms = sweeps.over("model.moe.router", {{
    "top_k": {{"name": "top_k"}},
    "with_id": {{"name": "with_id", "vocab_size": 257}},
    "hash": {{"name": "hash", "vocab_size": 257}},
  }})
  return sweeps.Sweep(c, arms, seeds={1 if FAST else 3})

SCALES = {{"demo": demo}}
"""
PLOT = """
from experiments import columns, figures
from experiments.report import Claim, Report

REPORT = Report(
  columns=(columns.BITS_PER_BYTE, columns.MAX_VIO_GLOBAL, columns.DROPPED),
  claims=(
    Claim("bits_per_byte", "with_id", "top_k"),
    Claim("bits_per_byte", "with_id", "hash"),
    Claim("max_vio_global", "with_id", "top_k"),
  ),
  plots=(figures.MAX_VIO,),
)
"""
FILES = {
  "__init__.py": '"""Should a router see the id of a token?"""\n',
  "sweep.py": SWEEP,
  "plot.py": PLOT,
}
folder = pathlib.Path("my_questions", "token_ids")
folder.mkdir(parents=True)
for name, text in FILES.items():
  (folder / name).write_text(text)

# %% [markdown]
# ## The table
#
# This trains all arms with all seeds, one program for each arm, and writes the
# report. On the command line it is
#
# ```
# python -m experiments.launch token_ids --questions=my_questions
# ```
#
# With three seeds the table shows the mean, the lowest and the highest value. A
# claim compares two arms seed by seed, because runs of one seed see the same
# batches in the same order; ± is half the 95 % interval of the mean difference.

# %%
with contextlib.redirect_stderr(sys.stdout):  # Progress goes to stderr.
  launch.main(["token_ids", "--questions=my_questions", "--workdir=runs"])

# %% [markdown]
# The report has figures, too. Lines are means over seeds, and bands reach from
# the lowest seed to the highest. The loads of the hash router are those of the
# bytes in the text, from the first step to the last. The two learned routers begin
# with most tokens on few experts, and the loss evens their loads out, with the
# table as without it. The bits per byte of all three arms are close after so few
# steps: where a claim says that no difference is significant, that is the finding.
# It does not contradict the experiment above, which trains longer, tunes every arm and
# has more seeds.

# %%
figure, axes = plt.subplots(figsize=(7, 4.7), layout="constrained")
axes.imshow(plt.imread("runs/report/max_vio.png"))
axes.set_title("How uneven loads are, over training")
axes.set_axis_off()
plt.show()

# %% [markdown]
# ## From here to a claim
#
# This was a demonstration: few steps, few seeds, one learning rate for all arms.
# What a reader should believe needs a `Stage` that tunes the learning rate of
# every arm by the same rule, more seeds, and longer runs, which are more lines of
# the same `sweep.py` (`docs/experiments.md`). The router itself is ready for
# that: it runs on any mesh, is saved in checkpoints and appears in
# `python -m moe_jax.generate --experts`, because it is a part like any other.
