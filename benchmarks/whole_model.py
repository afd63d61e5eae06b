"""A training step of a decoder with experts, beside its dense twin, in bfloat16.

The decoder has 113 million active parameters and 16 experts, of which a token
takes 2; the twin's dense layers are as wide as 2 experts, so that both have the
same active FLOPs.
"""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from benchmarks import timing, tuning
from configs import base, tiny
from moe_jax.core import parallel
from moe_jax.models import counts
from moe_jax.moe import kernels
from moe_jax.training import program, train_step
from moe_jax.training.planning import chips

ARMS = ("dense", "sorted", "gather, capacity 1.25")


def config(arm: str, toy: bool):
  """The config of an arm; at toy size it is configs/tiny.py."""
  c = tiny.get_config() if toy else base.get_config()
  if toy:
    c.model.num_layers = 1
    c.model.moe.grouped_matmul = "gpu"
  else:
    c.data.seq_len, c.data.batch_size = 512, 32
    c.model.update(d_model=768, num_layers=12, num_heads=12, num_kv_heads=12)
    c.model.head_dim = 64
    c.model.moe.update(num_experts=16, d_expert=1536)
    c.model.dtype = "bfloat16"
  c.model.d_ff = c.model.moe.top_k * c.model.moe.d_expert
  c.model.moe.balancers = {"bias": {"name": "bias", "rate": 1e-3}}
  if arm == "dense":
    c.model.pattern = ("dense",)
  elif arm == "sorted":
    c.model.moe.update(dispatcher={"name": "sorted"}, capacity_factor=None)
  else:
    c.model.moe.capacity_factor = 1.25
  return c


class Arm(NamedTuple):
  """config, task, model: of the run; sizes: numbers of parameters; step: the
  compiled training step; run: takes a step from where the last one ended."""

  config: Any
  task: Any
  model: Any
  sizes: dict
  step: Any
  run: Callable


def measure(toy: bool, rounds: int = 5) -> list[dict]:
  """A row of the result for each arm; their steps are timed in turn."""
  arms = {arm: prepare(config(arm, toy)) for arm in ARMS[: 2 if toy else 3]}
  runs = {name: arm.run for name, arm in arms.items()}
  seconds = tuning.interleaved(runs, rounds)
  return [
    _row(name, arm, seconds[name], seconds["dense"])
    for name, arm in arms.items()
    if {name, "dense"} <= set(seconds)
  ]


def prepare(config) -> Arm:
  """The compiled training step of a config, and its first state and batch."""
  mesh, task, model = program.build(config)
  numbers = train_step.numbers(config, model)
  functions = program.functions(config, mesh, task, model, numbers)
  state = [functions.init.function(jax.random.key(0))]
  made = functions.train_step
  step = made.function.lower(*made.arguments).compile()
  batch = task.train(0, None)[0]
  batch = {k: jax.numpy.asarray(batch[k]) for k in task.spec}

  def run():
    state[0], sums = step(state[0], batch, numbers)
    return state[0], sums

  return Arm(config, task, model, functions.sizes, step, run)


def _row(name, arm, seconds, dense):
  plan, tokens = arm.step.memory_analysis(), arm.config.data.batch_size
  tokens *= sum(arm.task.lengths.values())
  rate = tokens / statistics.median(seconds)
  chip = chips.of_device(jax.devices()[0].device_kind)
  peak = chip and chip.flops
  flops = counts.train_flops_per_token(arm.model, arm.sizes, arm.task.lengths)
  used = rate * flops
  planned = sum(
    getattr(plan, f"{k}_size_in_bytes") for k in ("argument", "output", "temp")
  )
  backend = kernels.backend_for(
    parallel.platform(None), arm.config.model.moe.grouped_matmul
  )
  speeds = [other / one for one, other in zip(seconds, dense)]
  return {
    "stage": "step",
    "arm": name,
    "active_parameters": arm.sizes["active"],
    "tokens_per_step": tokens,
    "seconds_per_step": statistics.median(seconds),
    "tokens_per_second": rate,
    "flops_per_second": used,
    "mfu": used / peak if peak else None,
    # The state is given back in the memory that it came in.
    "planned_bytes": planned - plan.alias_size_in_bytes,
    "chosen": kernels.chosen(backend),
    **timing.summary("relative_speed", speeds),
  }
