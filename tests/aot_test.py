"""The layer as it is compiled for a TPU: `python -m tests.aot`."""

import os
import re
import subprocess
import sys

import pytest

from tests import aot

pytestmark = pytest.mark.aot


def printed(*flags):
  """The lines of `python -m tests.aot`."""
  # A TPU program holds nothing of the eight virtual CPU devices.
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  done = subprocess.run(
    [sys.executable, "-m", "tests.aot", *flags],
    capture_output=True,
    text=True,
    env=env,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.splitlines()


def compiled(*flags):
  """{program: {kernel or collective: (how many, bytes)}} that is printed."""
  programs = {}
  for line in printed(*flags):
    head = re.match(r"(\w[\w ]*): v5p", line)
    if head:
      found = programs[head[1]] = {}
    else:
      name, number, size = re.match(r"  (.+): (\d+)(?:, (\d+))?", line).groups()
      found[name] = int(number), int(size or 0)
  return programs


def exchanged(groups, buffer_rows, itemsize):
  """Bytes that one layer's forward pass receives: there, and back."""
  rows = groups * aot.LENGTH * 2  # K.
  return (buffer_rows + rows) * aot.WIDTH * itemsize


@pytest.mark.long
def test_dropless_over_experts():
  programs = compiled("--mesh=1,1,4,1", "--layout=dropless")
  forward, gradient = programs["forward"], programs["gradient"]
  # gate, up, down; and the gradients of rows and weights of each.
  assert forward["tpu_custom_call"] == (3, 0)
  assert gradient["tpu_custom_call"] == (9, 0)
  # There and back, and again for the gradients. All rows may come: a device has
  # two experts, as many as K.
  size = exchanged(2, 4 * 2 * aot.LENGTH * 2, 2)
  assert forward["ragged-all-to-all over expert"] == (2, size)
  assert gradient["ragged-all-to-all over expert"] == (4, 2 * size)
  # Rows go to their experts only; besides, how many of them, the router's
  # kernel, which is stored in parts, and its gradient.
  assert set(gradient) == {
    "tpu_custom_call",
    "ragged-all-to-all over expert",
    "all-to-all over expert",
    "all-gather over expert",
    "all-reduce over expert",
  }
  # It is gathered again in the backward pass.
  router = 4 * aot.WIDTH * aot.NUM_EXPERTS
  assert gradient["all-gather over expert"] == (2, 2 * router)
  assert gradient["all-to-all over expert"][1] < 1000


def share(*flags):
  """({what: number}, paddings of the six products at equal loads)."""
  lines = printed(*flags)[1:]
  paddings = re.findall(r"padding ([\d.]+)", "\n".join(lines))
  numbers = (re.fullmatch(r"  ([^:]+): ([\d.]+)", line) for line in lines)
  return {m[1]: float(m[2]) for m in numbers if m}, list(map(float, paddings))


def check_products(found, paddings):
  """Only kernels multiply rows by matrices, and each row by its expert's."""
  slots = found["operations of slots over ideal"]
  assert 0.995 < found["operations over ideal"] / slots < 1.005
  assert found["tpu_custom_call"] == 9 and found["ragged-dot"] == 0
  assert 0 < found["VMEM used in MiB"] <= found["VMEM limit in MiB"]
  assert len(paddings) == 6 and max(paddings) <= 0.05


@pytest.mark.long
def test_no_dense_product_of_all_experts():
  found, paddings = share("--share=small")
  check_products(found, paddings)


@pytest.mark.long
def test_the_check_sees_a_dense_product():
  """XLA's own `ragged_dot` has the gradient of all weights for all rows."""
  dense, none = share("--share=small", "--kernel=reference")
  assert dense["operations over ideal"] > 1.9 and dense["ragged-dot"] > 0
  assert not none


@pytest.mark.long
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("name", [n for n in aot.SHARES if n != "small"])
def test_share_of_a_published_model(name, topology):
  found, paddings = share(f"--share={name}", f"--topology={topology}")
  check_products(found, paddings)
  assert 0.999 <= found["operations over ideal"] < 1.01
  assert found["temporary over that of slots"] <= 1.2


@pytest.mark.long
def test_tokens_gathered_over_experts():
  programs = compiled("--mesh=1,1,4,1", "--exchange=all_gather")
  forward, gradient = programs["forward"], programs["gradient"]
  assert forward["tpu_custom_call"] == (3, 0)
  assert gradient["tpu_custom_call"] == (9, 0)
  tokens = 2 * aot.LENGTH  # Of a device.
  size = tokens * aot.WIDTH * 2
  # Results; and the gradient of tokens.
  assert forward["reduce-scatter over expert"] == (1, size)
  assert gradient["reduce-scatter over expert"] == (2, 2 * size)
  # Experts and weights, and a byte for each token that is no padding. Besides,
  # the router's kernel, which is gathered again in the backward pass.
  choice = tokens * (2 * (4 + 4) + 1)
  router = 4 * aot.WIDTH * aot.NUM_EXPERTS
  assert forward["all-gather over expert"] == (5, 4 * (size + choice) + router)
  size = 4 * (2 * size + choice) + 2 * router
  assert gradient["all-gather over expert"] == (7, size)
  assert not [key for key in gradient if "all-to-all" in key]


@pytest.mark.long
def test_buckets_over_fsdp_and_experts():
  programs = compiled("--mesh=1,2,2,1", "--layout=buckets", "--dtype=float32")
  forward, gradient = programs["forward"], programs["gradient"]
  slots = aot.LENGTH * 2 * 5 // 4 // 4  # Slots of a bucket at factor 1.25.
  size = exchanged(2, 2 * 4 * slots, 4)
  assert forward["ragged-all-to-all over expert"] == (2, size)
  assert gradient["ragged-all-to-all over expert"] == (4, 2 * size)
  # Weights are gathered over fsdp just in time, their gradients scattered.
  weights = 3 * aot.NUM_EXPERTS // 2 * aot.WIDTH**2 * 4
  count, size = forward["all-gather over fsdp"]
  assert count >= 3 and weights <= size < 1.01 * weights
  assert gradient["reduce-scatter over fsdp"] == (3, weights // 2)


@pytest.mark.long
def test_training_step_over_experts_and_tensor():
  programs = compiled("--mesh=1,1,2,2", "--layout=bounded", "--step")
  step = programs["train step"]
  assert step["tpu_custom_call"] == (9, 0)
  slots = aot.LENGTH * 2 * 5 // 4 // aot.NUM_EXPERTS
  size = exchanged(4, 4 * aot.NUM_EXPERTS * slots, 2)
  runs = 2 * 2  # Layers, micro-batches.
  assert step["ragged-all-to-all over expert"] == (4 * runs, 2 * runs * size)
  assert step["all-reduce over tensor"][0] >= 1
