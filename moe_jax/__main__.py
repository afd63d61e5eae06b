"""The commands by name: `moe-jax COMMAND` or `python -m moe_jax COMMAND`.

Nothing is imported but the command that is called, after `command.run` handles
signals.
"""

import importlib
import sys
from collections.abc import Sequence

import moe_jax
from moe_jax.core.errors import ConfigError, did_you_mean
from moe_jax.run import command, shipped

# {name: (module with a function `main(argv)`, its purpose)}.
COMMANDS = {
  "train": ("moe_jax.main", "train a model, or resume its training"),
  "experiment": ("experiments.launch", "train arms over seeds, compare them"),
  "evaluate": ("moe_jax.evaluate", "compute all metrics of a run or weights"),
  "generate": ("moe_jax.generate", "write text, show the experts of tokens"),
  "sample": ("moe_jax.sample", "draw images or videos from a diffusion model"),
  "params": ("moe_jax.params", "count total and active parameters"),
  "plan": ("moe_jax.plan", "compute what a run would need on TPUs or GPUs"),
  "report": ("moe_jax.report", "show runs as a page, or what experts learnt"),
  "upcycle": ("moe_jax.upcycle", "make experts of a dense model"),
  "launch": ("moe_jax.launch.local", "start a run in several processes"),
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command that the first argument names; lists all without one.

  Args:
    argv: the arguments; None: those of this process.

  Returns:
    The exit code.

  Raises:
    ConfigError: there is no such command.
  """
  name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
  if name == "--version":
    print(f"moe_jax {moe_jax.__version__}")
    return 0
  if name in ("-h", "--help", "help"):
    print(f"moe_jax {moe_jax.__version__}\n")
    print("usage: moe-jax COMMAND [--help] ...\n")
    print(*(f"  {n:12}{words}" for n, (_, words) in COMMANDS.items()), sep="\n")
    return 0
  if name not in COMMANDS:
    known = did_you_mean(name, COMMANDS)
    raise ConfigError(f'there is no command "{name}"{known}')
  module, _ = COMMANDS[name]
  command.called = f"moe-jax {name}"
  if not module.startswith("moe_jax."):
    sys.path.insert(0, str(shipped.folder()))
  return importlib.import_module(module).main(rest)


def run() -> None:
  """Runs `main` with handled signals; the script `moe-jax`."""
  command.run(main)


if __name__ == "__main__":
  run()
