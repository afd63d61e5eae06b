"""Signals that ask a run to stop."""

import signal
import threading

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
  """Inside `with`, remembers the first SIGTERM or SIGINT instead of dying.

  A second one acts as usual. Outside of the main thread, where Python allows
  no handlers, nothing is caught.
  """

  def __init__(self):
    self.asked = False
    self._before = {}

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      self._before = {s: signal.signal(s, self._note) for s in SIGNALS}
    return self

  def __exit__(self, *_):
    self._restore()

  def _note(self, number, frame):
    del number, frame
    self.asked = True
    self._restore()

  def _restore(self):
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._before = {}
