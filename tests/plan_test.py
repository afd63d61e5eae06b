"""`python -m moe_jax.plan`: devices that are not there, and what is said of them."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import base
from moe_jax import plan as command
from moe_jax.core import parallel
from moe_jax.core.errors import ConfigError, RunError
from moe_jax.run import config as config_lib
from moe_jax.training import program
from moe_jax.training.planning import (
  chips,
  costs,
  loads,
  page,
  plan,
  products,
  search,
  topologies,
)

CPU = chips.CHIPS["cpu"]


def small(**changes):
  """A config whose products are large enough to count."""
  c = base.get_config()
  c.model.update(d_model=32, d_ff=64, head_dim=8, num_layers=3)
  c.model.prefix = ("dense",)
  c.model.moe.update(num_experts=8, d_expert=16, capacity_factor=1.0)
  c.data.update(seq_len=64, batch_size=16)
  c.model.remat = "block"
  return config_lib.overridden(c, [f"{k}={v!r}" for k, v in changes.items()])


@functools.cache
def on_cpu(sizes, **changes):
  config = small(**changes)
  config.mesh = sizes
  return plan.of_train_step(config, CPU, jax.devices(), "cpu:8")


def test_products_of_a_program():
  """Plain, batched and transposed products, and those of kernels, in loops."""
  text = """HloModule jit_f

%body (p: (s32[])) -> (s32[]) {
  %x = bf16[128,64]{1,0} parameter(0)
  %w = bf16[64,32]{1,0} parameter(1)
  %y = bf16[128,32]{1,0} convolution(%x, %w), dim_labels=bf_io->bf, metadata={op_name="jit(f)/a"}
  %q = bf16[8,16,64]{2,1,0} parameter(2)
  %k = bf16[8,16,64]{2,1,0} parameter(3)
  %s = f32[8,16,16]{2,1,0} convolution(%q, %k), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0oi->0bf, metadata={op_name="jit(f)/checkpoint/rematted_computation/b"}
  %v = bf16[4096,512,1]{1,0,2} parameter(4)
  %u = bf16[32,128,512]{2,1,0} parameter(5)
  %h = bf16[4096,32,128]{0,2,1} convolution(%v, %u), window={size=32 pad=31_31 rhs_reversal=1}, dim_labels=bf0_0oi->b0f, metadata={op_name="jit(f)/c"}
}

%cond (p: (s32[])) -> pred[] {
  %limit = s32[] constant(5)
}

