"""Router traces: the experts that every token chose, in a file of safetensors.

A file holds N rows of L tokens, and for each MoE layer NN with K experts a
token

  token      int32 [N, L]       input tokens
  mask       bool [N, L]        False for padding
  domain     int32 [N]          index of the row's domain, in the header's list
  NN/expert  int32 [N, L, K]    best first; -1 for padding and for no choice
  NN/weight  float32 [N, L, K]  factor of the expert's output
  NN/score   float32 [N, L, K]  probability of the chosen expert

These are the router's choices: an assignment is there even if its expert was
full.

The header of the file says under "moe_jax_trace", in JSON: {"layers": {"NN":
{"num_experts", "top_k"}}, "domains": names, "step": of the run}.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from moe_jax import models
from moe_jax.core import files
from moe_jax.core.errors import ConfigError, first_line
from moe_jax.moe.types import TokenChoice

HEADER = "moe_jax_trace"
_MOST = 2**24 - 1  # Analyses count tokens in arrays of this length.
OF_LAYER = ("expert", "weight", "score")


class Trace(NamedTuple):
  """The content of a file.

  layers: {"NN": {"num_experts", "top_k"}}.
  domains: names.
  step: of the run.
  arrays: {name of a tensor: array}, see the head of this file.
  """

  layers: Mapping[str, Mapping[str, int]]
  domains: tuple[str, ...]
  step: int
  arrays: Mapping[str, np.ndarray]


def check(model) -> None:
  """Raises ConfigError for a model whose tokens do not choose experts."""
  if not models.sublayers(model):
    raise ConfigError("a model without MoE layers has no experts to trace")
  if {p.sequence for p in models.sublayers(model).values()} != {"inputs"}:
    raise ConfigError(
      "a trace has the experts of one sequence of tokens, and this model has layers for"
      " several; leave out the trace"
    )
  for parts in models.sublayers(model).values():
    if parts.recipe.router.form is not TokenChoice:
      raise ConfigError(
        f'the router "{parts.recipe.router.spec.name}" gives tokens no experts of'
        " their own, so that there is nothing to trace; change model.moe.router"
      )


def routed(aux: Mapping, model, batch: int, lengths: Mapping) -> dict:
  """Returns {path: {"expert", "weight", "score"}} of a forward pass.

  The arrays are [R, B, L, K].

  Args:
    aux: of the model, called with collect="routing".
    model: from `models.build`.
    batch: B.
    lengths: of the task.
  """
  found = {}
  for path, parts in models.sublayers(model).items():
    of_layer = models.at(aux, path)
    choice = of_layer["choice"]
    arrays = {
      "expert": jnp.where(choice.valid_TK, choice.expert_TK, -1),
      "weight": jnp.where(choice.valid_TK, choice.weight_TK, 0),
      "score": jnp.where(choice.valid_TK, of_layer["score_TK"], 0),
    }
    shape = len(parts.numbers), batch, lengths[parts.sequence], -1
    found[path] = {k: x.reshape(shape) for k, x in arrays.items()}
  return found


def layers_of(sublayers: Mapping) -> dict[str, dict[str, int]]:
  """Returns `Trace.layers` of a model's `sublayers`."""
  layers = {
    f"{number:02d}": {
      "num_experts": parts.recipe.pool,
      "top_k": parts.recipe.router.top_k or parts.recipe.pool,
    }
    for parts in sublayers.values()
    for number in parts.numbers
  }
  return dict(sorted(layers.items()))


class Writer:
  """Gathers the rows of a trace, and writes them into a file."""

  def __init__(self, model, domains=()):
    """Starts a trace without rows.

    Args:
      model: whose choices are traced.
      domains: names of the domains of rows.

    Raises:
      ConfigError: as in `check`.
    """
    check(model)
    self._sublayers, self._domains = models.sublayers(model), tuple(domains)
    self._rows: dict[str, list] = {}

  def add(self, batch: Mapping, routing: Mapping) -> None:
    """Adds the rows of a batch.

    Args:
      batch: "inputs", "mask" [..., L] and, if it has it, "domain", on the host.
      routing: {path: arrays [A, R, B, L, K] or [R, B, L, K]}, from `routed`; A
        micro-batches.
    """
    length = np.shape(batch["inputs"])[-1]
    rows = {
      "token": np.asarray(batch["inputs"], np.int32).reshape(-1, length),
      "mask": np.asarray(batch["mask"], bool).reshape(-1, length),
    }
    count = len(rows["token"])
    domain = np.asarray(batch.get("domain", np.zeros(count)), np.int32)
    rows["domain"] = domain.reshape(-1)
    for path, parts in self._sublayers.items():
      for name, x in routing[path].items():
        x = np.asarray(x)
        x = x if x.ndim == 5 else x[None]
        for r, number in enumerate(parts.numbers):
          of_layer = x[:, r].reshape(count, length, x.shape[-1])
          rows[f"{number:02d}/{name}"] = of_layer
    for name, x in rows.items():
      self._rows.setdefault(name, []).append(x)

  def save(self, path: str | pathlib.Path, step: int = 0) -> None:
    """Writes the file, whole or not at all, and forgets the rows.

    Args:
      path: the file.
      step: of the run.
    """
    save = _safetensors().numpy.save

    facts = {
      "layers": layers_of(self._sublayers),
      "domains": self._domains,
      "step": step,
    }
    arrays = {k: np.concatenate(x) for k, x in self._rows.items()}
    files.write_bytes(path, save(arrays, {HEADER: json.dumps(facts)}))
    self._rows = {}


