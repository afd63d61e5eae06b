"""Hooks by name: functions that see a run every n steps and log something.

A hook is called as hook(state, step, metrics) by the training loop when the
metrics of a step are known, if `every` divides the number of the step. It
changes no number of the run.

state: the `TrainState` after the step. Its buffers are reused by the next step,
  so a hook copies what it keeps.
step: the number of steps done. After a kill, steps since the last checkpoint
  are computed again, and hooks see them again.
metrics: {name: number} of this step, with the names of metrics.jsonl, and
  "tokens_per_expert": {layer: assignments to each expert}, on the host. A step
  that was not applied may have NaN.

A file with COLLECTS = True gets two more metrics: "routing", the experts that
every token chose (`traces.routed`, with a leading axis of micro-batches), and
"batch", the step's batch on the host. If it is among a run's hooks, every step
returns them.

Where several processes run together, all of them call every hook at the same
steps, with the same metrics and the same distributed state, so that a hook may
run a computation over the mesh. Only the first one writes files, see
`processes.is_first`.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moe_jax.core import registry
from moe_jax.core.errors import ConfigError
from moe_jax.core.options import integer, labelled, part, shown

Hook = Callable[[Any, int, Mapping[str, Any]], None]
OPTIONS = labelled(part())


class Run(NamedTuple):
  """The run of a hook; each hook is built with it as `run`.

  folder: the work directory, for files of the hook.
  program: the `Program`, with the run's config, mesh, task and model.
  show: (step, name, bytes [height, width, 3]) -> None, see `RunDirectory.show`.
  """

  folder: pathlib.Path
  program: Any
  show: Callable[[int, str, Any], None] = lambda *picture: None


def check(config) -> None:
  """Raises ConfigError for an unknown hook or option, or a wrong value."""
  for label in config.train.hooks:
    _resolved(config, label, None)


def build(config, run: Run) -> list[tuple[int, Hook]]:
  """Returns the hooks in `train.hooks` of a config, each with its `every`.

  Args:
    config: see `configs/base.py`.
    run: the argument of all hooks.

  Raises:
    ConfigError: as in `check`; or a file's `build` returned no function.
  """
  made = []
  for label in config.train.hooks:
    every, spec = _resolved(config, label, run)
    hook = spec.build(**spec.options)
    if not callable(hook):
      raise ConfigError(
        f"hooks/{spec.name}: build(...) returned {shown(hook)}, not a function;"
        f" see {__name__}"
      )
    made.append((every, hook))
  return made


def of_run(program, directory) -> list[tuple[int, Hook]]:
  """Returns the hooks of a program that runs; raises as `build`.

  Args:
    program, directory: the `Program`, and its `RunDirectory`.
  """
  return build(program.config, Run(directory.path, program, directory.show))


def collects(config) -> bool:
  """Whether a hook asks for the tokens' choices."""
  names = {own["name"] for own in config.train.hooks.values()}
  return any(
    getattr(registry.find("hooks", name, config.plugins), "COLLECTS", False)
    for name in names
  )


def _resolved(config, label, run):
  """(every, checked Spec) of a hook."""
  key, options = f"train.hooks.{label}", dict(config.train.hooks[label])
  every = options.pop("every", None)
  integer(1).check(every, f"{key}.every")
  plugins = config.plugins
  return every, registry.spec("hooks", options, key, plugins=plugins, run=run)
