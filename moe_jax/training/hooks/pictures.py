"""Shows the pictures that a task makes of its model.

The pictures are WORKDIR/pictures/NAME/STEP.png, and TensorBoard and W&B get
them where they are among the writers.
"""

import jax

from moe_jax.core.errors import ConfigError
from moe_jax.training import hooks


def build(run: hooks.Run) -> hooks.Hook:
  """Returns a hook that shows the task's pictures.

  Args:
    run: of the hook.

  Raises:
    ConfigError: several processes run together, or the task has no pictures.
  """
  if jax.process_count() > 1:
    raise ConfigError(
      "the hook pictures runs the model in one process alone, and there are several;"
      " leave it out"
    )
  program = run.program if run else None
  if program is not None and program.task.pictures is None:
    raise ConfigError(
      f"the task {program.config.task.name} has no pictures for train.hooks; leave the"
      " hook out"
    )

  def show(state, step, metrics):
    del metrics
    variables = {"params": state.params, "balance": state.balance}
    made = program.task.pictures(program.model, variables)
    for name, pixels in made.items():
      run.show(step, name, pixels)

  return show
