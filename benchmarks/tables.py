"""The committed results as tables, those of docs/performance.md.

python -m benchmarks.tables
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator

from benchmarks import moe_layer, routing, scaling, train_step

RESULTS = pathlib.Path(__file__).parent / "results"
BENCHMARKS = {
  "moe_layer": moe_layer,
  "routing": routing,
  "scaling": scaling,
  "train_step": train_step,
}


def tables() -> Iterator[tuple[str, str, str]]:
  """(file, the machine it is of, its table) of every file."""
  for path in sorted(RESULTS.glob("*.json")):
    found = json.loads(path.read_text())
    benchmark = next(
      b for n, b in BENCHMARKS.items() if path.stem.startswith(n)
    )
    yield path.name, _describe(found["machine"]), benchmark.table(found["rows"])


def _describe(machine):
  environment = ", ".join(f"{k}={v}" for k, v in machine["environment"].items())
  return (
    f"{machine['processor']}, {machine['cores_used']} of {machine['cores']}"
    f" cores, jax {machine['jax']}, Python {machine['python']},"
    f" {machine['date']}" + f", {environment}" * bool(environment)
  )


def main(argv=None) -> int:
  """The command."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.tables",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.parse_args(argv)
  for name, machine, table in tables():
    print(f"{name}: {machine}\n\n{table}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
