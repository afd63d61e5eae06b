"""The benchmarks compute what they say, and divide by what they say."""

import contextlib
import functools
import io
import json
import math
import pathlib
import platform

import jax
import numpy as np
import pytest

from benchmarks import (
  layers,
  moe_layer,
  profile,
  routing,
  scaling,
  shapes,
  tables,
  timing,
  topologies,
  traffic,
  train_step,
)
from configs import base
from moe_jax import main
from moe_jax.core.errors import ConfigError
from moe_jax.run import run_directory

SMALL = shapes.Shape(16, 8, num_experts=4, top_k=2, tokens=64)
SKEW = 0.5  # Added to tokens, some experts are full.
MODULES = {
  f"benchmarks.{m.__name__.split('.')[-1]}": m
  for m in (
    *(moe_layer, profile, routing, scaling, topologies),
    train_step,
  )
}


@pytest.fixture
def small(monkeypatch):
  """A small shape; every "process" is a call in this one."""
  monkeypatch.setitem(shapes.SHAPES, "small", SMALL)
  monkeypatch.setattr(timing, "matmul_peak", lambda: 1e9)

  def call(module, flags, count):
    found = []
    for _ in range(count):
      with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert MODULES[module].main(flags) == 0
      found.append(json.loads(printed.getvalue()))
    return found

  monkeypatch.setattr(timing, "processes", call)


def dropped(name):
  """Tokens that lose a choice to a full expert, first come first served."""
  params, _, x_TD = layers.inputs(SMALL)
  logits_TE = np.asarray((x_TD + SKEW) @ params["router"]["kernel"])
  expert_TK = np.argsort(-logits_TE, axis=1)[:, : SMALL.top_k]
  tokens = 32 if name.startswith("einsum") else SMALL.tokens  # Per group.
  slots = math.ceil(1.25 * tokens * SMALL.top_k / SMALL.num_experts)
  lost_T = np.zeros(SMALL.tokens, bool)
  for start in range(0, SMALL.tokens, tokens):
    taken_E = np.zeros(SMALL.num_experts, int)
    for t in range(start, start + tokens):
      for e in expert_TK[t]:
        lost_T[t] |= taken_E[e] >= slots
        taken_E[e] += 1
  return lost_T


