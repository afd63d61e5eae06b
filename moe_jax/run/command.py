"""The end of a command: exit codes, errors in one sentence, and signals.

0: done. 2: something is wrong, and one sentence says what to do. 75: a signal
stopped it, and the same command goes on. 141: nobody reads its output any more,
as after `| head`. 1, with a traceback: a fault of this project, or of a config
file or plugin if the traceback ends there.

It imports nothing slow, so that a signal that arrives while a command imports
the rest is handled too.
"""

import contextlib
import errno
import json
import logging
import os
import re
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable

from moe_jax.core import files
from moe_jax.core.errors import ConfigError, Interrupted, RunError, first_line

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Errors of jax when another process is gone.
_PEER = re.compile("Gloo|(closed|reset) by peer|remote process exited")
# Seconds in which the other processes can say what was wrong before the first
# process ends: they end with it.
_LAST_WORDS = 2.0
_UNREAD = 128 + signal.SIGPIPE  # The exit code of other tools in a pipe.
index = None  # Number of this process among several; `processes.join` sets it.
called = None  # The words that called a command; moe_jax/__main__.py sets them.


def run(main: Callable[[], int]) -> None:
  """Calls main(), and ends the process with the exit code that it returns.

  A signal ends the process at once, also in the middle of a callback or an
  import, where an exception would get lost: a run's files are whole at any
  moment. `signals.Stop` lets a training run finish its step first. The handlers
  stay until the process has ended.

  Args:
    main: a command, () -> exit code.
  """
  for number in SIGNALS:
    if signal.getsignal(number) != signal.SIG_IGN:
      signal.signal(number, _end)
  # In the form of errors, ours and those of libraries.
  logging.addLevelName(logging.WARNING, "warning")
  logging.basicConfig(format="%(levelname)s: %(message)s")
  try:
    sys.exit(_flushed(main))
  except Interrupted as e:
    print(e, file=sys.stderr)
    sys.exit(75)
  except Exception as e:
    if isinstance(e, BrokenPipeError) and _drop_unread():
      leave("nobody reads the output of this process", _UNREAD)
      sys.exit(_UNREAD)
    sentence = _sentence(e)
    if sentence is None:
      leave(traceback.format_exc(), 1)
      raise
    leave(f"error: {sentence}", 2)
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def _flushed(main):
  """The exit code of a command, once its output has been written."""
  try:
    code = main()
  except SystemExit as e:  # Of --help, for instance.
    code = e.code
  sys.stdout.flush()
  return code


def _drop_unread() -> bool:
  """Sends output that nobody reads to nowhere; returns whether there is any."""
  outputs = select.poll()
  for stream in (sys.stdout, sys.stderr):
    outputs.register(stream, 0)
  unread = [fd for fd, event in outputs.poll(0) if event & select.POLLERR]
  for fd in unread:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, fd)
    os.close(nowhere)
  return bool(unread)


def write_json(path: str, value) -> None:
  """Writes the file of a flag --json=PATH; raises RunError if it cannot.

  Args:
    path, value: the file and its content, that JSON can hold.
  """
  with files.writing(path), open(path, "w") as file:
    json.dump(value, file, indent=2)


def check_writable(path: str) -> None:
  """Raises RunError for a path that `write_json` could not write to."""
  is_new = not os.path.exists(path)
  with files.writing(path), open(path, "a"):
    pass
  if is_new:
    os.remove(path)


def _end(number, frame):
  """The handler of signals. It may interrupt a write, so it does not print."""
  del number, frame
  os.write(2, b"stopped by a signal; give the same command again\n")
  files.remove_scratch()
  with contextlib.suppress(Exception):
    sys.stdout.flush()
  os._exit(75)


def leave(text: str, code: int) -> None:
  """Ends this process at once, if it runs with others; else does nothing.

  On its regular way out jax waits for all processes to come, minutes where only
  one has failed, and then crashes.

  Args:
    text: last words, for stderr.
    code: for the shell.
  """
  if index is None:
    return
  print(text, file=sys.stderr, flush=True)
  sys.stdout.flush()
  if index == 0:
    time.sleep(_LAST_WORDS)
  os._exit(code)


def _sentence(error):
  """Returns the sentence for the user; None for an unexpected error."""
  if isinstance(error, ConfigError | RunError):
    return str(error)
  for cause in _causes(error):
    if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
      return files.not_written(cause.filename or "a file", cause)
  if _PEER.search(str(error)):
    return (
      f"another process of this run has ended ({first_line(error)}); see what it"
      " said"
    )
  return None


def _causes(error):
  """Yields an error, and the errors that led to it."""
  while error is not None:
    yield error
    error = error.__cause__ or error.__context__
