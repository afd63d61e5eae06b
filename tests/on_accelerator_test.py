"""The one command for an accelerator, here on a CPU at toy sizes."""

import functools
import json
import signal
import time
import types

import jax
import numpy as np
import pytest

from benchmarks import (
  on_accelerator,
  right,
  shapes,
  tables,
  tuning,
  whole_model,
)
from moe_jax.moe.kernels import gpu

PARTS = {"right", "tiles", "layer", "step"}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
  """Choices and the table of tiles are those of the file again afterwards."""
  table = json.loads(gpu.TABLE.read_text())
  monkeypatch.setattr(gpu, "table", lambda: table)
  monkeypatch.setattr(gpu, "_chosen", {})


@pytest.mark.long
def test_all_of_it(tmp_path, capsys):
  path = tmp_path / "it.json"
  assert on_accelerator.main(["--minutes=30", f"--json={path}"]) == 0
  found = json.loads(path.read_text())
  assert set(found["machine"]) >= {
    "device",
    "jax",
    "python",
    "date",
    "packages",
  }
  by_part = {part: [] for part in PARTS}
  for row in found["rows"]:
    by_part[row["stage"]].append(row)  # Nothing is left out.
  assert all(row["distance"] <= row["most"] for row in by_part["right"])
  assert {row["what"].partition(":")[0] for row in by_part["right"]} == {"gpu"}
  ran = {row["implementation"]: row for row in by_part["layer"]}
  assert set(ran) == {
    *("dense", "sorted/gpu", "gather, capacity 1.25"),
    *shapes.NOT_ROUTED,
  }
  for row in ran.values():
    rate = shapes.TOY["toy"].flops / row["forward_seconds"]
    assert row["forward_flops_per_second"] == rate
    assert row["forward_backward_seconds"] > 0
  assert ran["dense"]["forward_ratio"] == 1.0
  dense, dropless = by_part["step"]
  assert (dense["arm"], dropless["arm"]) == ("dense", "sorted")
  assert dense["relative_speed"] == 1.0 and dropless["mfu"] is None
  tokens = dropless["tokens_per_step"] / dropless["seconds_per_step"]
  assert tokens == pytest.approx(dropless["tokens_per_second"])
  assert any(key.startswith("dw") for key in dropless["chosen"])
  said = capsys.readouterr().out
  compared = f"{len(by_part['right'])} passed, 0 failed"
  for title in (compared, "÷ dense", "product, TFLOP/s", "MFU"):
    assert title in said
  tiles = json.loads(path.with_suffix(".tiles.json").read_text())
  kept = json.loads(gpu.TABLE.read_text())
  new = tiles.pop(found["machine"]["device"])
  assert tiles == kept, "what was there stays"
  assert len(new) == len(by_part["tiles"]) == 6
  assert new[0] | {"milliseconds": 0, "tiles": {}} == {
    **{"product": "y", "rows": 192, "num_experts": 4, "d": 32, "f": 48},
    **{"candidate": "xla", "tiles": {}, "milliseconds": 0},
  }
  assert tables.describe(path.rename(tmp_path / "on_accelerator_cpu.json"))


def test_it_stops_at_its_minute(tmp_path, capsys):
  path = tmp_path / "it.json"
  started = time.monotonic()
  assert on_accelerator.main(["--minutes=0.001", f"--json={path}"]) == 0
  assert time.monotonic() - started < 10
  rows = json.loads(path.read_text())["rows"]
  assert {row["stage"] for row in rows} == {"left out"}
  assert {row["why"] for row in rows} == {"no time"}
  assert {"gpu", "layer, toy", "training step"} <= {row["what"] for row in rows}
  said = capsys.readouterr().out
  assert "Left out: gpu (no time)" in said and "training step (no time)" in said
  for minutes in ("0", "-1", "nan", "many"):
    with pytest.raises(SystemExit):
      on_accelerator.main([f"--minutes={minutes}"])


