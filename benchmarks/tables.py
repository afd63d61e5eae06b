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
  accelerator,
  moe_layer,
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
  *(accelerator, moe_layer, profile, routing, scaling, topologies),
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
  benchmark = next(
    b for b in BENCHMARKS if path.stem.startswith(b.__name__.split(".")[-1])
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


if __name__ == "__main__":
  sys.exit(main())
