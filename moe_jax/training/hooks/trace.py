"""Writes a router trace of a step: the experts that every token chose.

The step itself returns its choices, so that the trace has the numbers that were
trained on; `task.replay` can force them in another run.
"""

import jax

from moe_jax.core.errors import ConfigError
from moe_jax.training import hooks, traces

COLLECTS = True


def build(run: hooks.Run) -> hooks.Hook:
  """Returns a hook that writes WORKDIR/trace/STEP.safetensors, see `traces`.

  Args:
    run: of the hook.

  Raises:
    ConfigError: several processes run together, or the model has no choices.
  """
  if jax.process_count() > 1:
    raise ConfigError(
      "the hook trace writes all rows of a batch, of which a process of several"
      " has only some; run it in one process"
    )
  if run.program is not None:
    traces.check(run.program.model)

  def write(state, step, metrics):
    del state
    program = run.program
    writer = traces.Writer(program.model, program.task.domains)
    writer.add(metrics["batch"], metrics["routing"])
    folder = run.folder / "trace"
    folder.mkdir(exist_ok=True)
    writer.save(folder / f"{step:08d}.safetensors", step)

  return write