def test_a_part_takes_no_time_from_the_next_ones(monkeypatch):
  """It ends at its share, judged by the longest of its tasks so far."""
  clock = [0.0]
  monkeypatch.setattr(on_accelerator.time, "monotonic", lambda: clock[0])

  def work(seconds):
    clock[0] += seconds
    return [{"stage": "tiles"}]

  measurement = on_accelerator.Measurement(jax.devices()[0])
  measurement.toy = False
  run = lambda part, seconds: on_accelerator.within(  # noqa: E731
    on_accelerator.Task(part, "it", functools.partial(work, seconds)),
    *(0.0, 200.0, measurement),
  )[0]["stage"]
  assert run("tiles", 40) == "tiles"  # 20 are expected, and end before 90.
  assert run("tiles", 11) == "tiles"  # 40 are, and it is 51 then.
  assert run("tiles", 1) == "left out"
  assert clock[0] == 51
  assert run("layer", 5) == "tiles" and clock[0] == 56  # What `work` says.


def test_a_task_that_takes_too_long_is_ended():
  measurement = on_accelerator.Measurement(jax.devices()[0])
  before = signal.getsignal(signal.SIGALRM)
  task = on_accelerator.Task("step", "it", lambda: time.sleep(10))
  measurement.longest["step"] = 0.0
  started = time.monotonic()
  [row] = on_accelerator.within(task, started, 0.2, measurement)
  assert time.monotonic() - started < 5
  assert row == {"stage": "left out", "what": "it", "why": "no time"}
  assert measurement.longest["step"] >= 0.2
  assert signal.getsignal(signal.SIGALRM) is before
  assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.mark.parametrize(
  "words,why,passed",
  [
    ("RESOURCE_EXHAUSTED: 1 GB", "not enough memory", True),
    ("INTERNAL: it broke\nhere", "JaxRuntimeError: INTERNAL: it broke", False),
  ],
)
def test_what_fails_is_no_end(words, why, passed):
  measurement = on_accelerator.Measurement(jax.devices()[0])

  def fail():
    raise jax.errors.JaxRuntimeError(words)

  task = on_accelerator.Task("right", "gpu:new", fail)
  rows = on_accelerator.within(task, time.monotonic(), 1e6, measurement)
  left_out = {"stage": "left out", "what": "gpu:new", "why": why}
  assert rows == [left_out | {"passed": passed}]
  assert measurement.wrong == {"gpu:new"}, "it is not timed"


@pytest.mark.parametrize("kind", ["y", "dx", "dw"])
def test_a_wrong_kernel_is_caught(monkeypatch, capsys, kind):
  """It is named, the exit code is 1, and it is not timed."""
  xla = gpu.load("xla")
  exact = xla.run

  def wrong(product, *args):
    return exact(product, *args) * (1.1 if product == kind else 1)

  monkeypatch.setattr(xla, "run", wrong)
  tasks = on_accelerator.Measurement.tasks
  first = lambda self: (t for t in tasks(self) if t.what == "gpu")  # noqa: E731
  monkeypatch.setattr(on_accelerator.Measurement, "tasks", first)
  assert on_accelerator.main([]) == 1
  assert "FAILED: gpu: bfloat16 64 x 64" in capsys.readouterr().out
  measurement = on_accelerator.Measurement(jax.devices()[0])
  measurement._products("gpu")
  assert measurement.wrong == {"gpu"}
  timed = []
  monkeypatch.setattr(
    on_accelerator,
    "times",
    lambda name, shape, backends: timed.append(backends),
  )
  measurement._times("toy", shapes.TOY["toy"])
  assert timed == [[]]
  assert measurement._step("gpu")[0]["why"] == "gpu is wrong"


def test_a_wrong_candidate_is_not_chosen(monkeypatch):
  monkeypatch.setattr(gpu, "_wrong", set())
  product = tuning.products(shapes.ACCELERATOR["A1"])[0]
  for name in ("mosaic", "triton"):
    monkeypatch.setattr(gpu.load(name), "refusal", lambda product, device: None)
    monkeypatch.setattr(gpu.load(name), "tilings", lambda *args: [{}])
  assert gpu.choose(product).candidate == "mosaic"
  measurement = on_accelerator.Measurement(jax.devices()[0])
  measurement._note("gpu:mosaic", [{"passed": False}])
  assert gpu.choose(product).candidate == "triton"
  assert gpu.choose(product, "mosaic").candidate == "mosaic"


