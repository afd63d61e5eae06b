"""Other places for a run's metrics, beside metrics.jsonl, which is the truth.

The library of each writer is imported when a config names it, and comes with
the extra of the writer's name.
"""

import hashlib
import importlib
from collections.abc import Callable
from typing import NamedTuple

from moe_jax.core.errors import ConfigError, first_line
from moe_jax.core.options import items, word


class Writer(NamedTuple):
  """The functions of a writer.

  log: (step, split, metrics) -> None, takes a line of metrics.
  image: (step, name, pixels) -> None, takes bytes [height, width, 3].
  close: () -> None, ends it.
  link: the page on which its metrics are shown; None: there is no page.
  """

  log: Callable
  image: Callable
  close: Callable
  link: str | None = None


def _tensorboard(config, path, step):
  """Event files in the work directory, for `tensorboard --logdir`."""
  import tensorboardX

  del config
  # Events after the restored step come from a process that was stopped.
  writer = tensorboardX.SummaryWriter(
    str(path / "tensorboard"),
    purge_step=step + 1,
    # Names of files have the second, in which a run may stop and go on.
    filename_suffix=f".{step}",
  )

  def log(step, split, metrics):
    for name, value in metrics.items():
      writer.add_scalar(f"{split}/{name}", value, step)

  def image(step, name, pixels):
    writer.add_image(name, pixels, step, dataformats="HWC")

  return Writer(log, image, writer.close)


def _wandb(config, path, step):
  """A run of Weights & Biases with the name of the work directory.

  It goes on under the same id. wandb's own environment variables, such as
  WANDB_PROJECT and WANDB_MODE, decide whether and where it is uploaded.
  """
  import wandb

  del step
  path = path.resolve()
  run = wandb.init(
    dir=str(path),
    name="/".join(path.parts[-3:]).lstrip("/"),
    # Letters and digits that stay the same when the run goes on.
    id=hashlib.sha256(str(path).encode()).hexdigest()[:16],
    resume="allow",
    config=config.to_dict(),
  )

  def log(step, split, metrics):
    run.log({f"{split}/{k}": v for k, v in metrics.items()}, step=step)

  def image(step, name, pixels):
    run.log({name: wandb.Image(pixels)}, step=step)

  return Writer(log, image, run.finish, run.url)


# {name: (function that begins it, its library)}.
KNOWN = {
  "tensorboard": (_tensorboard, "tensorboardX"),
  "wandb": (_wandb, "wandb"),
}
NAMES = items(word(*KNOWN))


def check(names) -> None:
  """Raises ConfigError for an unknown writer, or one without its library."""
  NAMES.check(names, "writers")
  for name in names:
    library = KNOWN[name][1]
    try:
      importlib.import_module(library)
    except ImportError:
      raise ConfigError(
        f'the writer "{name}" needs the package {library}; run: pip install'
        f" 'moe_jax[{name}]'"
      ) from None


def begin(config, path, step: int) -> list[Writer]:
  """Begins the writers that a config names.

  Args:
    config: of the run.
    path: the work directory.
    step: that the run goes on from.

  Raises:
    ConfigError: a writer cannot begin, without a network for instance.
  """
  begun = []
  for name in config.writers:
    begin_one, library = KNOWN[name]
    try:
      begun.append(begin_one(config, path, step))
    except Exception as e:  # The library may raise anything.
      raise ConfigError(
        f'the writer "{name}" cannot begin ({first_line(e)}); see what'
        f" {library} asks for, or leave it out of writers"
      ) from e
  return begun
