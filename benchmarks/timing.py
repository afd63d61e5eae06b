"""Shared by benchmarks: turns, several processes, and the machine."""

import argparse
import functools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping, Sequence

from moe_jax.core.errors import ConfigError
from moe_jax.launch import local
from moe_jax.run import config as config_lib


def parser(
  module: str, about: str, rounds: int | None = None
) -> argparse.ArgumentParser:
  """A parser with the flags that benchmarks share.

  Args:
    module: its name, after `benchmarks.`.
    about: its docstring.
    rounds: how many, unless it is told otherwise; None: it measures no time.
  """
  made = argparse.ArgumentParser(
    prog=f"python -m benchmarks.{module}",
    description=about,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = made.add_argument
  if rounds is not None:
    add("--processes", type=config_lib.at_least_1, default=5)
    add(
      "--rounds",
      type=config_lib.at_least_1,
      default=rounds,
      help="of a process; in each, everything has its turn",
    )
  add("--json", type=path, metavar="PATH", help="also write it there")
  # Measures in this process, and prints that as JSON.
  add("--child", action="store_true", help=argparse.SUPPRESS)
  return made


def path(text: str) -> pathlib.Path:
  """A flag's file, in a folder that there is: hours may pass until it is
  written."""
  found = pathlib.Path(text)
  if found.is_dir() or not found.parent.is_dir():
    raise argparse.ArgumentTypeError(
      f"{text} is no file in a folder that exists; make the folder first"
    )
  return found


def in_turn(
  ready: Mapping[Hashable, Callable],
  rounds: int,
  enough: Callable = lambda key, seconds: False,
) -> dict[Hashable, list[float]]:
  """Seconds that each function takes, round by round.

  What else the machine does falls on all of them alike that way.

  Args:
    ready: functions of nothing that return arrays, already compiled.
    rounds: in each, every function has its turn; one more before them warms
      up, and counts for those only that have no other.
    enough: (key, seconds so far) -> whether a function may miss its turn.
  """
  import jax

  seconds = {key: [] for key in ready}
  for turn in range(rounds + 1):
    for key, function in ready.items():
      if turn and enough(key, seconds):
        continue
      started = time.perf_counter()
      jax.block_until_ready(function())
      seconds[key].append(time.perf_counter() - started)
  return {key: found[1:] or found for key, found in seconds.items()}


def over(ones: Sequence[float], others: Sequence[float]) -> float:
  """The median over rounds of one's seconds over the other's."""
  return statistics.median(one / other for one, other in zip(ones, others))


def processes(module: str, arguments: Sequence[str], count: int) -> list:
  """The JSON that each of several runs of a module prints.

  What one has compiled, the next ones find.
  """
  command = [sys.executable, "-m", module, *arguments]
  compiled = {"JAX_COMPILATION_CACHE_DIR": _compiled().name}
  found = []
  for _ in range(count):
    code, said = _run(command, compiled | os.environ)
    if code:
      raise ConfigError(
        f"a process of {module} ended with {code}; what it wrote is above, and"
        " -9 is often a lack of memory"
      )
    found.append(json.loads(said.splitlines()[-1]))
  return found


def _run(command, env):
  """Runs a process that ends with this one; returns its code and its output."""
  with (
    subprocess.Popen(
      command,
      stdout=subprocess.PIPE,
      text=True,
      env=env,
      start_new_session=True,
    ) as process,
    local.tied([process]),
  ):
    said, _ = process.communicate()
  return process.returncode, said


@functools.cache
def _compiled():
  """A folder that goes when this process ends."""
  return tempfile.TemporaryDirectory(prefix="moe_jax_benchmark_")


def summary(name: str, values: Sequence[float]) -> dict[str, float]:
  """The median over processes, and the least and the most of them.

  Of five, these two are a 94 % interval of the median, whatever they follow.
  """
  return {
    name: statistics.median(values),
    f"{name}_least": min(values),
    f"{name}_most": max(values),
  }


def cell(row: Mapping, name: str, factor: float = 1.0, digits: int = 2) -> str:
  """A `summary` in a table."""
  text, least, most = (
    f"{factor * row[key]:.{digits}f}"
    for key in (name, f"{name}_least", f"{name}_most")
  )
  return text if least == most else f"{text} ({least}–{most})"


def grid(
  rows: Sequence[Mapping], down: str, across: str, text: Callable, title: str
) -> str:
  """Rows as a markdown table, by two of their keys.

  Args:
    rows: in the order in which both keys' values come.
    down: key of what is a line of the table.
    across: key of what is a column.
    text: row -> its cell.
    title: of the first column.
  """
  columns = list(dict.fromkeys(row[across] for row in rows))
  lines = [
    f"| {title} | {' | '.join(columns)} |",
    f"|{'---|' * (1 + len(columns))}",
  ]
  for name in dict.fromkeys(row[down] for row in rows):
    cells = {row[across]: text(row) for row in rows if row[down] == name}
    found = " | ".join(cells.get(column, "–") for column in columns)
    lines.append(f"| {name} | {found} |")
  return "\n".join(lines) + "\n"


def write(path: pathlib.Path, rows: list[dict], **more) -> None:
  """The rows as JSON, with the machine that they are of and more facts of it."""
  found = {"machine": machine() | more, "rows": rows}
  path.write_text(json.dumps(found, indent=2) + "\n")


def machine() -> dict:
  """The machine and versions that numbers are measured with."""
  import jax

  from moe_jax.run import provenance

  cpuinfo = pathlib.Path("/proc/cpuinfo")
  lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
  names = (x.partition(":")[2].strip() for x in lines if "model name" in x)
  return {
    "processor": next(names, platform.processor() or platform.machine()),
    "cores": os.cpu_count(),
    "cores_used": cores(),
    "device": jax.devices()[0].device_kind,
    "environment": {
      name: os.environ[name]
      for name in ("XLA_FLAGS", "GLIBC_TUNABLES")
      if os.environ.get(name)
    },
    "jax": jax.__version__,
    "python": platform.python_version(),
    "revision": provenance.git_revision(),
    "date": time.strftime("%Y-%m-%d"),
  }


def cores() -> int:
  """The cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count()


def memory() -> int:
  """Bytes that the machine has."""
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def matmul_peak() -> float:
  """Operations a second of a large square product, the best of some."""
  import jax
  import jax.numpy as jnp

  size = 2048
  x = jax.random.normal(jax.random.key(0), (size, size))
  product = jax.jit(jnp.matmul)
  jax.block_until_ready(product(x, x))
  seconds = in_turn({"product": lambda: product(x, x)}, 8)["product"]
  return 2 * size**3 / min(seconds)
