r"""A pod of processes on this machine, each with CPU devices of its own.

  moe-jax launch --processes=2 --devices_per_process=2 -- \
    --config=tiny --workdir=runs/tiny

The words after -- go to `moe-jax train` in every process, or to another
--module; with --module=moe_jax they begin with the name of a command, such as
experiment. The processes talk over the loopback interface. The first one's
output is shown unchanged, but for Gloo's greetings, the others' with their
number before it. A signal is passed on to all of them, and a second one ends
them at once; where one fails, or this process is killed, the others are ended.
Exit codes are those of the run.
"""

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent import futures

from moe_jax.run import command
from moe_jax.run import config as config_lib

_PATIENCE = 10.0  # Seconds for the others to end by themselves when one fails.
# Kills process groups once its input ends, and holds no output of ours open.
_GUARD = 'exec >/dev/null 2>&1; read line; kill -s KILL -- "$@"'


def main(argv=None) -> int:
  """Runs the command; returns the exit code of the processes."""
  args = _arguments(argv)
  module = [sys.executable, "-m", args.module, *args.rest]
  started, asked = [], []

  def pass_on(number, frame):
    del frame
    asked.append(number)
    for process in started:
      process.send_signal(signal.SIGTERM if len(asked) == 1 else signal.SIGKILL)

  for number in (*command.SIGNALS, signal.SIGHUP):
    if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP.
      signal.signal(number, pass_on)
  started += start(module, args.processes, args.devices_per_process)
  with futures.ThreadPoolExecutor(len(started)) as readers, tied(started):
    if asked:  # A signal came while they were started.
      for process in started:
        process.terminate()
    readers.map(_show, range(len(started)), started)
    return wait(started)


@contextlib.contextmanager
def tied(started: list[subprocess.Popen]) -> Iterator[None]:
  """Ties processes, each in a session of its own, to this one inside `with`.

  If this process ends inside `with`, however it is killed, or `with` ends in an
  exception, they are killed, and all that they have started.
  """
  with subprocess.Popen(
    ["sh", "-c", _GUARD, "guard", *(f"-{process.pid}" for process in started)],
    stdin=subprocess.PIPE,
    start_new_session=True,
  ) as guard:
    yield
    guard.kill()


def start(command: list[str], processes: int, devices: int, **options) -> list:
  """Starts a command in several processes that `processes.join` together.

  Args:
    command: the same for all.
    processes: number of processes.
    devices: CPU devices of each.
    **options: of subprocess.Popen.

  Returns:
    A subprocess.Popen for each process.
  """
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{s.getsockname()[1]}"
  flags = os.environ.get("XLA_FLAGS", "")
  shared = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
    "JAX_COORDINATOR_ADDRESS": address,
    "JAX_COORDINATOR_BIND_ADDRESS": address,  # The default is all interfaces.
    "JAX_NUM_PROCESSES": str(processes),
  }
  piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
  return [
    subprocess.Popen(
      command,
      env=shared | {"JAX_PROCESS_ID": str(number)},
      start_new_session=True,  # Ctrl-C is passed on, once.
      **piped | options,
    )
    for number in range(processes)
  ]


def wait(started: list[subprocess.Popen]) -> int:
  """Returns the exit code of all, 0 or 75, or that of a process that failed."""
  codes, end = {None}, math.inf
  while None in codes and time.monotonic() < end:
    time.sleep(0.05)
    codes = {process.poll() for process in started}
    if not codes <= {None, 0, 75}:
      end = min(end, time.monotonic() + _PATIENCE)
  for process in started:
    process.kill()
  codes = [process.wait() for process in started]
  codes = [128 - code if code < 0 else code for code in codes]
  # An error of its own says more than the signal that ended another process.
  return min((c for c in codes if c not in (0, 75)), default=max(codes))


def _show(number, process):
  """Prints the output of a process while it runs."""
  with process.stdout as said:
    for line in said:
      text = line.decode(errors="replace")
      if text.startswith("[Gloo] Rank"):  # It is connected to the others.
        continue
      text = f"[{number}] {text}" if number else text
      with contextlib.suppress(OSError):  # Nobody listens; the process goes on.
        print(text, end="", flush=True)


def _arguments(argv):
  parser = config_lib.Parser(__doc__)
  add = parser.add_argument
  count, both = config_lib.at_least_1, " (default: %(default)s)"
  add("--processes", type=count, default=2, help="their number" + both)
  words = "CPU devices of each process" + both
  add("--devices_per_process", type=count, default=1, help=words)
  add("--module", default="moe_jax.main", help="what the processes run")
  add("rest", nargs="+", metavar="-- --config=... --workdir=...")
  return parser.parse_args(argv)


if __name__ == "__main__":
  command.run(main)