ENTRY %main (p: s32[]) -> s32[] {
  %loop = (s32[]) while(%t), condition=%cond, body=%body
  %a = f32[3,7]{1,0} parameter(0)
  %b = f32[7,5]{1,0} parameter(1)
  %d = f32[3,5]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %g = bf16[512,256]{1,0} custom-call(%r, %m), custom_call_target="tpu_custom_call", operand_layout_constraints={s32[], s32[2]{0}, bf16[512,128]{1,0}, bf16[4,128,256]{2,1,0}}, frontend_attributes={}, metadata={op_name="jit(f)/jit(gmm)"}
  %t = bf16[4,128,256]{2,1,0} custom-call(%r, %m), custom_call_target="tpu_custom_call", operand_layout_constraints={s32[2]{0}, bf16[128,512]{1,0}, bf16[512,256]{1,0}}, metadata={op_name="jit(f)/jit(tgmm)"}
  %o = bf16[4]{0} custom-call(%r), custom_call_target="Sharding"
}
"""
  found = products.products(text)
  assert [(one.flops, one.times, one.rows, one.again) for one in found] == [
    (2 * 128 * 64 * 32, 5, None, False),
    (2 * 8 * 16 * 16 * 64, 5, None, True),
    (2 * 4096 * 512 * 32 * 128, 5, None, False),
    (2 * 3 * 7 * 5, 1, None, False),
    (2 * 512 * 128 * 256, 1, 512, False),
    (2 * 512 * 128 * 256, 1, 512, False),
  ]


def test_flops_of_unlike_layers():
  """Each product of experts is scaled by the rows of its own layer."""
  config = small(**{"model.pattern": ("moe", "moe@few"), "model.num_layers": 5})
  few = {"num_experts": 4, "top_k": 1, "d_expert": 48, "capacity_factor": 4.0}
  config.model.variants = {"few": {"moe": few}}
  config.mesh = (1, 2, 4, 1)
  mesh, task, model = program.build(config, jax.devices(), prepare=False)
  step = costs.of_train_step(config, task, mesh)
  matrices = costs.matrices(model, plan.parameters(task, model), mesh)
  stages = costs.stages(step, model, matrices)
  # On a device are two sequences of 64 tokens, and two layers of each kind.
  tokens, d_model, layers = 2 * 64, 32, 2
  both = (
    # (path, used rows, rows of the buffer, width)
    ("decoder/0/moe", 2 * tokens, 2 * tokens, 16),
    ("decoder/1/moe", tokens, 4 * tokens, 48),
  )
  names = [
    "jit(f)/jvp(Decoder)/while/body/{}/shard_map/experts/dot",
    "jit(f)/transpose(jvp(Decoder))/{}/shard_map/experts/dot",
    "jit(f)/{}/shard_map/experts/jit(gmm)",
    "jit(f)/decoder/checkpoint/rematted_computation/{}/experts/dot",
  ]
  found = [
    products.Product(
      2 * room * d_model * width,
      3 * layers,
      room if "gmm" in name else None,
      name.format(path).replace("computation/decoder", "computation"),
    )
    for path, _, room, width in both
    for name in names
  ]
  flops = products.count(found, step, model, matrices, stages, 0.0)
  useful, static = (
    sum(2 * layer[i] * d_model * layer[3] * 3 * layers for layer in both)
    for i in (1, 2)
  )
  assert flops["useful"] == pytest.approx(3 * useful)
  assert flops["recomputed"] == pytest.approx(useful)
  assert flops["static"] == pytest.approx(3 * static)
  # In closed form, too.
  closed = products.count(None, step, model, matrices, stages, 0.0)
  assert closed["static"] - closed["useful"] == pytest.approx(
    3 * (static - useful)
  )


@pytest.mark.parametrize("kind", ["all_to_all", "all_gather"])
def test_a_step_on_a_mesh(kind):
  """Memory, FLOPs and what is sent over experts, beside their closed form."""
  made = on_cpu((1, 2, 4, 1), **{"model.moe.exchange": kind})
  values = page.values(made)
  assert values["fits"] and values["hbm_limit_bytes"] is None
  memory = values["memory_bytes_per_device"]
  parts = sum(size for name, size in memory.items() if name != "total")
  assert memory["total"] == parts
  held = sum(
    np.prod(x.sharding.shard_shape(x.shape)) * 4
    for x in jax.tree.leaves(made.params)
  )
  assert memory["parameters"] == held
  even = values["even_bytes_per_device"]["parameters"]
  assert even <= held < 1.1 * even  # Scales of norms lie whole everywhere.
  assert 2 * held <= memory["optimizer"] <= 2 * held + 16
  flops = values["flops"]
  assert flops["useful"] == pytest.approx(flops["model"], rel=0.02)
  assert not flops["compiled"]
  # Capacity 1: as many rows as loads that are equal need.
  assert flops["static"] == pytest.approx(flops["useful"])
  [(sent, formula)] = {
    (one["axis_bytes"], one["formula_bytes"])
    for one in values["collectives"]
    if one["axis"] == "expert"
  }
  # The ring sends choices, too.
  most = 1.0001 if kind == "all_to_all" else 1.2
  assert formula <= sent < most * formula
  assert values["roofline_seconds"] is None
  # Two sequences, of 64 tokens with two experts each; capacity 1 is room for
  # them, from all devices, on each.
  [buffer] = values["buffers"]
  assert buffer["balanced_rows"] == buffer["rows"] == 2 * 64 * 2
  assert buffer["bytes"] == buffer["rows"] * 32 * 4
  text = page.text(made)
  assert "fsdp 2, expert 4" in text and "MFU" not in text
  assert json.dumps(values)


@pytest.mark.parametrize(
  "sizes, accumulation", [((2, 2, 2, 1), 1), ((1, 2, 4, 1), 2)]
)
def test_what_is_sent(sizes, accumulation):
  """Over all axes as much as the closed form has, but for norms and counts."""
  made = on_cpu(
    sizes,
    **{
      "model.tie_embeddings": False,
      "train.accumulation": accumulation,
      "train.reduce_experts_once": accumulation > 1,
    },
  )
  sizes = {
    one["axis"]: (one["axis_bytes"], one["formula_bytes"])
    for one in page.values(made)["collectives"]
  }
  assert {"fsdp", "expert", "fsdp,expert"} <= set(sizes)
  # Out of the loop over micro-batches comes the dense layer's forward pass, too.
  most = 0.03 if accumulation == 1 else 0.07
  for axis, (sent, formula) in sizes.items():
    assert sent == pytest.approx(formula, rel=most), axis


def test_a_table_of_parameters():
  text = page.parameters(on_cpu((1, 2, 2, 2)))
  cells = {line.split()[0]: line.split()[1:] for line in text.splitlines()[2:]}
  gate = cells["decoder/0/moe/experts/gate"]
  assert gate[:4] == ["2x8x32x16", "expert", "fsdp", "tensor"]
  assert gate[4:] == ["2x4x16x8", "4.1", "kB", "32.8", "kB"]


def test_decoding():
  config = small(**{"eval.batch_size": 16})
  config.mesh = (2, 1, 4, 1)
  made = plan.of_decoding(config, CPU, jax.devices(), "cpu:8")
  assert made.tokens == 16
  # Keys and values of 64 places, for two sequences on each device.
  heads = config.model.num_kv_heads * config.model.head_dim
  cache = 2 * config.model.num_layers * 64 * 2 * heads * 4
  assert cache < made.memory["cache"] < 1.05 * cache
  [mixing] = [c.stage for c in made.stages if c.stage.name == "attention"]
  assert mixing.memory > cache  # It is read, beside the weights.
  # Nothing is dropped, so that a device has room for all 16 tokens.
  used, _, room = next(costs.buffers(made.step, made.model))
  assert room == 8 / 2 * 2 * made.step.tokens * 1


def refused(*flags):
  with pytest.raises(ConfigError) as caught:
    command.main(["--config=configs/tiny.py", *flags])
  return str(caught.value)


def test_bad_input_is_refused_before_anything_is_compiled(monkeypatch):
  assert len(jax.devices()) == 8  # They are there before the command asks.
  monkeypatch.setattr(os, "environ", dict(os.environ))
  assert 'no chip "v5"; did you mean "v5' in refused("--topology=v5:2x2x1")
  assert "there are v5p:2x2x1" in refused("--topology=v5p")
  assert "there are cpu:4" in refused("--topology=cpu:2x")
  text = refused("--topology=cpu:64")
  assert 'no topology "cpu:64" (there are 8 such devices' in text
  text = refused("--topology=v5p:4x4")
  assert "a shape of v5p has 3 dimensions, not 2); there are v5p:2x2x1" in text
  text = refused("--topology=h100:2x2x2")
  assert "a shape of h100 has 1 or 2 dimensions, not 3" in text
  assert "the largest has 256 chips" in refused("--topology=v6e:32x32")
  text = refused("--topology=cpu:8", "--mesh=fsdp:3")
  assert "--mesh=fsdp:3 is of 3 devices, and the topology has 8" in text
  assert '"2x" is no shape' in refused("--topology=cpu:2x")
  assert "no shape stands after v5p:" in refused("--topology=v5p:")
  assert '"x:8" is not AXIS' in refused("--topology=cpu:8", "--mesh=x:8")
  flags = "--topology=cpu:8", "--mesh=data:8", "--config.data.batch_size=4"
  assert "does not divide into 8 token shards" in refused(*flags)
  with pytest.raises(RunError, match="/nothing/a.json"):
    command.main(
      ["--config=configs/tiny.py", "--topology=cpu:8", "--json=/nothing/a.json"]
    )
  flags = "--topology=cpu:8", "--mesh=data:8", "--config.data.batch_size=4"
  text = refused(*flags, "--config.model.pattern=('dense',)")
  assert "4 examples does not divide into 8 token shards" in text
  text = refused("--topology=cpu:8", "--search", "--decode")
  assert "leave out --mesh, --decode" in text
  assert "leave out --mesh" in refused(
    "--topology=cpu:8", "--search", "--mesh=data:8"
  )
  text = refused("--topology=cpu:8", "--search")
  assert "--search needs a chip whose rates are known" in text
  for path in ("nothing/metrics.jsonl", ""):
    text = refused("--topology=cpu:8", f"--load={path}")
    assert f'no file "{path}"' in text and "train.loads_every above 0" in text
  wanted = "--config.model.moe.grouped_matmul=tpu"
  text = refused("--topology=cpu:8", "--mesh=data:8", wanted)
  assert 'grouped_matmul = "tpu" is not of cpu' in text
  monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda _: None)
  for name, extra in (("v6e:2x2", "aot"), ("h100:8", "cuda12")):
    assert f"moe_jax[{extra}]" in refused(f"--topology={name}")


def test_lengths_of_a_mesh():
  axes = parallel.AXES
  assert topologies.sizes("expert:4,data:2", axes, 8) == (2, 1, 4, 1)
  assert topologies.sizes("fsdp:-1,tensor:2", axes, 8) == (1, 4, 1, 2)
  for text in (
    "fsdp:-1,data:-1",
    "fsdp:-1,data:3",
    "data:0",
    "data",
    "",
    "fsdp:8,fsdp:1",
    "fsdp:-1,expert:3",
  ):
    with pytest.raises(ConfigError, match="--mesh"):
      topologies.sizes(text, axes, 8)


def test_the_table_of_chips():
  for chip in chips.CHIPS.values():
    assert chips.of_device(chip.kind) is chip
    for shape in chip.example.split(", "):
      assert topologies.parse(f"{chip.name}:{shape}")[0] is chip
    if chip.platform != "cpu":
      # No chip has a link as fast as its memory, nor computes a FLOP a byte.
      assert chip.axis < chip.links < chip.memory_rate < chip.flops / 50
  assert chips.of_device("TPU v5p") is chips.CHIPS["v5p"]
  assert chips.of_device("TPU v99") is None


def test_bounds_of_a_stage():
  """The slowest of three if all overlaps; their sum along a ring if nothing."""
  chip = chips.CHIPS["v5p"]
  sent = costs.Sent("rows", "all-to-all", ("expert",), 0, 1.2e9)
  gathered = costs.Sent("weights", "all-gather", ("fsdp",), 0, 6e8)
  stage = costs.Stage("experts", 4.59e12, 4.59e12, 2.765e9, 0, (sent, gathered))
  mesh = parallel.make_mesh((1, 1, 8, 1))
  step = costs.of_decoding(small(), mesh)
  cost = plan.bounds(stage, step, chip, ring=8)
  low, high = plan.seconds([cost])
  assert low == pytest.approx(0.02)
  # A row passes two of eight devices: 2 * 1.2e9 over one axis, 200 GB/s.
  assert high == pytest.approx(0.02 + 0.001 + 2 * 0.006 + 0.003)
  # What takes 20 ms of memory alone overlaps with all of that.
  other = plan.bounds(costs.Stage("x", memory=20 * 2.765e9), step, chip, ring=8)
  low, _ = plan.seconds([cost, other])
  assert low == pytest.approx(0.021)


def test_what_gpus_send_within_a_host():
  chip = chips.CHIPS["h100"]
  mesh = parallel.make_mesh((1, 2, 4, 1))
  step = costs.of_decoding(small(), mesh)

  def along(axes, host):
    sent = costs.Sent("", "all-gather", axes, 0, 9e9)
    return plan.bounds(costs.Stage("x", sent=(sent,)), step, chip, host).along

  assert along(("expert",), 4) == 9e9 / chip.links
  assert along(("fsdp",), 4) == 9e9 / chip.axis
  assert along(("fsdp", "expert"), 4) == 9e9 / chip.axis
  assert along(("expert", "fsdp"), 8) == 9e9 / chip.links
  assert topologies.ring("h100:16x8") == 8 and topologies.ring("h200:4") == 4
  assert topologies.ring("v5p:4x2x8") == 8


def test_only_decoders_are_planned():
  config = small()
  config.plugins = (str(pathlib.Path(__file__).parent / "plugins"),)
  config.task.name, config.model.name = "digits", "patches"
  config.model.update(pattern=("moe",), prefix=())
  for make in (plan.of_train_step, plan.of_decoding):
    with pytest.raises(ConfigError, match="decoders, and model.name = patches"):
      make(config, CPU, jax.devices()[:1], "cpu:1")
  with pytest.raises(ConfigError, match="model.name = patches is none"):
    search.ranked(config, chips.CHIPS["v5p"], jax.devices(), ring=2)


def test_candidates_of_a_search():
  """Those that fit come first; each is a mesh that a run would accept."""
  config = small(**{"data.batch_size": 32, "eval.batch_size": 32})
  chip = chips.CHIPS["v5p"]
  found = search.ranked(config, chip, jax.devices(), ring=2)
  assert all(one.fits(chip) for one in found)
  assert [one.high for one in found] == sorted(one.high for one in found)
  settings = [one.settings for one in found]
  assert {s["mesh"] for s in settings} >= {(8, 1, 1, 1), (1, 2, 4, 1)}
  assert all(np.prod(s["mesh"]) == 8 for s in settings)
  assert {s["model.remat"] for s in settings} == {"none", "dispatch", "block"}
  assert {s["model.moe.exchange"] for s in settings} == {
    "all_to_all",
    "all_gather",
  }
  # 32 sequences are 8 micro-batches of 4 where tokens are split 4 ways.
  for one in settings:
    shards = np.prod(one["mesh"][:3])
    assert 32 % (shards * one["train.accumulation"]) == 0
  memory = {}
  for one in found:
    mesh, remat, number = (
      one.settings[k] for k in ("mesh", "model.remat", "train.accumulation")
    )
    memory.setdefault((mesh, number), {}).setdefault(remat, one.memory)
  for sizes in memory.values():
    assert sizes["block"] < sizes["dispatch"] < sizes["none"]
  # Half of them fit a smaller device, and come first.
  half = sorted(one.memory for one in found)[len(found) // 2]
  small_chip = chip._replace(memory=half / 0.95)
  again = search.ranked(config, small_chip, jax.devices(), ring=2)
  fits = [one.fits(small_chip) for one in again]
  assert fits == sorted(fits, reverse=True)
  assert 0.3 < np.mean(fits) < 0.7


def test_a_search_that_finds_nothing(monkeypatch, capsys):
  """It goes on after candidates that do not fit, and says so in the end."""
  monkeypatch.setattr(os, "environ", dict(os.environ))
  tiny = chips.CHIPS["v5p"]._replace(name="v5p", platform="cpu", memory=10**6)
  monkeypatch.setattr(topologies, "parse", lambda text: (tiny, (8,)))
  text = refused(
    *("--topology=v5p:2x2x2", "--search", "--compile=1"),
    *("--config.data.batch_size=16", "--config.eval.batch_size=16"),
    "--config.model.d_model=128",
  )
  assert "--search: none of 3 candidates fits: the training step needs" in text
  said = capsys.readouterr().out
  assert said.count("does NOT fit") == 3


def test_quantities():
  assert page.quantity(999.7e9, "B") == "1 TB"
  assert page.quantity(123.4e-12, "s") == "123 ps"
  assert page.quantity(0, "s") == "0 s"


def test_the_page_of_a_search():
  made = on_cpu((1, 2, 4, 1))
  real = sum(made.memory.values())
  settings = {"mesh": (1, 2, 4, 1), "model.remat": "block"}
  one = search.Candidate(settings, 1.25 * real, 0.001, 0.002)
  assert one.flags == "--mesh=fsdp:2,expert:4 --config.model.remat=block"
  text = page.compared(one, made)
  assert text.startswith(f"compiled {one.flags}: fits, ")
  assert text.endswith("(+25.0%)")
  text = page.compared(one, made._replace(compile_seconds=0, fits=False))
  assert "does NOT fit, by its state alone" in text and "%" not in text
  chip = chips.CHIPS["v5p"]
  large = one._replace(memory=2.0 * chip.memory, high=0.001)
  text = page.candidates([one, large] + 30 * [one], chip)
  lines = text.splitlines()
  assert lines[0].startswith("32 candidates, of which 31 fit")
  assert len(lines) == 11 and one.flags in lines[1]


@pytest.mark.long
@pytest.mark.aot
def test_the_memory_that_a_search_estimates(tmp_path):
  """The best three for DeepSeek-V3 on 512 chips, beside the compiler's."""
  path = tmp_path / "search.json"
  flags = ["--config=configs/deepseek_v3.py", "--topology=v5p:8x8x8"]
  flags += ["--search", f"--json={path}", "--config.eval.batch_size=512"]
  flags += ["--config.data.batch_size=512"]
  flags += ["--config.model.moe.capacity_factor=1.25"]
  done = run(*flags, "--config.model.moe.expert_buckets=64")
  assert done.returncode == 0, done.stderr
  rows = json.loads(path.read_text())["compiled"]
  # The compiler fails at some meshes with data; the search goes on after these.
  rows = [row for row in rows if "error" not in row]
  assert len(rows) == 3
  for row in rows:
    real = row["memory_bytes_per_device"]["total"]
    assert row["fits"]
    assert row["candidate"]["memory"] == pytest.approx(real, rel=0.1)


