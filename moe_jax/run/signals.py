"""Signals that ask a run to stop."""

import itertools
import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Of all runs of a process, one after another: all processes have to agree on a
# number, and one may already be in the next run.
_calls = itertools.count(1)


class Stop:
  """Inside `with`, remembers the first SIGTERM or SIGINT instead of dying.

  A second one acts as usual. Outside of the main thread, where Python allows
  no handlers, nothing is caught.

  Where several processes run together, one that is sent to any of them stops
  all of them at the same step: jax.distributed has a handler of SIGTERM for
  that, so here it stays, and SIGINT is passed on to it.
  """

  def __init__(self):
    self._asked, self._before = False, {}
    self._together = jax.process_count() > 1

  def asked(self) -> bool:
    """Whether to stop; of several processes all have to ask equally often."""
    if self._together and not self._asked:
      self._asked = multihost_utils.reached_preemption_sync_point(next(_calls))
    return self._asked

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      caught = (signal.SIGINT,) if self._together else SIGNALS
      note = self._pass_on if self._together else self._note
      self._before = {s: signal.signal(s, note) for s in caught}
    return self

  def __exit__(self, *_):
    self._restore()

  def _note(self, number, frame):
    del number, frame
    self._asked = True
    self._restore()

  def _pass_on(self, number, frame):
    del number, frame
    self._restore()
    os.kill(os.getpid(), signal.SIGTERM)

  def _restore(self):
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._before = {}
