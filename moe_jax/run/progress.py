"""One progress line with the time left: a bar only on a terminal."""

import sys
import time


class Progress:
  """Counts units of work on stderr."""

  def __init__(
    self, total: int, what: str, every: float = 10.0, shown: bool = True
  ):
    """Args: total units; what to call them; seconds between plain lines;
    whether to say anything."""
    self._total, self._what, self._every = total, what, every
    self._done, self._before, self._started = 0, 0, time.monotonic()
    self._said = self._started
    self._bar, self._shown = None, shown
    if shown and sys.stderr.isatty():
      from tqdm import tqdm

      self._bar = tqdm(total=total, unit=what)

  def update(self, n: int, note: str = "") -> None:
    """n more units are done; note is shown behind."""
    self._done += n
    if self._bar is not None:
      self._bar.set_postfix_str(note, refresh=False)
      self._bar.update(n)
      return
    now = time.monotonic()
    early = now - self._said < self._every and self._done < self._total
    if early or not self._shown:
      return
    self._said = now
    spent = now - self._started
    rate = (self._done - self._before) / max(spent, 1e-9)
    left = (self._total - self._done) / rate if rate else 0
    print(
      f"{self._done}/{self._total} {self._what}, {_minutes(spent)} spent,"
      f" {_minutes(left)} left. {note}",
      file=sys.stderr,
      flush=True,
    )

  def skip(self, n: int) -> None:
    """n units had been done before this process; no time is counted for them."""
    self._done += n
    self._before += n
    if self._bar is not None:
      self._bar.update(n)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()


def _minutes(seconds):
  return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
