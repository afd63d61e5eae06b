"""Other places for a run's metrics, beside metrics.jsonl, which is the truth.

Each is a class with `log` and `close`; its library is imported when it is
asked for, and comes with the extra of the same name.
"""

import hashlib
import importlib
from collections.abc import Mapping

from moe_jax.core.errors import ConfigError, first_line
from moe_jax.core.options import items, word


class TensorBoard:
  """Event files in the work directory, for `tensorboard --logdir`."""

  library = "tensorboardX"

  def __init__(self, library, path, step, **_):
    # Events after the restored step are of a process that was stopped.
    self._writer = library.SummaryWriter(
      str(path / "tensorboard"), purge_step=step + 1
    )

  def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
    for name, value in metrics.items():
      self._writer.add_scalar(f"{split}/{name}", value, step)

  def close(self) -> None:
    self._writer.close()


class WandB:
  """A run of Weights & Biases, of the name of the work directory.

  It goes on under the same id. Where and whether it is uploaded is up to
  wandb's own environment variables, WANDB_PROJECT and WANDB_MODE for instance.
  """

  library = "wandb"

  def __init__(self, library, path, config, **_):
    path = path.resolve()
    # Letters and digits, the same whenever the run goes on.
    identity = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    self._run = library.init(
      dir=str(path),
      name="/".join(path.parts[-3:]).lstrip("/"),
      id=identity,
      resume="allow",
      config=dict(config),
    )

  def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
    self._run.log({f"{split}/{k}": v for k, v in metrics.items()}, step=step)

  def close(self) -> None:
    self._run.finish()


KNOWN = {"tensorboard": TensorBoard, "wandb": WandB}
NAMES = items(word(*KNOWN))


def check(names) -> None:
  """Raises ConfigError for a writer without its library."""
  for name in names:
    _library(name)


def build(names, path, config: Mapping, step: int) -> list:
  """The writers of these names.

  Args:
    names: of `KNOWN`.
    path: the work directory.
    config: as nested dicts.
    step: that the run goes on from.

  Raises:
    ConfigError: as `check`; or it cannot begin, without a network for instance.
  """
  return [_begun(name, path=path, config=config, step=step) for name in names]


def _begun(name, **options):
  library = _library(name)
  try:
    return KNOWN[name](library, **options)
  except Exception as e:  # Whatever the library raises.
    raise ConfigError(
      f'the writer "{name}" cannot begin ({first_line(e)}); see what'
      f" {KNOWN[name].library} asks for, or leave it out of writers"
    ) from e


def _library(name):
  try:
    return importlib.import_module(KNOWN[name].library)
  except ImportError:
    raise ConfigError(
      f'the writer "{name}" needs the package {KNOWN[name].library}; run: pip'
      f" install 'moe_jax[{name}]'"
    ) from None