def test_what_would_fit():
  config = small()
  config.mesh = (8, 1, 1, 1)
  needed = 10**6
  chip = chips.CHIPS["v5p"]._replace(memory=needed)
  made = plan.of_train_step(config, chip, jax.devices(), "v5p:2x2x2")
  assert not made.fits
  assert sum(made.memory.values()) > needed
  assert "GB more than the" in search.remedy(made, config, jax.devices())
  # Room for the state, and for little else.
  state = 2 * made.even["parameters"] + made.even["optimizer"]
  tight = made._replace(
    chip=chip._replace(memory=1.2 * state), limit=1.2 * state
  )
  text = search.remedy(tight, config, jax.devices())
  assert "lower data.batch_size or data.seq_len" in text
  # On a chip with room there are other ways than the one that was refused.
  rich = made._replace(chip=chips.CHIPS["v5p"])
  text = search.remedy(rich, config, jax.devices())
  assert "would fit: --mesh=" in text and "--mesh=data:8 " not in text
  # The closed form would name the very settings that were refused.
  best = search.ranked(config, rich.chip, jax.devices(), ring=2)
  refused = search.with_settings(config, best[0].settings)
  named = best[0].settings["mesh"]
  refused.mesh = tuple(-1 if n > 1 else 1 for n in named)
  assert sum(n < 0 for n in refused.mesh) == 1
  own = rich._replace(config=refused, mesh=dict(zip(parallel.AXES, named)))
  text = search.remedy(own, refused, jax.devices())
  assert f"would fit: {best[1].flags}" in text
  # Decoding has a remedy of its own.
  step = made.step._replace(backward=False)
  text = search.remedy(made._replace(step=step), config, jax.devices())
  assert "lower eval.batch_size or data.seq_len" in text
  # With a moving average there is more to hold.
  even = made.even | {"moving average": made.even["parameters"]}
  averaged = tight._replace(even=even, limit=0.5 * state)
  text = search.remedy(averaged, config, jax.devices())
  assert "moving average" in text and "and gradients alone are" in text
  nowhere = made._replace(step=step, limit=0.5 * made.even["parameters"])
  text = search.remedy(nowhere, config, jax.devices())
  assert "no mesh would: parameters alone are" in text
  # Not even the state.
  poor = chip._replace(memory=1000)
  made = plan.of_train_step(config, poor, jax.devices(), "v5p:2x2x2")
  assert not made.fits and made.compile_seconds == 0
  assert "gradients" in made.memory
  assert "take more of them" in search.remedy(made, config, jax.devices())


