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
# # Routing by hand
#
# A Mixture-of-Experts layer replaces the feed-forward network of a transformer
# by $E$ of them, the experts, and sends each token to $K$:
#
# $$y_t = \sum_{e \in \text{top-}K(s_t)} w_{te} \, \text{expert}_e(x_t)$$
#
# Here are eight experts and one sentence. Every tensor between $x$ and $y$ is
# shown, first computed from the equations, then by the parts of `moe_jax`, and
# at the end `moe_ffn` does all of it at once. The letters at the end of a name
# are its shape: `T` tokens, `D` width, `E` experts, `K` choices, `C` slots. It
# takes seconds.
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
import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

import moe_jax
from moe_jax.core import registry
from moe_jax.moe import dispatchers, experts, groups, layer
from moe_jax.moe.types import Rows, Side
from moe_jax.training import metrics

sys.path.insert(0, str(pathlib.Path(moe_jax.__file__).parents[1]))
from notebooks import draw  # noqa: E402

# %% [markdown]
# ## Tokens
#
# A word is a vector of width $D$: random here, and the same word the same
# vector, as no context has been mixed in yet. That is why equal words will be
# treated equally below, as far as their slots last.

# %%
sentence = "the cat sat on the mat and the dog sat on the rug"
words = sentence.split()
T, D, E, K, F = len(words), 16, 8, 2, 32
vocabulary = sorted(set(words))
embedding_VD = jax.random.normal(jax.random.key(0), (len(vocabulary), D))
x_TD = embedding_VD[jnp.array([vocabulary.index(w) for w in words])]
print("x_TD", x_TD.shape)

# %% [markdown]
# ## Score
#
# The router is one matrix. Its logits become a distribution over the experts:
# $s_t = \text{softmax}(x_t W)$. A row of the picture is a word and adds up to 1;
# white is 0. The two reddest numbers of a row will be its experts.

# %%
router = registry.load("routers", "top_k", top_k=K, renormalize=True)
router_params = router.init(jax.random.key(15), D, E)
logits_TE = x_TD @ router_params["kernel"]
prob_TE = jax.nn.softmax(logits_TE)
names = [f"e{e}" for e in range(E)]
draw.matrix(prob_TE, words, names, "prob_TE: scores of eight experts")

# %% [markdown]
# ## Choose and weigh
#
# A token goes to the $K$ experts with the highest scores, best first. With
# `renormalize` their weights are the scores over their sum.

# %%
score_TK, expert_TK = jax.lax.top_k(prob_TE, K)
weight_TK = score_TK / score_TK.sum(-1, keepdims=True)
for word, experts_K, weights_K in zip(words, expert_TK, weight_TK):
  chosen = ", ".join(f"e{e} x {w:.2f}" for e, w in zip(experts_K, weights_K))
  print(f"{word:5}{chosen}")

# %% [markdown]
# The router of the package says the same in its `Routing`, which holds a choice
# (here a `TokenChoice`: every token names its experts) and the probabilities.

# %%
side = Side(jnp.ones(T, bool))
routing = router.route(
  router_params,
  x_TD,
  num_experts=E,
  select=lambda score_TE: score_TE,
  side=side,
  rng=None,
)
np.testing.assert_array_equal(routing.choice.expert_TK, expert_TK)
np.testing.assert_allclose(routing.choice.weight_TK, weight_TK, rtol=1e-5)

# %% [markdown]
# ## Loads
#
# How many assignments an expert got. Balanced loads would be $TK/E$ each;
# MaxVio is how far the fullest is above that, relative to it. A router that
# draws experts at random does not reach zero either, hence the floor.

# %%
load_E = np.bincount(np.ravel(expert_TK), minlength=E)
print("load_E", load_E.tolist(), "balanced:", T * K / E)
print("by hand", (load_E.max() - load_E.mean()) / load_E.mean())
print("MaxVio ", metrics.max_vio(load_E))
print("floor  ", round(metrics.max_vio_floor(T, E, K), 2))

# %% [markdown]
# ## Slots
#
# On an accelerator shapes are fixed, so an expert has $C$ slots,
# $C = \lfloor \text{capacity factor} \cdot TK/E \rfloor$. They are given out
# token by token, and who comes too late is *dropped*: for that expert the token
# contributes nothing, and passes by the layer through the residual.

# %%
bound = groups.capacity(1.25, T, K, E)
place_TK = dispatchers.rank(expert_TK, None, E, "token")
kept_TK = place_TK < bound.slots
print("slots of an expert:", bound.slots)
for word, experts_K, places_K in zip(words, expert_TK, place_TK):
  found = (
    f"e{e} slot {p}" if p < bound.slots else f"e{e} dropped"
    for e, p in zip(experts_K.tolist(), places_K.tolist())
  )
  print(f"{word:5}", ", ".join(found))
print("dropped:", int((~kept_TK).sum()), "of", T * K)

# %% [markdown]
# ## Dispatch
#
# The tokens, laid out by expert and slot: `x_ECD`. As a one-hot product it is
# the einsum of GShard, and the dispatcher `einsum` computes just that; the
# others do the same by index, or sort rows and have no slots.

