"""More steps for a run whose steps so far are the first ones of a longer run.

With the schedules "constant" and "rsqrt" all of them are. With "wsd" those
before the decay are: the run goes on from the last checkpoint before it, and
all files since then become a run of its own, in a folder inside. With "cosine"
none are.
"""

import pathlib
import shutil
import sys
from collections.abc import Sequence

from moe_jax.core import files
from moe_jax.core.errors import ConfigError
from moe_jax.training import checkpoint
from moe_jax.training.optimizers import schedules

KEY = "config.train.num_steps"
# Checkpoints are moved, the lock is of this process, and runs that were set aside
# before stay where they are.
_NOT_COPIED = (".lock", "*checkpoints", "*run_of_*_steps*")


def extend(
  path: pathlib.Path, before: int, config, lines: Sequence[dict]
) -> None:
  """Makes a run's folder one that goes on to more steps, or refuses to.

  It may be killed at any moment, and called again.

  Args:
    path: the work directory, which nobody else uses meanwhile.
    before: `train.num_steps` so far.
    config: of the run, with another `train.num_steps`.
    lines: of metrics.jsonl.

  Raises:
    ConfigError: fewer steps, or steps that no longer run has and that cannot be
      taken back.
    RunError: the folder cannot be written to.
  """
  steps = config.train.num_steps
  about = f"{path} holds a run of {before} steps, and {KEY} is now {steps}"
  folders = checkpoint.newest_first(path / "checkpoints")
  there = [int(folder.name) for folder in folders]
  done = max([*there, *(line["step"] for line in lines)], default=0)
  if steps < before and done > (
    schedules.steps_of_longer(config.optim, steps) or 0
  ):
    raise ConfigError(
      f"{about}, but {done} steps are done; give {before} or more, or choose another"
      " --workdir"
    )
  shared = schedules.steps_of_longer(config.optim, before)
  another = f"start another run with --config.init_from={path}"
  if shared is None:
    raise ConfigError(
      f"{about}, but with optim.schedule = {config.optim.schedule} the learning rate of"
      f" every step depends on that number; give {before}, or {another} and the"
      " schedule constant or wsd, with which a run can get more steps"
    )
  kept = [step for step in there if step <= shared]
  if kept or (done <= shared and done < before):
    if done > shared:
      _set_aside(path, before, folders[: len(there) - len(kept)])
    print(
      f"{path} goes from {before} to {config.train.num_steps} steps",
      file=sys.stderr,
    )
    return
  decays = f"its learning rate decays after step {shared}, and "
  raise ConfigError(
    f"{about}, but {decays if shared < before else ''}no checkpoint of step {shared} or"
    f" before is there; bring one back, or {another} (checkpoint.every and"
    " checkpoint.keep_every say which ones are kept)"
  )


def _set_aside(path, before, folders):
  """Makes a separate run of all that a run has so far.

  Args:
    path: the work directory.
    before: its number of steps.
    folders: the checkpoints that are to leave it.
  """
  aside = path / f"run_of_{before}_steps"
  for killed in path.glob(".run_of_*"):  # Copies that were never whole.
    shutil.rmtree(killed, ignore_errors=True)
  with files.writing(aside):
    # The folder is there if a process was killed at this point.
    if not aside.exists():
      ignored = shutil.ignore_patterns(*_NOT_COPIED)
      with files.whole_folder(aside) as whole:
        options = {"symlinks": True, "dirs_exist_ok": True}
        shutil.copytree(path, whole, ignore=ignored, **options)
    (aside / "checkpoints").mkdir(exist_ok=True)
    for folder in folders:
      folder.rename(aside / "checkpoints" / folder.name)
  print(f"the run of {before} steps is kept in {aside}", file=sys.stderr)