def test_all_ways_of_a_layer_compute_the_same(small):
  """And those with a capacity do for the tokens of which none is dropped."""
  named = layers.implementations(SMALL, tokens_per_group=32)

  @functools.cache
  def value_and_gradient(name):
    f, params, x_TD = named[name]
    both = jax.jit(functools.partial(layers.forward_backward, f))
    return jax.tree.leaves(both(params, x_TD + SKEW, x_TD))

  ours = value_and_gradient("sorted/cpu")
  for name in set(shapes.DROPLESS) - {"sorted/cpu"}:
    for one, other in zip(ours, value_and_gradient(name), strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
  for name in shapes.DROPPING:
    f, params, x_TD = named[name]
    y_TD = jax.jit(f)(params, x_TD + SKEW)
    same_TD = np.isclose(y_TD, ours[0], rtol=1e-4, atol=1e-4)
    drops = dropped(name)
    assert (same_TD.all(1) | drops).all() and 0 < drops.mean() < 0.5, name
  for one, other in zip(*map(value_and_gradient, shapes.DENSE)):
    np.testing.assert_allclose(one.ravel(), other.ravel(), rtol=1e-4, atol=1e-4)


def test_experts_alone_are_the_experts():
  """Row i goes to an expert by its place, in an order of its own."""
  f, params, x_TD = layers.implementations(SMALL)[shapes.NOT_ROUTED[0]]
  w, wanted_TD = params["experts"], np.zeros(x_TD.shape)
  rows = SMALL.tokens * SMALL.top_k // SMALL.num_experts
  for i in range(SMALL.tokens * SMALL.top_k):
    x_D, e = x_TD[i % SMALL.tokens], i // rows
    gate_F, up_F = (np.asarray(x_D @ w[name][e]) for name in ("gate", "up"))
    hidden_F = gate_F / (1 + np.exp(-gate_F)) * up_F
    wanted_TD[i % SMALL.tokens] += hidden_F @ w["down"][e]
  np.testing.assert_allclose(f(params, x_TD), wanted_TD, atol=1e-4)


def test_ratios_are_of_the_faster_dense_layer():
  seconds = {
    "dense": {d: [2.0, 4.0, 2.0] for d in shapes.DIRECTIONS},
    "dense/cpu": {d: [1.0, 2.0, 1.0] for d in shapes.DIRECTIONS},
    "slow": {d: [10.0] for d in shapes.DIRECTIONS},
    "fast": {d: [1.5, 2.0, 1.0] for d in shapes.DIRECTIONS},
  }
  needed = dict.fromkeys(
    (*seconds, "huge"), dict.fromkeys(shapes.DIRECTIONS, 2**40)
  )
  run = {"seconds": seconds, "bytes": needed, "matmul_flops_per_second": 1e12}
  later = run | {"seconds": {k: v for k, v in seconds.items() if k != "slow"}}
  rows = moe_layer.summarize("S1", [run, later])
  found = {r["implementation"]: r.get("forward_ratio") for r in rows}
  assert found == {
    "dense": 2.0,
    "dense/cpu": 1.0,
    "slow": 10.0,
    "fast": 1.0,
    "huge": None,
  }
  assert [r["processes"] for r in rows] == [2, 2, 1, 2, 0]
  assert rows[0]["forward_backward_ratio_least"] == 2.0
  share = shapes.SHAPES["S1"].flops / 1e12
  assert rows[1]["forward_of_matmul_peak"] == pytest.approx(share)
  text = moe_layer.table(rows)
  assert "| dense | 2.00 / 2.00 |" in text and "| fast | 1.00 / 1.00 |" in text
  assert "| huge | needs 1024 GB / needs 1024 GB |" in text


def test_a_median_comes_with_its_ends():
  row = timing.summary("it", [1.0, 4.0, 2.0])
  assert row == {"it": 2.0, "it_least": 1.0, "it_most": 4.0}
  assert timing.cell(row, "it", digits=1) == "2.0 (1.0–4.0)"
  assert timing.cell(timing.summary("it", [1.0]), "it", 100, 0) == "100"


def test_in_turn_warms_up_once():
  calls = []
  ready = {k: functools.partial(calls.append, k) for k in ("fast", "slow")}
  found = timing.in_turn(ready, 3, lambda key, seconds: key == "slow")
  assert calls == ["fast", "slow", "fast", "fast", "fast"]
  assert (len(found["fast"]), len(found["slow"])) == (3, 1)


def test_moe_layer(small, tmp_path, capsys):
  path = tmp_path / "layer.json"
  flags = ["--shapes=small", "--processes=2", "--rounds=2", "--only=ragged_dot"]
  assert moe_layer.main([*flags, f"--json={path}"]) == 0
  found = json.loads(path.read_text())
  machine = found["machine"]
  assert machine["cores"] >= machine["cores_used"] >= 1
  assert machine["processor"] and machine["device"] == "cpu"
  names = [row["implementation"] for row in found["rows"]]
  assert names == ["dense", "dense/cpu", "ragged_dot"]
  assert all(row["forward_ratio"] > 0 for row in found["rows"])
  assert "| ragged_dot |" in capsys.readouterr().out


def test_moe_layer_leaves_out_what_has_no_room(small, monkeypatch):
  calls = {
    name: layers.directions(*layers.implementations(SMALL)[name])
    for name in (*shapes.DENSE, "ragged_dot")
  }
  most = max(c["forward_backward"].made_bytes for c in calls.values())
  assert most == calls["ragged_dot"]["forward_backward"].made_bytes
  monkeypatch.setattr(timing, "memory", lambda: most)
  found = moe_layer.measure("small", 1, ["ragged_dot"])
  assert "forward_backward" not in found["seconds"].get("ragged_dot", {})
  assert found["bytes"]["ragged_dot"]["forward_backward"] == most


def test_routing(small, tmp_path, capsys):
  path = tmp_path / "routing.json"
  flags = ["--shapes=small", "--processes=2", "--rounds=2", f"--json={path}"]
  assert routing.main(flags) == 0
  rows = json.loads(path.read_text())["rows"]
  seconds = {row["stage"]: row["seconds"] for row in rows}
  least = max(seconds[stage] for stage in routing.ALL)
  assert seconds[routing.WITHOUT_EXPERTS] >= least
  assert "| combine |" in capsys.readouterr().out


@pytest.mark.long
def test_scaling(small, tmp_path, monkeypatch, capsys):
  growing = {t: SMALL._replace(tokens=t) for t in (32, 64)}
  monkeypatch.setitem(scaling.CURVES, "T", scaling.Curve("tokens", growing))
  flags = ["--curves=T", "--shapes=S3", "--processes=1", "--rounds=1"]
  flags += [f"--json={tmp_path / 'it.json'}", f"--figure={tmp_path / 'it'}"]
  monkeypatch.setitem(shapes.SHAPES, "S3", SMALL)
  assert scaling.main(flags) == 0
  curve, other, loads, memory = json.loads((tmp_path / "it.json").read_text())[
    "rows"
  ]
  assert (curve["value"], other["value"]) == (32, 64)
  assert curve["forward_exponent"] == other["forward_exponent"]
  assert curve["forward_per_flop_over_first"] == 1
  assert loads["forward_backward_ratio"] > 0
  assert memory["weight_gradient_bytes"] == 4 * 3 * 4 * 16 * 8
  others = memory["bytes"] - memory["weight_gradient_bytes"]
  ratio = memory["without_weight_gradients_over_dense"]
  assert ratio == others / memory["dense_bytes"] > 0.5
  assert {p.name for p in tmp_path.iterdir()} == {"it.json", "it.png", "it.pdf"}
  assert "Exponents: " in capsys.readouterr().out


def test_exponents_are_slopes():
  def runs(power):
    seconds = lambda value: {d: [value**power] for d in shapes.DIRECTIONS}  # noqa: E731
    names = (*shapes.DENSE, "sorted/cpu")
    return {
      str(v): dict.fromkeys(names, seconds(v))
      | {"bytes": dict.fromkeys(shapes.DIRECTIONS, v**2)}
      for v in growing
    }

  growing = {v: SMALL._replace(tokens=v) for v in (1024, 2048, 8192)}
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(scaling.CURVES, "T", scaling.Curve("tokens", growing))
    rows = scaling.summarize("T", [runs(1.0), runs(1.1), runs(1.3)])
  assert rows[0]["forward_exponent"] == pytest.approx(1.1)
  assert rows[0]["forward_exponent_least"] == pytest.approx(1.0)
  assert rows[0]["forward_bytes_exponent"] == pytest.approx(2.0)
  assert rows[0]["forward_ratio"] == 1
  assert rows[2]["forward_per_flop_over_first"] == pytest.approx(8**0.1)


def test_the_product_of_the_router_is_work_too(monkeypatch):
  """Time that grows with it costs no more for a FLOP."""
  growing = {e: SMALL._replace(num_experts=e) for e in (4, 24)}
  curve = scaling.Curve("experts", growing)
  monkeypatch.setitem(scaling.CURVES, "E", curve)

  def point(shape):
    flops = float(shape.flops + shape.router_flops)
    seconds = dict.fromkeys(shapes.DIRECTIONS, [flops])
    names = (*shapes.DENSE, "sorted/cpu")
    made = {"bytes": dict.fromkeys(shapes.DIRECTIONS, 1)}
    return dict.fromkeys(names, seconds) | made

  run = {str(value): point(shape) for value, shape in growing.items()}
  rows = scaling.summarize("E", [run])
  assert rows[1]["forward_per_flop_over_first"] > 1.1
  text = scaling.table(rows)
  assert text.splitlines()[3].count("| 1.00 | 1.00 |") == 2
  assert "Zipf" not in text and "gradients of experts" not in text


def test_forced_loads_are_not_folded_away():
  """The sort is done each time, and experts are the ones that are asked for."""
  params, _, x_TD = layers.inputs(SMALL)
  expert_TK = scaling.assignments(SMALL, "equal")
  f, of_loads = scaling.forced(SMALL, params, expert_TK)
  call = layers.directions(f, of_loads, x_TD)["forward"]
  assert " sort(" in call.compiled.as_text()
  # Its own choice gives the layer's result, and another one another.
  logits_TE = np.asarray(x_TD @ params["router"]["kernel"])
  own_TK = np.argsort(-logits_TE, axis=1)[:, : SMALL.top_k]
  f, own = scaling.forced(SMALL, params, own_TK)
  layer = layers.implementations(SMALL)["sorted/cpu"][0]
  np.testing.assert_allclose(f(own, x_TD), layer(params, x_TD), atol=1e-5)
  assert not np.allclose(call(), layer(params, x_TD), atol=1e-2)


def test_loads_are_compared_as_they_are_called():
  run = {
    "equal": dict.fromkeys(shapes.DIRECTIONS, [2.0, 4.0]),
    "Zipf": dict.fromkeys(shapes.DIRECTIONS, [3.0, 6.0]),
  }
  assert scaling.loads_of("S1", [run])["forward_ratio"] == 1.5


def test_loads_of_zipf_follow_its_law():
  shape = shapes.Shape(8, 8, num_experts=16, top_k=1, tokens=50_000)
  counts_E = np.bincount(scaling.assignments(shape, "Zipf")[:, 0], minlength=16)
  wanted_E = 1 / np.arange(1, 17)
  np.testing.assert_allclose(
    counts_E / counts_E.sum(), wanted_E / wanted_E.sum(), atol=0.01
  )
  two = scaling.assignments(shape._replace(top_k=2), "Zipf")
  assert (two[:, 0] != two[:, 1]).all()
  equal_TK = scaling.assignments(shapes.SHAPES["S1"], "equal")
  assert set(np.bincount(equal_TK.reshape(-1))) == {512}
  assert (equal_TK[:, 0] != equal_TK[:, 1]).all()


@pytest.mark.long
def test_a_profile(small, tmp_path, capsys):
  path = tmp_path / "profile.json"
  flags = ["--shapes=small", "--rounds=1", "--processes=2", f"--json={path}"]
  assert profile.main(flags) == 0
  rows = json.loads(path.read_text())["rows"]
  assert [(row["implementation"], row["direction"]) for row in rows] == [
    (name, direction)
    for name in ("dense/cpu", "sorted/cpu")
    for direction in shapes.DIRECTIONS
  ]
  for row in rows:
    assert 0 < row["products"] < row["wall"] * timing.cores()
  assert f"| small | dense/cpu | forward | {1e3 * rows[0]['wall']:.0f} |" in (
    capsys.readouterr().out
  )
  with pytest.raises(ConfigError, match='"dense/cpi" is not in the table'):
    profile.main(["--only=dense/cpi"])


def test_operations_are_of_a_kind():
  text = """HloModule jit_f

%fused (p: f32[4,4]) -> f32[4,4] {
  %p = f32[4,4]{1,0} parameter(0)
  ROOT %d = f32[4,4]{1,0} dot(%p, %p), lhs_contracting_dims={1}
}

%zero (p.1: f32[]) -> f32[4] {
  %p.1 = f32[] parameter(0)
  ROOT %b = f32[4]{0} broadcast(%p.1), dimensions={}
}

ENTRY %main (x: f32[4,4]) -> f32[4] {
  %x = f32[4,4]{1,0} parameter(0)
  %product = f32[4,4]{1,0} fusion(%x), kind=kLoop, calls=%fused
  %fill = f32[4]{0} fusion(%c), kind=kLoop, calls=%zero
  %copy.1 = f32[4]{0} copy(%fill)
  %w = (s32[], f32[4]{0}) while(%t), condition=%cond, body=%body
  %take = f32[4]{0} gather(%x, %i), offset_dims={1}
  ROOT %add.1 = f32[4]{0} add(%copy.1, %copy.1)
}
"""
  found = profile.kinds_of(text)
  wanted = {
    "product": "products",
    "fill": "fills and copies",
    "copy.1": "fills and copies",
    "w": "containers",
    "take": "gathers",
    "add.1": "element by element",
  }
  assert {name: found[name] for name in wanted} == wanted


def test_devices_that_a_token_goes_to():
  expert_NK = np.array([[0, 1], [7, 0], [4, 5]])  # Two experts a device.
  assert traffic.spread(expert_NK, 8, 4) == (4 / 3, 3 / 1.5)
  rows = traffic.summarize("run", {"00": expert_NK}, {"00": 8}, {}, [2, 3, 4])
  assert [row["devices"] for row in rows] == [2, 4]  # 3 does not divide 8.
  assert rows[1]["rows_by_choice"] == 2 * 3 / 4
  assert rows[1]["rows_by_device"] == 4 / 3 * 3 / 4
  assert "| run | 4 | 1.33 | 1.50 | 1.00 | 2.00 |" in traffic.table(rows)


@pytest.mark.long
def test_a_device_limit_is_seen_in_a_run(tmp_path, capsys):
  flags = [
    "--config=configs/tiny.py",
    "--config.mesh=(8,1,1,1)",
    "--config.train.num_steps=6",
    "--config.train.check_mesh=False",
    "--config.eval.batches_per_domain=1",
    "--config.model.moe.num_experts=8",
  ]
  groups = "'num_expert_groups': 4, 'top_expert_groups': 1"
  limited = [f"--config.model.moe.router={{'name': 'top_k', {groups}}}"]
  for name, more in (("free", []), ("limited", limited)):
    assert main.main([*flags, *more, f"--workdir={tmp_path / name}"]) == 0
  capsys.readouterr()
  given = [f"--workdir={tmp_path / name}" for name in ("free", "limited")]
  # The config now says that the run had fewer devices than are here.
  file = tmp_path / "free" / "config.json"
  config = json.loads(file.read_text())
  file.write_text(json.dumps(config | {"mesh": [1, 1, 4, 1]}))
  path = tmp_path / "traffic.json"
  assert traffic.main([*given, "--devices=4", f"--json={path}"]) == 0
  free, limit = json.loads(path.read_text())["rows"]
  assert 1 < free["devices_per_token"] <= 2 == free["rows_by_choice"] / 0.75
  assert limit["devices_per_token"] == 1
  [*_, line] = run_directory.read_metrics(tmp_path / "limited", "validation")
  assert limit["loss"] == line["loss"] != free["loss"]
  assert limit["router"] == {"num_expert_groups": 4, "top_expert_groups": 1}
  with pytest.raises(ConfigError, match="no config file"):
    traffic.main([f"--workdir={tmp_path / 'nothing'}"])


def test_flops_and_collectives_of_topologies(small, tmp_path, capsys):
  flags = ["--devices=8", f"--json={tmp_path / 'it.json'}"]
  assert topologies.main([*flags, f"--figure={tmp_path / 'it'}"]) == 0
  rows = json.loads((tmp_path / "it.json").read_text())["rows"]
  kinds = {(row["kind"], row["axes"]) for row in rows}
  assert kinds == {("all-to-all", "expert"), ("all-reduce", "expert")}
  assert all(row["bytes"] == row["expected_bytes"] > 0 for row in rows)
  shape = topologies.Shape()
  products = 3 * 6 * shape.slots * shape.num_experts
  products *= shape.d_model * shape.d_expert
  assert 1 < rows[0]["flops"] / products < 1.2
  assert {p.name for p in tmp_path.iterdir()} == {"it.json", "it.png", "it.pdf"}
  assert "| 8 | 1,1,8,1 | – |" in capsys.readouterr().out
  one = {"devices": 1, "mesh": "", "kind": "", "bytes": 0, "expected_bytes": 0}
  rows = [one | {"flops": 4.0}, one | {"devices": 8, "flops": 5.0}]
  assert "| 8 |  | 1.2500 |" in topologies.table(rows)


def test_speed_of_a_step_is_paired():
  config = base.get_config()
  configs = {"dense": config, "moe": config}
  found = [
    {"dense": [1.0, 2.0, 3.0], "moe": [2.0, 4.0, 3.0]},
    {"dense": [1.0, 1.0, 1.0], "moe": [1.0, 1.0, 1.0]},
  ]
  than = dict.fromkeys(configs, "dense")
  rows = train_step.summarize(found, configs, than)
  assert [row["relative_speed"] for row in rows] == [1.0, 0.75]
  tokens = config.data.batch_size * config.data.seq_len
  assert rows[1]["seconds_per_step"] == 2.0
  assert rows[1]["tokens_per_second"] == tokens / 2
  table = train_step.table(rows)
  assert "| moe | 2000.0 |" in table and "speed ÷ dense |" in table
  rows = train_step.summarize(found, configs, than, ["train.accumulation=2"])
  assert train_step.table(rows).startswith("With `train.accumulation=2`:\n\n|")
  # Each arm is compared with the dense arm of its own size.
  times = {"8-dense": [1.0], "8-2": [2.0], "16-dense": [3.0], "16-2": [4.0]}
  configs = dict.fromkeys(times, config)
  than = train_step.than("dense", configs)
  rows = train_step.summarize([times], configs, than)
  assert [row["relative_speed"] for row in rows] == [1.0, 0.5, 1.0, 0.75]
  assert "speed ÷ dense of its size" in train_step.table(rows)
  assert set(train_step.than("16-2", configs).values()) == {"16-2"}
  with pytest.raises(ConfigError, match="nor is there one for each"):
    train_step.than("dense", ["8-dense", "8-2", "16-2"])


def test_what_there_is_not():
  with pytest.raises(ConfigError, match='no shape "S9"; known: S1'):
    moe_layer.main(["--shapes=S9"])
  with pytest.raises(ConfigError, match='"sorted" .*did you mean "sorted/cpu"'):
    moe_layer.main(["--shapes=S1", "--only=sorted"])
  with pytest.raises(ConfigError, match='no curve "TT"; did you mean "T"'):
    scaling.main(["--curves=TT"])
  with pytest.raises(ConfigError, match="--figure draws curves"):
    scaling.main(["--curves=", "--figure=it"])
  with pytest.raises(ConfigError, match='"bia" is not .*did you mean "bias"'):
    train_step.main(["load_balancing", "--than=bia"])
  with pytest.raises(ConfigError, match="--csv keeps the times of the arms"):
    train_step.main(["load_balancing", "--csv=x.csv", "--config.seed=1"])


def test_files_that_could_not_be_written(capsys, tmp_path):
  """Are refused before hours are measured."""
  for module in (moe_layer, routing, scaling):
    with pytest.raises(SystemExit):
      module.main([f"--json={tmp_path / 'none' / 'it.json'}"])
    assert "make the folder first" in capsys.readouterr().err


def test_processes_share_what_they_compile(monkeypatch):
  seen = []

  def run(command, env):
    seen.append((command[1:], env["JAX_COMPILATION_CACHE_DIR"], env["PATH"]))
    return 0, "words\n[1, 2]\n"

  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  monkeypatch.setenv("PATH", "here")
  monkeypatch.setattr(timing, "_run", run)
  assert timing.processes("it", ["--flag"], 2) == [[1, 2], [1, 2]]
  assert timing.processes("it", ["--flag"], 1) == [[1, 2]]
  ((command, folder, path),) = set((tuple(c), f, p) for c, f, p in seen)
  assert command == ("-m", "it", "--flag") and path == "here"
  assert pathlib.Path(folder).is_dir() and len(seen) == 3


def test_a_process_that_ends_badly():
  with pytest.raises(ConfigError, match="moe_layer ended with 2; what"):
    timing.processes("benchmarks.moe_layer", ["--shapes=S9"], 1)


def test_the_document_has_the_committed_results():
  """`python -m benchmarks.tables` writes it."""
  document = tables.DOCUMENT.read_text()
  assert tables.filled(document) == document
  names = {path.name for path in tables.RESULTS.glob("*.json")}
  assert names and names == {n for n in names if f"<!-- {n} -->" in document}


def test_tables_writes_the_document(tmp_path, monkeypatch):
  monkeypatch.setattr(tables, "DOCUMENT", tmp_path / "performance.md")
  name = next(tables.RESULTS.glob("*.json")).name
  tables.DOCUMENT.write_text(f"A\n<!-- {name} -->\n<!-- end -->\nB\n")
  assert tables.main([]) == 0
  found = tables.DOCUMENT.read_text()
  assert found.startswith("A\n") and found.endswith("B\n")
  assert tables.describe(tables.RESULTS / name) in found


def test_only_what_is_between_the_marks_is_written(tmp_path, monkeypatch):
  run = {
    "seconds": dict.fromkeys(
      shapes.DENSE, dict.fromkeys(shapes.DIRECTIONS, [2.0])
    ),
    "bytes": dict.fromkeys(shapes.DENSE, dict.fromkeys(shapes.DIRECTIONS, 0)),
    "matmul_flops_per_second": 1e12,
  }
  rows = moe_layer.summarize("S1", [run])
  timing.write(tmp_path / "moe_layer_again.json", rows)
  monkeypatch.setattr(tables, "RESULTS", tmp_path)
  before = "A\n<!-- moe_layer_again.json -->\nold\n<!-- end -->\nB\n"
  after = tables.filled(before)
  assert after == tables.filled(after)
  begin, _, rest = after.partition("-->\n")
  assert begin == "A\n<!-- moe_layer_again.json " and rest.endswith("-->\nB\n")
  assert "| dense | 1.00 / 1.00 |" in rest and "old" not in rest
  assert f"Python {platform.python_version()}" in rest
