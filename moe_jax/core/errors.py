"""Errors that tell the user what to do."""

import contextlib
import difflib


class ConfigError(ValueError):
  """Something that was asked for cannot be done; says what to do instead.

  Commands print its sentence without a traceback and exit with code 2.
  """


class InUse(ConfigError):
  """Another process is running in a work directory."""


class RunError(Exception):
  """A run cannot go on; what it wrote is whole. Says what to do.

  Commands print its sentence without a traceback and exit with code 2.
  """


class Diverged(RunError):
  """Too many steps in a row were not finite."""


class Interrupted(Exception):
  """A signal stopped a run, and it was saved.

  Commands exit with code 75: the same command goes on.
  """


def first_line(error: Exception) -> str:
  """What another library's error says, short enough for a sentence of ours."""
  return str(error).strip().split("\n")[0][:300]


@contextlib.contextmanager
def naming(path):
  """Gives an OSError of writing a file, which names none, its path."""
  try:
    yield
  except OSError as e:
    e.filename = e.filename or str(path)
    raise


def did_you_mean(word, known) -> str:
  """'; did you mean "x"?' with the nearest known word, or a list of them."""
  known = sorted(known)
  near = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
  if near:
    return f'; did you mean "{near[0]}"?'
  return f"; known: {', '.join(known)}" if known else ""
