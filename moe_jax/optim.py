"""Optimizers and learning-rate schedules, from optax."""

from collections.abc import Mapping

import jax
import optax

from moe_jax.errors import ConfigError, did_you_mean

_NO_DECAY = ("scale", "_bias", "embedding")


def build(config: Mapping, num_steps: int) -> optax.GradientTransformation:
  """The optimizer of the section `optim` of a config.

  Args:
    config: see `configs/base.py`.
    num_steps: length of the run, the end of the schedule.
  """
  learning_rate = schedule(config, num_steps)
  clip = optax.identity()
  if config["clip_norm"] is not None:
    if config["clip_norm"] <= 0:
      raise ConfigError(
        f"optim.clip_norm = {config['clip_norm']} is not above 0; None turns"
        " clipping off"
      )
    clip = optax.clip_by_global_norm(config["clip_norm"])
  known = {
    "adamw": lambda: optax.adamw(
      learning_rate,
      b1=config["b1"],
      b2=config["b2"],
      eps=config["eps"],
      weight_decay=config["weight_decay"],
      mask=decayed,
    ),
    "sgd": lambda: optax.sgd(learning_rate),
  }
  if config["name"] not in known:
    raise ConfigError(
      f'there is no optimizer "{config["name"]}"'
      + did_you_mean(config["name"], known)
    )
  return optax.chain(clip, known[config["name"]]())


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

  def one(path, leaf):
    name = path[-1].key if hasattr(path[-1], "key") else path[-2].key
    return not name.endswith(_NO_DECAY)

  return jax.tree_util.tree_map_with_path(one, params)
