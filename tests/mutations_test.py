"""The faults of `tests.mutations` can be put in, and the quick tier has the
tests that are to notice them."""

import subprocess
import sys

import pytest

from tests import mutations


@pytest.mark.parametrize("fault", mutations.FAULTS, ids=lambda f: f.name)
def test_the_code_has_its_place(fault):
  assert fault.new in mutations.faulty(fault)
  assert fault.new != fault.old


def test_the_quick_tier_has_their_tests():
  wanted = sorted({f"tests/{fault.tests}" for fault in mutations.FAULTS})
  done = subprocess.run(
    [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n0", *wanted],
    cwd=mutations.ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  found = done.stdout.splitlines()
  for name in wanted:
    assert any(line.startswith(name) for line in found), name