# %%
slot_TKEC = (
  jax.nn.one_hot(expert_TK, E)[..., :, None]
  * jax.nn.one_hot(place_TK, bound.slots)[..., None, :]
)
x_ECD = jnp.einsum("TKEC,TD->ECD", slot_TKEC, x_TD)
owner_EC = jnp.einsum("TKEC,T->EC", slot_TKEC, 1.0 + jnp.arange(T)).astype(int)
for e, owners in enumerate(owner_EC.tolist()):
  print(f"e{e}", [words[o - 1] if o else "-" for o in owners])

dispatcher = registry.load("dispatchers", "gather")
one_group = jax.tree.map(lambda x: x[None], routing.choice)
plan = dispatcher.plan(one_group, E, bound)
np.testing.assert_allclose(plan.dispatch(x_TD[None]).x[0], x_ECD, rtol=1e-6)
np.testing.assert_array_equal(plan.kept_GTK[0], kept_TK)

# %% [markdown]
# ## Experts
#
# Each is a small SwiGLU network of its own:
# $\text{expert}_e(x) = (\text{silu}(x G_e) \odot x U_e) D_e$.

# %%
network = experts.build(F)
expert_params = network.init(jax.random.key(2), E, D)
gate, up, down = (expert_params[k] for k in ("gate", "up", "down"))
hidden_ECF = jax.nn.silu(jnp.einsum("ECD,EDF->ECF", x_ECD, gate))
hidden_ECF *= jnp.einsum("ECD,EDF->ECF", x_ECD, up)
y_ECD = jnp.einsum("ECF,EFD->ECD", hidden_ECF, down)
rows = network.apply(expert_params, Rows(x_ECD[None]), None)
np.testing.assert_allclose(rows.x[0], y_ECD, rtol=1e-4, atol=1e-5)
print("y_ECD", y_ECD.shape)

# %% [markdown]
# ## Combine
#
# Back to the tokens, each expert's answer times its weight, and summed. Red
# numbers are above zero and blue ones below. The last word found both of its
# experts full: its row is white, and all that is left of it is the residual.

# %%
y_TD = jnp.einsum("TKEC,TK,ECD->TD", slot_TKEC, weight_TK, y_ECD)
np.testing.assert_allclose(plan.combine(rows)[0], y_TD, rtol=1e-4, atol=1e-5)
columns = [f"d{d}" for d in range(8)]
draw.matrix(y_TD[:, :8], words, columns, "y_TD, its first columns")

# %% [markdown]
# ## The layer
#
# A `Recipe` says what a layer is made of, and `moe_ffn` is all of the above.
# Besides `y` it returns `Stats`: sums, from which every metric is computed.

# %%
recipe = layer.Recipe(E, router, dispatcher, network, bound)
params = {"router": router_params, "experts": expert_params}
in_groups = Side(side.mask_T[None])
y_GTD, stats, _ = layer.moe_ffn(recipe, params, {}, x_TD[None], in_groups)
np.testing.assert_allclose(y_GTD[0], y_TD, rtol=1e-4, atol=1e-5)
layers = {"00": metrics.Layer(stats, router)}
for name, value in metrics.routing(layers).items():
  print(f"{name:22}{float(value.value()):.3f}")

# %% [markdown]
# ## Change one thing
#
# Each line is the same layer with one part replaced. The gate changes how the
# answers are weighed, the order of slots who is dropped, and a sorting
# dispatcher without a bound drops nobody.

# %%
sigmoid = registry.load(
  "routers", "top_k", top_k=K, renormalize=True, score="sigmoid"
)
by_choice = registry.load("dispatchers", "gather", order="choice")
variants = {
  "as above": recipe,
  "sigmoid gate": dataclasses.replace(recipe, router=sigmoid),
  "first choices first": dataclasses.replace(recipe, dispatcher=by_choice),
  "twice the slots": dataclasses.replace(
    recipe, bound=groups.capacity(2.5, T, K, E)
  ),
  "dropless": dataclasses.replace(
    recipe, dispatcher=registry.load("dispatchers", "sorted"), bound=None
  ),
}
for name, variant in variants.items():
  other_GTD, stats, _ = layer.moe_ffn(
    variant, params, {}, x_TD[None], in_groups
  )
  layers = {"00": metrics.Layer(stats, variant.router)}
  found = metrics.divide(metrics.routing(layers))
  moved = float(jnp.abs(other_GTD - y_GTD).max())
  print(
    f"{name:22}dropped {found['dropped']:.2f}   MaxVio {found['max_vio']:.2f}"
    f"   y moves by {moved:.3f}"
  )

# %% [markdown]
# First choices first is what GShard and Switch do, and in a decoder it leaks:
# whether a token's second choice finds a slot depends on the first choices of
# *later* tokens. The package knows it when it reads the config, and refuses.

# %%
for name in ("as above", "first choices first"):
  print(f"{name:22}later tokens: {variants[name].looking_ahead or 'no part'}")
