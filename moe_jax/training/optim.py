"""Optimizers and learning-rate schedules, from optax.

An update is a direction (of AdamW, Adafactor, Muon or SGD), plus decoupled
weight decay, times a learning rate. Matrices are those of one layer and one
expert: the axes of repeated layers and of experts are batch axes everywhere.
"""

import math
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
import optax

from moe_jax.core.errors import ConfigError, did_you_mean

LABELS = ("router", "experts", "rest")
_NO_DECAY = ("scale", "_bias", "embedding", "sinks")
_NO_MATRIX = ("embedding", "head")


def build(
  config: Mapping,
  num_steps: int,
  segments: Collection[str] = ("prefix", "decoder"),
) -> optax.GradientTransformation:
  """The optimizer of the section `optim` of a config.

  Args:
    config: see `configs/base.py`.
    num_steps: length of the run, the end of the schedule.
    segments: names of the model's segments (`Architecture.segments`): the
      leaves of their parameters begin with an axis of repeats.
  """
  _check_ranges(config)
  learning_rate = schedule(config, num_steps)
  clip = optax.identity()
  if config["clip_norm"] is not None:
    if config["clip_norm"] <= 0:
      raise ConfigError(
        f"optim.clip_norm = {config['clip_norm']} is not above 0; None turns"
        " clipping off"
      )
    clip = optax.clip_by_global_norm(config["clip_norm"])
  if config["name"] not in DIRECTIONS:
    raise ConfigError(
      f'there is no optimizer "{config["name"]}"'
      + did_you_mean(config["name"], DIRECTIONS)
    )
  rates, decays = (
    _factors(config, key)
    for key in ("learning_rate_factors", "weight_decay_factors")
  )
  decay = config["weight_decay"] if config["name"] != "sgd" else 0.0
  return optax.chain(
    clip,
    DIRECTIONS[config["name"]](config, segments),
    *(
      optax.add_decayed_weights(
        decay * decays[name],
        mask=lambda params, name=name: _decayed_of(params, name),
      )
      for name in LABELS
      if decay * decays[name]
    ),
    _scaled(rates),
    optax.scale_by_learning_rate(learning_rate),
  )


def _adamw(config, segments):
  del segments  # Element by element.
  return optax.scale_by_adam(config["b1"], config["b2"], config["eps"])


def _adafactor(config, segments):
  """1804.04235 without a relative step size: the schedule is the learning rate.

  Second moments are factored over rows and columns of matrices, updates
  clipped to a root mean square of 1 and scaled by that of the parameter.
  """
  del config
  one_leaf = optax.chain(
    optax.scale_by_factored_rms(),
    optax.clip_by_block_rms(1.0),
    optax.scale_by_param_block_rms(),
  )
  return per_matrix(one_leaf, segments)


def _muon(config, segments):
  """2502.16982: orthogonal directions for matrices, scaled to AdamW's size.

  Embedding, output layer, scales and biases are AdamW's.
  """
  from optax import contrib

  def kinds(params):
    return jax.tree_util.tree_map_with_path(
      lambda path, x: (
        "adamw" if matrix_axes(path, x, segments) is None else "muon"
      ),
      params,
    )

  def dimensions(updates):
    return jax.tree_util.tree_map_with_path(
      lambda path, x: contrib.MuonDimensionNumbers(
        *matrix_axes(path, x, segments)
      ),
      updates,
    )

  def like_adam(updates, params=None):
    del params

    def one(path, u):
      found = matrix_axes(path, u, segments)
      sides = ([u.shape[i] for i in axes] for axes in found)
      return 0.2 * math.sqrt(max(map(math.prod, sides))) * u

    return jax.tree_util.tree_map_with_path(one, updates)

  orthogonal = contrib.scale_by_muon(
    beta=config["b2"],
    eps=config["eps"],
    weight_dimension_numbers=dimensions,
  )
  muon = optax.chain(orthogonal, optax.stateless(like_adam))
  return optax.partition(
    {"muon": muon, "adamw": _adamw(config, segments)}, kinds
  )


DIRECTIONS = {
  "adamw": _adamw,
  "adafactor": _adafactor,
  "muon": _muon,
  "sgd": lambda config, segments: optax.identity(),
}


def label(path) -> str:
  """ "router", "experts" (routed ones) or "rest": which part a leaf is of."""
  keys = _keys(path)
  return next((x for x in LABELS if "moe" in keys and x in keys), "rest")


def batch_axes(path, segments: Collection[str]) -> int:
  """How many leading axes of a leaf are those of layers and of experts."""
  keys = _keys(path)
  return (keys[0] in segments) + (label(path) == "experts")


