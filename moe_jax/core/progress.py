"""A progress line with the time left: a bar on a terminal, else plain lines."""

import sys

from tqdm import tqdm

_LINE = "{n_fmt}/{total_fmt} {unit}, {elapsed} spent, {remaining} left{postfix}"


class Progress(tqdm):
  """Counts units of work on stderr of the first process.

  The time left is that of the other units, at the speed so far, and of the pauses
  that are to come.

  about: text before the notes.
  """

  about = ""
  _paused, _pauses, _to_come = 0.0, 0, 0

  def __init__(self, total: int | None, what: str, **more):
    """Shows a line on which no unit is done.

    Args:
      total: number of units, about; None: not known.
      what: the plural name of the units.
      **more: options of tqdm.
    """
    options = {"total": total, "unit": what, "smoothing": 0, "miniters": 1}
    if not sys.stderr.isatty():
      # A line every ten seconds, at most.
      options |= {"file": _Lines(), "mininterval": 10.0, "bar_format": _LINE}
    import jax  # Slow, and a command's --help does without.

    disable = jax.process_index() > 0
    super().__init__(**options, **more, disable=disable)

  def update(self, n: int, note: str = "") -> None:
    """Counts units that are done.

    Args:
      n: number of units since the last call.
      note: text to show behind the line.
    """
    self.set_postfix_str(self.about + note, refresh=False)
    super().update(n)

  def pause(self, seconds: float, to_come: int) -> None:
    """Counts a time in which no unit could be done, such as that of compiling.

    Args:
      seconds: how long it was. It is spent, and has no part in the speed.
      to_come: number of pauses that follow, each about as long as those so far.
    """
    self._paused += seconds
    self._pauses += 1
    self._to_come = to_come

  @property
  def format_dict(self):
    """The contents of a line. tqdm divides the units that are left by `rate`."""
    facts = super().format_dict
    done, left = self.n - self.initial, (self.total or 0) - self.n
    if done > 0 and left > 0:
      seconds = left * (facts["elapsed"] - self._paused) / done
      seconds += self._to_come * self._paused / max(self._pauses, 1)
      facts["rate"] = left / max(seconds, 1e-9)
    return facts

  def skip(self, n: int) -> None:
    """Counts n units of an earlier process, which have taken no time here."""
    if not self.disable:
      self.initial += n
      super().update(n)


class _Lines:
  """A file that prints each state of a bar on a line of its own."""

  def write(self, text):
    """Prints `text`, unless it is blank."""
    if text.strip():
      sys.stderr.write(text.strip() + "\n")
