"""The same step on a mesh and without one, and the same run stopped and not."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax import main, models
from moe_jax.core import parallel
from moe_jax.training import checkpoint, loop, train_step
from tests import small


def stepped(c, task_of, sizes=None):
  """(parameters, sums) after a step from a start that depends on the config alone.

  Args:
    c: a config.
    task_of: (mesh) -> its task.
    sizes: of a mesh; None: one device.
  """
  mesh = sizes and parallel.make_mesh(sizes)
  task = task_of(mesh)
  model = models.build(c.model, mesh=mesh, **task.given)
  batches = {"rows": c.data.batch_size // c.train.accumulation}
  lengths = models.lengths(model, task.lengths)
  models.check(model, lengths=lengths, batches=batches, mesh=mesh)
  init, step = small.training(c, model, task, mesh)
  state = jax.jit(lambda rng: nn.unbox(init(rng)))(jax.random.key(0))
  rng = np.random.default_rng(1)
  # Outputs may begin at zero, which would hide the gradients of all else.
  moved = lambda x: jnp.asarray(x + rng.normal(0, 0.1, x.shape))  # noqa: E731
  state = state.replace(params=jax.tree.map(moved, state.params))
  if mesh is not None:
    boxed = jax.eval_shape(init, jax.random.key(0))
    state = jax.device_put(state, train_step.shardings(boxed, mesh))
  batch = {k: x for k, x in task.train(3, None)[5].items() if k in task.spec}
  state, sums = jax.jit(step)(state, batch, train_step.numbers(c, model))
  return jax.device_get((state.params, sums))


def check_stopped(flags, tmp_path, at=8):
  """Bit for bit: parameters and lines, from a checkpoint in the middle.

  Args:
    flags: of a run of more steps than `at`.
    tmp_path: a folder of the test.
    at: the step in which the second run is stopped.
  """
  folders = tmp_path / "whole", tmp_path / "twice"
  main.main([*flags, f"--workdir={folders[0]}"])
  steps, step = [], loop.take_step

  def until(*args, **kwargs):
    steps.append(1)
    if len(steps) == at:
      raise KeyboardInterrupt
    return step(*args, **kwargs)

  with pytest.MonkeyPatch.context() as m:
    m.setattr(loop, "take_step", until)
    with contextlib.suppress(KeyboardInterrupt):
      main.main([*flags, f"--workdir={folders[1]}"])
  assert len(steps) == at, "it was not stopped"
  main.main([*flags, f"--workdir={folders[1]}"])
  one, two = map(checkpoint.load_params, folders)
  jax.tree.map(np.testing.assert_array_equal, one, two)
  assert lines(folders[0]) == lines(folders[1])


def lines(folder):
  """The lines of metrics.jsonl, without times."""
  rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
  return [
    {k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows
  ]