def _safetensors():
  """Returns the library safetensors.

  Raises:
    ConfigError: it is not installed.
  """
  try:
    import safetensors.numpy
  except ImportError:
    raise ConfigError(
      "router traces need the extra hf: pip install 'moe_jax[hf]'"
    ) from None
  return safetensors


def load(path: str | pathlib.Path) -> Trace:
  """Returns the trace in a file.

  Raises:
    ConfigError: it cannot be read, or is no trace.
  """
  library = _safetensors()
  try:
    with library.safe_open(path, "numpy") as f:
      facts = json.loads((f.metadata() or {})[HEADER])
      arrays = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    layers = {
      layer: {name: int(sizes[name]) for name in ("num_experts", "top_k")}
      for layer, sizes in facts["layers"].items()
    }
    trace = Trace(layers, tuple(facts["domains"]), int(facts["step"]), arrays)
    _check_arrays(trace)
    return trace
  except (
    *(OSError, library.SafetensorError),
    *(AttributeError, KeyError, ValueError, TypeError),
  ) as e:
    why = "a folder" if pathlib.Path(path).is_dir() else first_line(e)
    raise ConfigError(
      f"{path} is no router trace ({why}); make one with"
      " moe-jax evaluate --trace=FILE, or the hook trace"
    ) from None


def _check_arrays(trace):
  """Raises ValueError for arrays that the head of this file does not describe."""
  rows = trace.arrays["token"].shape
  if len(rows) != 2 or not trace.layers:
    raise ValueError(f"{len(trace.layers)} layers and tokens of shape {rows}")
  # Shape, kind of numbers, and the ends of their range.
  wanted = {
    "token": (rows, "i", 0, _MOST),
    "mask": (rows, "b", 0, 1),
    "domain": (rows[:1], "i", 0, (len(trace.domains) or _MOST) - 1),
  }
  for layer, sizes in trace.layers.items():
    shape = (*rows, sizes["top_k"])
    wanted[f"{layer}/expert"] = shape, "i", -1, sizes["num_experts"] - 1
    for name in ("weight", "score"):
      wanted[f"{layer}/{name}"] = shape, "f", -np.inf, np.inf
  for name, (shape, kind, least, most) in wanted.items():
    x = trace.arrays[name]
    if x.shape != shape or x.dtype.kind != kind:
      raise ValueError(f"{name} is {x.dtype} {x.shape}, not {kind} {shape}")
    if not ((x >= least) & (x <= most)).all():
      raise ValueError(f"{name} has values outside of [{least}, {most}]")
  for layer in trace.layers:
    x = np.sort(trace.arrays[f"{layer}/expert"])
    if ((x[..., 1:] == x[..., :-1]) & (x[..., 1:] >= 0)).any():
      raise ValueError(f"{layer}/expert has an expert twice for a token")
  if not trace.arrays["mask"].any():
    raise ValueError("all its tokens are padding")


# The analyses are those of OLMoE (2409.02060, 5.1 to 5.4), by layer.


def analysis(late: Trace, early: Trace | None = None) -> dict:
  """Returns all analyses of a trace as lists and numbers, by layer.

  Args:
    late: the trace.
    early: a trace of the same tokens, for saturation; None: without it.
  """
  vocab_size = int(late.arrays["token"].max()) + 1
  lists = lambda shares: {k: x.tolist() for k, x in shares.items()}  # noqa: E731
  facts = {
    "layers": dict(late.layers),
    "domains": list(late.domains),
    "tokens": int(late.arrays["mask"].sum()),
    "experts_per_token": {
      layer: float(one_hot_NE.sum(1).mean())
      for layer, one_hot_NE in _one_hot(late)
    },
    "coactivation": lists(coactivation(late)),
    "by_domain": lists(by_domain(late)),
    "vocabulary": vocabulary(late, vocab_size),
  }
  if early is not None:
    facts["saturation"] = saturation(early, late)
  return facts


