"""A training step of a decoder with experts, beside its dense twin, in bfloat16.

The decoder has 113 million active parameters and 16 experts, of which a token
takes 2; the twin's dense layers are as wide as 2 experts, so that both have the
same active FLOPs.
"""

import statistics

import jax

from benchmarks import timing, tuning
from configs import base, tiny
from moe_jax.training.planning import chips
from moe_jax.training.program import Program

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
  c.train.check_mesh = False  # The part `right` has checked it already.
  c.model.d_ff = c.model.moe.top_k * c.model.moe.d_expert
  c.model.moe.balancers = {"bias": {"name": "bias", "rate": 1e-3}}
  if arm == "dense":
    c.model.pattern = ("dense",)
  elif arm == "sorted":
    c.model.moe.update(dispatcher={"name": "sorted"}, capacity_factor=None)
  else:
    c.model.moe.capacity_factor = 1.25
  return c


def measure(toy: bool, rounds: int = 5) -> list[dict]:
  """A row of the result for each arm; their steps are timed in turn."""
  programs, steps, ready = {}, {}, {}
  for arm in ARMS[:2] if toy else ARMS:
    made = {}
    programs[arm] = program = Program(config(arm, toy), compiled=made)
    ((_, steps[arm], *_),) = made.values()
    ready[arm] = _step(program)
  seconds = tuning.interleaved(ready, rounds)
  return [
    _row(arm, programs[arm], steps[arm], seconds[arm], seconds["dense"])
    for arm in programs
    if {arm, "dense"} <= set(seconds)
  ]


def _step(program):
  """A call that takes a step from where the last one ended."""
  state = [program.init(jax.random.key(0))]
  batch = program.put(program.batches(0)[0])

  def step():
    state[0], sums = program.train_step(state[0], batch)
    return state[0], sums

  return step


def _row(arm, program, step, seconds, dense):
  facts, plan = program.facts(), step.memory_analysis()
  rate = facts["tokens_per_step"] / statistics.median(seconds)
  chip = chips.of_device(jax.devices()[0].device_kind)
  peak = chip and chip.flops
  used = rate * facts["train_flops_per_token"] / jax.device_count()
  sizes = ("argument", "output", "temp")
  planned = sum(getattr(plan, f"{k}_size_in_bytes") for k in sizes)
  speeds = [other / one for one, other in zip(seconds, dense)]
  return {
    "stage": "step",
    "arm": arm,
    "active_parameters": facts["parameters"]["active"],
    "tokens_per_step": facts["tokens_per_step"],
    "seconds_per_step": statistics.median(seconds),
    "tokens_per_second": rate,
    "flops_per_second": used,
    "mfu": used / peak if peak else None,
    # The state is given back in the memory that it came in.
    "planned_bytes": planned - plan.alias_size_in_bytes,
    "chosen": facts["grouped_matmul_chosen"],
    **timing.summary("relative_speed", speeds),
  }
