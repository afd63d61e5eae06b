"""Errors that tell the user what to do."""

import difflib

_NEAR = 0.65  # Of difflib: with less, two words only share some letters.


class ConfigError(ValueError):
  """A request that cannot be fulfilled; the message says what to do instead.

  Commands print its sentence without a traceback and exit with code 2.
  """


class InUse(ConfigError):
  """Another process is running in a work directory."""


class RunError(Exception):
  """A run cannot go on; its files are whole. The message says what to do.

  Commands print its sentence without a traceback and exit with code 2.
  """


class Diverged(RunError):
  """Too many steps in a row were not finite."""


class Interrupted(Exception):
  """A signal stopped a run, and it was saved.

  Commands exit with code 75: the same command goes on.
  """


def first_line(error: Exception) -> str:
  """First line of another library's error, short enough for our sentences."""
  return str(error).strip().split("\n")[0][:300]


def nearest(word, known) -> str:
  """Returns '; did you mean "x"?' with the nearest known word, or "".

  Args:
    word: what the user wrote.
    known: the words that are allowed.
  """
  # All flags begin alike, which makes none of them near.
  words = {w.lstrip("-"): w for w in sorted(known)}
  word = str(word).lstrip("-")
  near = difflib.get_close_matches(word, words, n=1, cutoff=_NEAR)
  return f'; did you mean "{words[near[0]]}"?' if near else ""


def did_you_mean(word, known) -> str:
  """Returns the end of a message: the nearest known word, or all of them.

  Args:
    word, known: as in `nearest`.
  """
  words = ", ".join(sorted(known))
  return nearest(word, known) or (words and f"; known: {words}")
