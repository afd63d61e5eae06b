"""One progress line with the time left: a bar only on a terminal."""

import sys

from tqdm import tqdm

_LINE = "{n_fmt}/{total_fmt} {unit}, {elapsed} spent, {remaining} left{postfix}"


class Progress(tqdm):
  """Counts units of work on stderr of the first process.

  about: text before the notes.
  """

  about = ""

  def __init__(self, total: int | None, what: str, **more):
    """Shows nothing done yet.

    Args:
      total: units, about; None: not known.
      what: what to call them.
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
    """n more units are done; note is shown behind."""
    self.set_postfix_str(self.about + note, refresh=False)
    super().update(n)

  def skip(self, n: int) -> None:
    """n units had been done before this process; no time is counted for them."""
    if not self.disable:
      self.initial += n
      super().update(n)


class _Lines:
  """Writes a line for every state of a bar that would be drawn over."""

  def write(self, text):
    if text.strip():
      sys.stderr.write(text.strip() + "\n")