def test_nan_is_wrong():
  assert right.verdict("", "it", [0.0, 1e-3], 1e-2)["passed"]
  assert not right.verdict("", "it", [0.0, np.nan], 1e-2)["passed"]
  assert not right.verdict("", "it", [0.0, 1e-1], 1e-2)["passed"]


def test_products_of_a_shape():
  found = tuning.products(shapes.ACCELERATOR["Qwen3-30B-A3B"])
  assert found[2] == gpu.Product("dw", 65536, 128, 2048, 768, "bfloat16")
  assert found[3] == gpu.Product("y", 65536, 128, 768, 2048, "bfloat16")
  # Gate and up are alike, so the three matrices have these FLOPs forward.
  shape = shapes.ACCELERATOR["DeepSeek-V3, 1 of 64"]
  of_y = [
    2 * p.rows * p.d * p.f for p in tuning.products(shape) if p.kind == "y"
  ]
  assert 2 * of_y[0] + of_y[1] == shape.flops


def test_the_order_on_a_gpu():
  """Right first, and of that what is used; the whole model last."""
  found = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100")
  measurement = on_accelerator.Measurement(found)
  tasks = [*measurement.tasks()]
  assert [t.what for t in tasks[:8]] == [
    *("gpu", *["gpu, layer"] * 4),
    *("gpu:mosaic", "gpu:triton", "gpu:pallas"),
  ]
  parts = [t.part for t in tasks]
  assert parts == sorted(parts, key=list(on_accelerator._PARTS).index)
  count = len(shapes.ACCELERATOR)
  assert parts.count("tiles") == 6 * count and parts.count("layer") == count
  assert tasks[-1].what == "training step"
  on_tpu = on_accelerator.Measurement(
    types.SimpleNamespace(platform="tpu", device_kind="TPU v5")
  )
  assert on_tpu.backends()[0] == "tpu"
  assert "tiles" not in {t.part for t in on_tpu.tasks()}


def test_wrong_kernels_are_not_tuned(monkeypatch):
  product = tuning.products(shapes.ACCELERATOR["A1"])[2]
  assert tuning.candidates(product) == ["xla"]  # On this device.
  for name in ("mosaic", "triton", "pallas"):
    monkeypatch.setattr(gpu.load(name), "refusal", lambda product, device: None)
  assert tuning.candidates(product, wrong=["triton"]) == ["mosaic", "pallas"]


def test_tiles_that_do_not_compile_are_left_out(capsys):
  def unfit(x):
    raise ValueError("exceeds shared memory")

  x = np.ones(3)
  ready = tuning.compiled(
    {"good": (jax.numpy.negative, (x,)), "bad": (unfit, (x,))}
  )
  assert [*ready] == ["good"] and "exceeds" in capsys.readouterr().err
  seconds = tuning.interleaved(ready, rounds=3)
  assert len(seconds["good"]) == 3 and min(seconds["good"]) > 0


def test_both_models_have_the_same_active_flops():
  """And as many as the page says."""
  dense, sparse, dropping = (
    whole_model.config(a, False) for a in whole_model.ARMS
  )
  moe = sparse.model.moe
  assert dense.model.d_ff == moe.top_k * moe.d_expert
  assert dense.model.dtype == sparse.model.dtype == "bfloat16"
  assert sparse.model.moe.capacity_factor is None
  assert dropping.model.moe.capacity_factor == 1.25
  d, layers = sparse.model.d_model, sparse.model.num_layers
  weights = layers * (4 * d * d + 3 * d * dense.model.d_ff)
  assert 110e6 < weights < 116e6


def test_results_of_before_are_shown_too():
  """accelerator.json, of the command that this one replaces."""
  text = tables.describe(tables.RESULTS / "accelerator.json")
  assert "| sorted/gpu | 2.59 (2.57–2.62) / 3.26 (3.25–3.27) |" in text
  assert "did not run / did not run" in text