def test_loads_of_a_run(tmp_path):
  def write(*of_steps):
    lines = [{"step": 1, "split": "train", "loss": 1.0}]
    for step, own in enumerate(of_steps):
      lines.append({"step": step, "split": "loads", **own})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)

  two = {"01": [2, 2, 2, 2]}
  write({"00": [4, 0, 2, 2]} | two, {"00": [1, 1, 1, 5]} | two)
  count_NE = loads.read(str(tmp_path / "metrics.jsonl"))
  assert count_NE.tolist() == [[4, 0, 2, 2], [2] * 4, [1, 1, 1, 5], [2] * 4]
  found = loads.over_devices(count_NE, 2, top_k=2, nodes=2, limited=1)
  # Devices have 4 and 4, 4 and 4, 2 and 6, 4 and 4 of 8.
  assert found.samples == 4
  assert found.slowest[0] == 1.0
  assert 1.0 < found.slowest[1] < 1.5
  # A pair of independent draws reaches 2 - p^2 - (1 - p)^2 devices.
  assert found.reached == pytest.approx(np.mean([1.5, 1.5, 1.375, 1.5]))
  assert "saves at least 32%" in loads.text(found)
  with pytest.raises(ConfigError, match="4 experts do not divide over mesh"):
    loads.over_devices(count_NE, 3, top_k=2, nodes=2, limited=None)
  config = small(**{"model.moe.router.num_expert_groups": 4})
  config.model.moe.router.top_expert_groups = 2
  config.mesh = (4, 1, 2, 1)

  def of_config(count_NE, **changes):
    config.update_from_flattened_dict(changes)
    mesh, _, model = plan.build(config, CPU, jax.devices())
    return loads.of_model(count_NE, model, mesh)

  eight_NE = np.tile(count_NE, 2)
  found = of_config(eight_NE)
  same = loads.over_devices(eight_NE, 2, top_k=2, nodes=4, limited=2)
  # The dispatcher gather computes all slots.
  assert found == same and "its time is the same" in loads.text(found)
  ragged = {"model.moe.dispatcher.name": "sorted"}
  found = of_config(eight_NE, **ragged)
  assert found == same._replace(waits=("experts", "exchange"))
  assert "its experts and its exchange take as many" in loads.text(found)
  found = of_config(eight_NE, **{"model.moe.exchange": "all_gather"})
  assert found.waits == ("experts",)
  with pytest.raises(ConfigError, match="4 experts, and those of this config"):
    of_config(count_NE)
  config.model.update(pattern=("moe", "moe@other"))
  config.model.variants = {"other": {"moe": {"top_k": 1}}}
  with pytest.raises(ConfigError, match="one router and one exchange"):
    of_config(eight_NE)
  config.model.pattern = ("dense",)
  with pytest.raises(ConfigError, match="have no; give a run"):
    of_config(eight_NE)
  for own in ({"00": [1, 2]}, {"00": ["a"] * 4}, {"00": [0, 0, 0, 0]}):
    write(two, own)
    with pytest.raises(ConfigError, match="as many experts in each layer"):
      loads.read(str(tmp_path))
  write({"00": 3})
  with pytest.raises(ConfigError, match="metrics"):
    loads.read(str(tmp_path))
  write()
  with pytest.raises(ConfigError, match="has no lines with loads"):
    loads.read(str(tmp_path))