def matrix_axes(
  path, leaf, segments: Collection[str]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
  """(input axes, output axes) of a leaf's matrices; None if it has none."""
  first, keys = batch_axes(path, segments), _keys(path)
  axes = tuple(range(first, leaf.ndim))
  if len(axes) < 2 or keys[-1] in _NO_MATRIX or keys[-1].endswith("_bias"):
    return None
  inputs = len(axes) - 1 if keys[-2:] == ("attention", "out") else 1
  return axes[:inputs], axes[inputs:]


def per_matrix(
  transform: optax.GradientTransformation, segments: Collection[str]
):
  """A transform of one array, for every layer and expert of every leaf."""

  def lifted(f, path):
    for _ in range(batch_axes(path, segments)):
      f = jax.vmap(f)
    return f

  def init(params):
    return jax.tree_util.tree_map_with_path(
      lambda path, p: lifted(transform.init, path)(p), params
    )

  def update(updates, state, params):
    leaves, tree = jax.tree_util.tree_flatten_with_path(updates)
    found = [
      lifted(transform.update, path)(u, s, p)
      for (path, u), s, p in zip(
        leaves, tree.flatten_up_to(state), tree.flatten_up_to(params)
      )
    ]
    updates, state = zip(*found)
    return tree.unflatten(updates), tree.unflatten(state)

  return optax.GradientTransformation(init, update)


def _check_ranges(config):
  """Raises ConfigError for numbers that no optimizer takes."""
  for key, words, fits in (
    ("learning_rate", "0 or more", lambda x: 0 <= x < float("inf")),
    ("weight_decay", "0 or more", lambda x: 0 <= x < float("inf")),
    ("final_fraction", "between 0 and 1", lambda x: 0 <= x <= 1),
    ("b1", "from 0 to below 1", lambda x: 0 <= x < 1),
    ("b2", "from 0 to below 1", lambda x: 0 <= x < 1),
    ("eps", "above 0", lambda x: 0 < x < float("inf")),
  ):
    if not fits(config[key]):
      raise ConfigError(f"optim.{key} = {config[key]} is not {words}")


def _factors(config, key):
  factors = dict(config[key])
  for name, value in factors.items():
    if name not in LABELS:
      raise ConfigError(
        f'optim.{key} has no "{name}"' + did_you_mean(name, LABELS)
      )
    if value < 0:
      raise ConfigError(f"optim.{key}.{name} = {value} is negative")
  return {name: factors.get(name, 1.0) for name in LABELS}


def _scaled(rates):
  """Learning rates by part."""

  def update(updates, params=None):
    del params
    return jax.tree_util.tree_map_with_path(
      lambda path, u: u * jnp.asarray(rates[label(path)], u.dtype), updates
    )

  if set(rates.values()) == {1.0}:
    return optax.identity()
  return optax.stateless(update)


def _decayed_of(params, name):
  return jax.tree_util.tree_map_with_path(
    lambda path, flag: flag and label(path) == name, decayed(params)
  )


def _keys(path):
  """The names in a path."""
  return tuple(p.key for p in path if hasattr(p, "key"))


def schedule(config: Mapping, num_steps: int) -> optax.Schedule:
  """Linear warm-up to `learning_rate`, then one of

  "constant"; "cosine" down to `final_fraction` of it at the last step; "wsd":
  stable, then linear to `final_fraction` over the last `decay_steps`.
  """
  peak, warmup = config["learning_rate"], config["warmup_steps"]
  final = peak * config["final_fraction"]
  name, decay = config["schedule"], config["decay_steps"]
  if not 0 <= warmup < max(num_steps, 1):
    raise ConfigError(
      f"optim.warmup_steps = {warmup} is not between 0 and train.num_steps ="
      f" {num_steps}; change one of them"
    )
  rest = num_steps - warmup
  if name == "constant":
    after = optax.constant_schedule(peak)
  elif name == "cosine":
    after = optax.cosine_decay_schedule(
      peak, max(rest - 1, 1), config["final_fraction"]
    )
  elif name == "wsd":
    if not 0 < decay <= rest:
      raise ConfigError(
        f"optim.decay_steps = {decay} is not between 1 and the {rest} steps"
        " after the warm-up"
      )
    after = optax.join_schedules(
      [
        optax.constant_schedule(peak),
        optax.linear_schedule(
          peak * (1 - 1 / decay) + final / decay, final, max(decay - 1, 1)
        ),
      ],
      [rest - decay],
    )
  else:
    known = ("constant", "cosine", "wsd")
    raise ConfigError(
      f'there is no schedule "{name}"' + did_you_mean(name, known)
    )
  # Step s counts from 0: the first update already moves, the warm-up's last
  # one is at the peak.
  warm = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
  return optax.join_schedules([warm, after], [warmup])


def decayed(params):
  """True for the leaves that weight decay shrinks: no scales, no biases."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: not _keys(path)[-1].endswith(_NO_DECAY), params
  )
