"""A progress line with the time left: a bar on a terminal, else plain lines."""

import sys

from tqdm import tqdm

_LINE = "{n_fmt}/{total_fmt} {unit}, {elapsed} spent, {remaining} left{postfix}"


class Progress(tqdm):
  """Counts units of work on stderr of the first process.

  about: text before the notes.
  """

  about = ""

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