def run(*flags):
  """The command, run in a process of its own."""
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  done = subprocess.run(
    [sys.executable, "-m", "moe_jax.plan", *flags],
    capture_output=True,
    text=True,
    env=env,
  )
  return done


@pytest.mark.aot
def test_a_step_on_tpus(tmp_path):
  """Counted in the compiled program: FLOPs, and all that is sent."""
  path = tmp_path / "plan.json"
  flags = ["--config=configs/mixtral.py:tiny", "--topology=v5p:2x2x1"]
  flags += ["--mesh=fsdp:2,expert:2", f"--json={path}"]
  sizes = {"d_model": 256, "head_dim": 64, "moe.d_expert": 128}
  flags += [f"--config.model.{k}={v}" for k, v in sizes.items()]
  flags += ["--config.data.seq_len=256", "--config.model.num_layers=3"]
  flags += ["--config.model.prefix=('dense',)", "--config.model.d_ff=512"]
  done = run(*flags, "--config.model.dtype=bfloat16")
  assert done.returncode == 0, done.stderr
  assert "training step on v5p:2x2x1" in done.stdout
  values = json.loads(path.read_text())
  assert (
    values["fits"] and values["hbm_limit_bytes"] == chips.CHIPS["v5p"].memory
  )
  flops = values["flops"]
  assert flops["compiled"]
  assert flops["useful"] == pytest.approx(flops["model"], rel=0.02)
  # XLA makes no loop of the dense layer, and still computes it again, but for its
  # last product, which no gradient needs.
  again = sum(stage["again"] for stage in values["stages"])
  assert 0.9 * again < flops["recomputed"] <= again
  assert flops["static"] > flops["useful"]
  sizes = {
    one["axis"]: (one["axis_bytes"], one["formula_bytes"])
    for one in values["collectives"]
  }
  for axis in ("fsdp", "expert", "fsdp,expert"):
    sent, formula = sizes[axis]
    assert sent == pytest.approx(formula, rel=0.05), axis
  low, high = values["roofline_seconds"]
  assert 0 < low < high


@pytest.mark.aot
def test_what_fits_nowhere_is_said_at_once(tmp_path):
  path = tmp_path / "plan.json"
  flags = ["--config=configs/deepseek_v3.py", "--topology=v5p:2x2x1"]
  done = run(*flags, "--mesh=expert:4", f"--json={path}")
  assert done.returncode == 2
  [sentence] = done.stderr.strip().splitlines()
  assert "GB more than the 102.8 GB" in sentence
  assert "take more of them" in sentence
  values = json.loads(path.read_text())
  assert not values["fits"] and values["compile_seconds"] == 0


@pytest.mark.long
@pytest.mark.aot
def test_all_arms_for_a_pod():
  arm = "load_balancing/1b-bias"
  done = subprocess.run(
    [sys.executable, "-m", "tests.pod_programs", arm],
    capture_output=True,
    text=True,
    env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
  )
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert f"{arm}: compiled, fits True" in lines
  assert len(lines) > 20
  assert all(line.endswith(("lowered", "True")) for line in lines)