def saturation(early: Trace, late: Trace) -> dict[str, float]:
  """Returns {layer: mean share of a token's experts that both traces have}.

  |chosen early and late| / |chosen late|, over the tokens that are no padding
  and have an expert; K is below the line in OLMoE's definition (5.1), where all
  tokens have K experts.

  Args:
    early, late: traces of two checkpoints, of the same tokens.

  Raises:
    ConfigError: the traces are of other layers or tokens.
  """
  same = early.layers == late.layers
  if not same or not _equal(early.arrays["token"], late.arrays["token"]):
    raise ConfigError(
      "saturation is between two traces of the same layers and tokens, and these"
      " are not: trace two checkpoints of a run on the same text"
    )
  real = late.arrays["mask"]
  shares = {}
  for layer in late.layers:
    a, b = (trace.arrays[f"{layer}/expert"][real] for trace in (early, late))
    both = ((a[:, :, None] == b[:, None, :]) & (a >= 0)[:, :, None]).sum((1, 2))
    own = (b >= 0).sum(1)
    shares[layer] = float((both[own > 0] / own[own > 0]).mean())
  return shares


def coactivation(trace: Trace) -> dict[str, np.ndarray]:
  """Returns {layer: share_EE}: the share of expert i's tokens that j has too.

  Rows of experts without a token are 0, and so is the diagonal (5.2).
  """
  shares = {}
  for layer, one_hot_NE in _one_hot(trace):
    together_EE = one_hot_NE.T @ one_hot_NE
    count_E = together_EE.diagonal().copy()
    np.fill_diagonal(together_EE, 0)
    shares[layer] = together_EE / np.maximum(count_E, 1)[:, None]
  return shares


def by_domain(trace: Trace) -> dict[str, np.ndarray]:
  """Returns {layer: the share of a domain's tokens that an expert has} (5.3).

  The shares are [domains, E]. Domains have indices in the trace, and names if
  the task has them.
  """
  length = trace.arrays["token"].shape[1]
  number_N = np.repeat(trace.arrays["domain"], length)[_real(trace)]
  found = int(number_N.max(initial=0)) + 1
  return _by_value(trace, number_N, max(len(trace.domains), found))


def by_token(trace: Trace, vocab_size: int) -> dict[str, np.ndarray]:
  """Returns {layer: share of an id's tokens that an expert has}, [V, E] (5.4).

  Args:
    trace: from `load`.
    vocab_size: V.
  """
  number_N = trace.arrays["token"].reshape(-1)[_real(trace)]
  return _by_value(trace, number_N, vocab_size)


def vocabulary(
  trace: Trace, vocab_size: int, least: int = 8
) -> dict[str, float]:
  """Returns {layer: how far the token id decides the expert}.

  It is the largest share that an expert has of an id, mean over ids that are
  seen `least` times or more, weighted by how often; 0 without such an id. It is
  1 where the id decides, and at least a token's mean number of experts over the
  number of experts.

  Args:
    trace: from `load`.
    vocab_size: V.
    least: the least number of times that an id is seen.
  """
  count_V = np.bincount(
    trace.arrays["token"].reshape(-1)[_real(trace)], minlength=vocab_size
  )
  seen = count_V >= least
  if not seen.any():
    return dict.fromkeys(trace.layers, 0.0)
  return {
    layer: float(np.average(share_VE[seen].max(1), weights=count_V[seen]))
    for layer, share_VE in by_token(trace, vocab_size).items()
  }


def _real(trace):
  """Whether tokens are no padding, bool, flat."""
  return trace.arrays["mask"].reshape(-1)


def _equal(a, b):
  return a.shape == b.shape and (a == b).all()


def _one_hot(trace):
  """Yields (layer, whether each unpadded token has each expert), as floats."""
  for layer, sizes in trace.layers.items():
    chosen = trace.arrays[f"{layer}/expert"]
    chosen = chosen.reshape(-1, chosen.shape[-1])[_real(trace)]
    # The last column takes the choices that were not made.
    one_hot_NE = np.zeros((len(chosen), sizes["num_experts"] + 1))
    np.put_along_axis(one_hot_NE, chosen.astype(int), 1, axis=1)
    yield layer, one_hot_NE[:, :-1]


def _by_value(trace, number_N, values):
  """{layer: share [values, E] of the tokens with each value}."""
  count = np.bincount(number_N, minlength=values)
  shares = {}
  for layer, one_hot_NE in _one_hot(trace):
    sums = np.zeros((values, one_hot_NE.shape[1]))
    np.add.at(sums, number_N, one_hot_NE)
    shares[layer] = sums / np.maximum(count, 1)[:, None]
  return shares
