"""The layer as it is compiled for a TPU: `python -m tests.aot`."""

import os
import re
import subprocess
import sys

import pytest

from tests import aot

pytestmark = pytest.mark.aot


def compiled(*flags):
  """{program: {kernel or collective: how many}} that the command prints."""
  # A TPU program holds nothing of the eight virtual CPU devices.
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  done = subprocess.run(
    [sys.executable, "-m", "tests.aot", *flags],
    capture_output=True,
    text=True,
    env=env,
  )
  assert done.returncode == 0, done.stderr
  programs = {}
  for line in done.stdout.splitlines():
    head = re.match(r"(\w[\w ]*): v5p", line)
    if head:
      found = programs[head[1]] = {}
    else:
      name, number = re.match(r"  ([\w-]+): (\d+)", line).groups()
      found[name] = int(number)
  return programs


def test_dropless_over_experts():
  programs = compiled("--mesh=1,1,4,1", "--layout=dropless")
  forward, gradient = programs["forward"], programs["gradient"]
  # gate, up, down; and the gradients of rows and weights of each.
  assert forward["tpu_custom_call"] == 3
  assert gradient["tpu_custom_call"] == 9
  # There and back, and again for the gradients.
  assert forward["ragged-all-to-all"] == 2
  assert gradient["ragged-all-to-all"] == 4
  assert "all-gather" not in gradient, "rows go to their experts only"


def test_buckets_over_fsdp_and_experts():
  programs = compiled("--mesh=1,2,2,1", "--layout=buckets", "--dtype=float32")
  forward, gradient = programs["forward"], programs["gradient"]
  assert forward["ragged-all-to-all"] == 2
  assert gradient["ragged-all-to-all"] == 4
  # Weights are gathered over fsdp just in time, their gradients scattered.
  assert forward["all-gather"] >= 3
  assert gradient["reduce-scatter"] >= 3


def test_training_step_over_experts_and_tensor():
  programs = compiled("--mesh=1,1,2,2", "--layout=bounded", "--step")
  step = programs["train step"]
  assert step["tpu_custom_call"] == 9
  assert step["ragged-all-to-all"] == 4
  assert step["all-reduce"] >= 1


def test_collectives_are_read_from_hlo():
  hlo = """
  %a = bf16[8,128]{1,0:T(8,128)} ragged-all-to-all(%x, %y)
  %s = (f32[4]{0}, f32[16]{0}) all-gather-start(%z), dimensions={0}
  ROOT %d = f32[16]{0} all-gather-done(%s)
  %t = (s32[2]{0}, s32[2]{0}) all-to-all(%u, %v)
  """
  assert aot.collectives(hlo) == {
    "all-gather": (1, 64),
    "all-to-all": (1, 16),
    "ragged-all-to-all": (1, 2048),
  }
