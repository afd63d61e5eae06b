"""Signals that ask a training run to stop."""

import itertools
import os
import signal
import threading
import time

import jax
from jax.experimental import multihost_utils

from moe_jax.run.command import SIGNALS

# Numbers the calls of `asked` in all runs of this process: processes agree on
# the answer to a call, and another process may already be in the next run.
_calls = itertools.count(1)


class Stop:
  """Inside `with`, remembers the first SIGTERM or SIGINT instead of dying.

  A second signal acts as it would outside. Outside of the main thread, where
  Python allows no handlers, nothing is caught.

  Where several processes run together, a signal to any of them stops all of
  them at the same step. jax.distributed has a handler of SIGTERM for that,
  which stays, and SIGINT is passed on to it.
  """

  def __init__(self, deadline: float | None = None):
    """Takes the time of `time.monotonic()` at which to stop too; None: never.

    Where there are several processes, the first one's time counts.
    """
    self._asked, self._before, self._deadline = False, {}, deadline
    self._together = jax.process_count() > 1

  def asked(self) -> bool:
    """Whether a stop is requested; all processes must ask equally often."""
    if self._deadline is not None and time.monotonic() >= self._deadline:
      self._deadline = None
      if not self._together:
        self._asked = True
      elif jax.process_index() == 0:
        os.kill(os.getpid(), signal.SIGTERM)  # jax tells the others.
    if self._together and not self._asked:
      self._asked = multihost_utils.reached_preemption_sync_point(next(_calls))
    return self._asked

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      caught = (signal.SIGINT,) if self._together else SIGNALS
      self._before = {s: signal.signal(s, self._note) for s in caught}
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._before = {}

  def _note(self, number, frame):
    del number, frame
    self.__exit__()
    if self._together:
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      self._asked = True
