"""The layer as it is compiled for a TPU: `python -m tests.aot`."""

import os
import re
import subprocess
import sys

import pytest

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
      name, number = re.match(r"  (.+): (\d+)", line).groups()
      found[name] = int(number)
  return programs


def test_dropless_over_experts():
  programs = compiled("--mesh=1,1,4,1", "--layout=dropless")
  forward, gradient = programs["forward"], programs["gradient"]
  # gate, up, down; and the gradients of rows and weights of each.
  assert forward["tpu_custom_call"] == 3
  assert gradient["tpu_custom_call"] == 9
  # There and back, and again for the gradients.
  assert forward["ragged-all-to-all over expert"] == 2
  assert gradient["ragged-all-to-all over expert"] == 4
  assert "all-gather over expert" not in gradient, (
    "rows go to their experts only"
  )


def test_buckets_over_fsdp_and_experts():
  programs = compiled("--mesh=1,2,2,1", "--layout=buckets", "--dtype=float32")
  forward, gradient = programs["forward"], programs["gradient"]
  assert forward["ragged-all-to-all over expert"] == 2
  assert gradient["ragged-all-to-all over expert"] == 4
  # Weights are gathered over fsdp just in time, their gradients scattered.
  assert forward["all-gather over fsdp"] >= 3
  assert gradient["reduce-scatter over fsdp"] >= 3


def test_training_step_over_experts_and_tensor():
  programs = compiled("--mesh=1,1,2,2", "--layout=bounded", "--step")
  step = programs["train step"]
  assert step["tpu_custom_call"] == 9
  assert (
    step["ragged-all-to-all over expert"] == 4 * 2 * 2
  )  # Layers, micro-batches.
  assert step["all-reduce over tensor"] >= 1
