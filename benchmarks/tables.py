"""Writes the committed results into docs/performance.md, as tables.

  python -m benchmarks.tables

A result's tables stand between <!-- NAME.json --> and <!-- end -->.
"""

import argparse
import json
import pathlib
import re
import sys

from benchmarks import (
  moe_layer,
  on_accelerator,
  profile,
  routing,
  scaling,
  topologies,
  traffic,
  train_step,
)

RESULTS = pathlib.Path(__file__).parent / "results"
DOCUMENT = RESULTS.parents[1] / "docs" / "performance.md"
BENCHMARKS = (
  *(moe_layer, on_accelerator, profile, routing, scaling, topologies),
  *(traffic, train_step),
)
_PLACE = re.compile(r"(<!-- (\w+\.json) -->\n).*?(<!-- end -->\n)", re.DOTALL)


def main(argv=None) -> int:
  """The command."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.tables",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.parse_args(argv)
  DOCUMENT.write_text(filled(DOCUMENT.read_text()))
  return 0


def filled(document: str) -> str:
  """The document with the tables of the results that it names."""

  def tables(place):
    begin, name, end = place.groups()
    return f"{begin}{describe(RESULTS / name)}\n{end}"

  return _PLACE.sub(tables, document)


def describe(path: pathlib.Path) -> str:
  """The tables of a result, and the machine that it is of."""
  found = json.loads(path.read_text())
  name = _short(path.stem)
  benchmark = next(
    b for b in BENCHMARKS if name.startswith(_short(b.__name__.split(".")[-1]))
  )
  machine = found["machine"]
  environment = (f"`{k}={v}`" for k, v in machine["environment"].items())
  cores = f"{machine['cores_used']} of {machine['cores']} cores"
  on_cpu = machine["device"] == "cpu"
  words = (
    f"{machine['processor']}, {cores}" if on_cpu else machine["device"],
    f"jax {machine['jax']}",
    f"Python {machine['python']}",
    *environment,
    machine["date"],
  )
  return f"{', '.join(words)}:\n\n{benchmark.table(found['rows'])}"


def _short(name):
  """on_accelerator replaced accelerator, whose results have the same form."""
  return name.removeprefix("on_")


if __name__ == "__main__":
  sys.exit(main())
