"""The training loop: one seed from its first step to its final metrics."""

import time

import jax

from moe_jax import (
  evaluate,
  grouped_matmul,
  metrics,
  parallel,
  params,
  run_directory,
)
from moe_jax.program import Program
from moe_jax.progress import Progress
from moe_jax.types import Mean


def train_and_evaluate(config, workdir) -> dict[str, float]:
  """One run from a config: builds, trains, evaluates, writes the run's files.

  Args:
    config: see `configs/base.py`.
    workdir: the run's folder.

  Returns:
    The final metrics of the validation split.

  Raises:
    ConfigError: impossible values, or a folder that holds a run already.
  """
  directory = run_directory.RunDirectory(workdir, config)
  program = Program(config)
  progress = Progress(config.train.num_steps, "steps")
  return run(program, config.seed, directory, progress)


def run(program: Program, seed: int, directory, progress) -> dict[str, float]:
  """Trains one seed with a program.

  Args:
    program: compiled functions; shared by all seeds.
    seed: of the parameters, the data's order and the router's noise.
    directory: RunDirectory to write to.
    progress: Progress, told of every step.

  Returns:
    The final metrics of the validation split.
  """
  config = program.config
  directory.describe(
    seed=seed,
    data=program.corpus.fingerprint,
    data_sources=program.corpus.sources,
    mesh=program.mesh_shape,
    grouped_matmul=grouped_matmul.backend_for(parallel.platform(program.mesh))
    if config.model.moe.grouped_matmul is None
    else config.model.moe.grouped_matmul,
    recipe=params.describe(config.model, config.plugins),
    parameters=params.count(program.model, config.data.seq_len),
    compile_seconds=program.compile_seconds,
  )
  state, stream = program.init(jax.random.key(seed)), program.batches(seed)
  every, end = config.eval.every or config.train.num_steps, 0
  while end < config.train.num_steps:
    start, end = end, min(end + every, config.train.num_steps)
    state = take_steps(
      program, state, stream, range(start, end), directory, progress
    )
    final = program.evaluate(state)
    directory.log(end, "validation", final)
  return final


def take_steps(
  program: Program, state, stream, steps: range, directory, progress
):
  """Trains for some steps; every `train.log_every` of them writes a line.

  A line is written while the devices compute the step after it.

  Args:
    program, directory, progress: as in `run`.
    state: TrainState before the first step.
    stream: batches by step.
    steps: which steps, counted from 0.

  Returns:
    TrainState after the last step.
  """
  pending, full, since = [], [], time.monotonic()

  def write(done, sums):
    nonlocal since
    sums = jax.device_get(sums)
    found = step_metrics(sums, program.model.arch)
    tokens = sum(float(s["loss"].weight) for s in sums)
    found["tokens_per_second"] = tokens / (time.monotonic() - since)
    since = time.monotonic()
    directory.log(done, "train", found)
    note = f"loss {found['loss']:.3f}"
    if "max_vio" in found:
      note += f", max_vio {found['max_vio']:.2f}"
    progress.update(len(sums), note)

  for step in steps:
    state, sums = program.train_step(state, program.put(stream[step]))
    if full:  # Now that the devices have something to do.
      write(step, full)
      full = []
    pending.append(sums)
    if (step + 1) % program.config.train.log_every == 0:
      pending, full = [], pending
  if full or pending:
    write(steps.stop, full or pending)
  return state


def step_metrics(steps: list[dict], arch) -> dict[str, float]:
  """Metrics of several steps: each computed per step, then averaged.

  Args:
    steps: what `train_step` returned for each, on the host.
    arch: of the model.
  """
  found = []
  for sums in steps:
    means = evaluate.loss_means(sums)
    means["grad_norm"] = Mean(float(sums["grad_norm"]), 1.0)
    means["aux_loss"] = Mean(float(sums["aux_loss"]), 1.0)
    if arch.recipe is not None:
      layers = metrics.by_layer(sums["stats"], arch.segments)
      means |= metrics.routing(layers, arch.recipe.router.top_k)
      means["bias_range"] = metrics.bias_range(sums["balance"])
      floor = metrics.max_vio_floor(
        int(sums["loss"].weight),
        arch.recipe.num_experts,
        arch.recipe.router.top_k,
      )
      means["max_vio_floor"] = Mean(floor, 1.0)
    found.append(means)
  return metrics.divide(metrics.add_up(found))
