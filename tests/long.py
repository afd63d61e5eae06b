"""The long tier: all that takes longer than one may wait for at every change.

  python -m tests.long
  python -m tests.long --only=mutations --only=kills

Runs the parts below one after the other, prints the time and the result of
each, and at the end "N passed, M failed".
"""

import argparse
import subprocess
import sys
import time

from tests.kill import ROOT

# The command of each part, as arguments of Python.
PARTS = {
  "tests": ("-m", "pytest", "-m", "long", "-q"),
  "house": ("-m", "tests.house"),
  "meshes": ("-m", "tests.mesh_product"),
  "kills": ("-m", "tests.kill"),
  "pods": ("-m", "tests.pod"),
  "mutations": ("-m", "tests.mutations"),
}


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m tests.long",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--only", action="append", choices=PARTS, help="a part; repeatable"
  )
  args = parser.parse_args(argv)
  failed = []
  names = args.only or list(PARTS)
  for name in names:
    print(f"== {name}", flush=True)
    started = time.monotonic()
    done = subprocess.run([sys.executable, *PARTS[name]], cwd=ROOT)
    result = "failed" if done.returncode else "passed"
    seconds = time.monotonic() - started
    print(f"== {name} {result} after {seconds:.0f} s", flush=True)
    failed += [name] if done.returncode else []
  print(f"{len(names) - len(failed)} passed, {len(failed)} failed")
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
