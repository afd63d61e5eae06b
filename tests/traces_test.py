"""Router traces: recorded, replayed and analysed."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import evaluate, report
from moe_jax.core import registry
from moe_jax.core.errors import ConfigError
from moe_jax.data.text import mixed
from moe_jax.moe import experts as experts_lib
from moe_jax.moe import layer as layer_lib
from moe_jax.moe import linen
from moe_jax.run import config as config_lib
from moe_jax.run import run_directory
from moe_jax.training import loop, program, traces
from tests import compiled, mesh_cases, small
from tests.loop_test import Told

STEPS = 4
MESH = (2, 1, 2, 1)


def settings(**changes):
  c = small.config()
  c.train.update(num_steps=STEPS, log_every=1)
  c.checkpoint.every = 2
  for key, value in changes.items():
    section = c
    *path, last = key.split("__")
    for name in path:
      section = section[name]
    section[last] = value
  return config_lib.locked(c.to_dict())


@pytest.fixture(scope="module")
def patched():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mixed, "prepare", lambda *a, **k: small.SmallCorpus())
    patch.setattr(program.parallel, "mesh_or_none", lambda *_: None)
    yield


def run(path, config):
  made = program.Program(config)
  with run_directory.RunDirectory(path, config) as directory:
    loop.run(made, 3, directory, Told(None))
  lines = run_directory.read_metrics(path, "train")
  for line in lines:
    del line["tokens_per_second"]
  return made, lines


@pytest.fixture(scope="module")
def recorded(patched, tmp_path_factory):
  """(folder of a run with a trace of every step, its program, its lines)."""
  folder = tmp_path_factory.mktemp("recorded") / "run"
  hooks = {"trace": {"name": "trace", "every": 1}}
  made, lines = run(folder, settings(train__hooks=hooks))
  return folder, made, lines


def test_the_hook_changes_nothing(recorded, tmp_path):
  _, _, lines = recorded
  assert run(tmp_path / "plain", settings())[1] == lines


def test_a_trace_is_what_the_model_chose(recorded):
  """Choices are those of the first step, from the initial parameters."""
  folder, made, _ = recorded
  trace = traces.load(folder / "trace" / "00000001.safetensors")
  assert trace.step == 1 and [*trace.layers] == ["00", "01"]
  assert trace.domains == ("a", "b")
  batch = made.batches(3)[0]
  rows, length = 2 * small.ROWS, small.L
  np.testing.assert_array_equal(
    trace.arrays["token"], batch["inputs"].reshape(rows, length)
  )
  state = made.init(jax.random.key(3))
  inputs, mask = (jnp.asarray(batch[k][0]) for k in ("inputs", "mask"))
  _, aux = compiled.apply(
    made.model,
    {"params": state.params, "balance": state.balance},
    *(inputs, mask, jax.random.fold_in(state.rng, 0)),
    train=True,
    collect="routing",
  )
  (path,) = made.model.sublayers
  chosen = functools.reduce(lambda tree, k: tree[k], path.split("/"), aux)
  for r, layer in enumerate(trace.layers):
    expert = np.asarray(chosen["choice"].expert_TK[r]).reshape(
      small.ROWS, length, -1
    )
    valid = np.asarray(mask)[..., None]
    found = trace.arrays[f"{layer}/expert"][: small.ROWS]
    np.testing.assert_array_equal(found, np.where(valid, expert, -1))
    weight = np.asarray(chosen["choice"].weight_TK[r]).reshape(expert.shape)
    np.testing.assert_allclose(
      trace.arrays[f"{layer}/weight"][: small.ROWS],
      np.where(valid, weight, 0),
      rtol=1e-5,
    )
    score = trace.arrays[f"{layer}/score"]
    assert (score[trace.arrays["mask"]] > 0).all() and score.max() <= 1


def test_a_replayed_run_is_the_recorded_one(recorded, tmp_path):
  """Bit for bit: losses, gradients and loads of every step."""
  folder, _, lines = recorded
  replay = {"name": "next_token", "replay": str(folder / "trace")}
  assert run(tmp_path / "again", settings(task=replay))[1] == lines


def test_replayed_experts_are_forced(recorded, tmp_path, monkeypatch):
  """With other parameters the experts are those of the trace, and weights live;
  also on a mesh, and where layers are computed again for the gradient."""
  folder, made, _ = recorded
  trace = traces.load(folder / "trace" / "00000001.safetensors")
  replay = {"name": "next_token", "replay": str(folder / "trace")}
  hooks = {"trace": {"name": "trace", "every": 1}}
  changes = dict(model__norm_eps=0.1, train__num_steps=1, train__hooks=hooks)
  on_mesh = dict(model__remat="block", mesh=MESH, train__check_mesh=False)
  other = settings(task=replay, **on_mesh, **changes)
  with monkeypatch.context() as patch:
    mesh = mesh_cases.make_mesh(MESH)
    patch.setattr(program.parallel, "mesh_or_none", lambda *_: mesh)
    run(tmp_path / "other", other)
  found = traces.load(tmp_path / "other" / "trace" / "00000001.safetensors")
  for layer in trace.layers:
    for name, same in (("expert", True), ("weight", False)):
      equal = found.arrays[f"{layer}/{name}"] == trace.arrays[f"{layer}/{name}"]
      assert equal.all() == same
  run(tmp_path / "plain", settings(**changes))
  found = traces.load(tmp_path / "plain" / "trace" / "00000001.safetensors")
  assert any(
    (found.arrays[f"{x}/expert"] != trace.arrays[f"{x}/expert"]).any()
    for x in trace.layers
  )


def test_a_replay_of_layers_with_other_numbers_of_experts():
  """The arrays of a batch have K of the widest layer; a layer takes its own."""
  router = registry.load("routers", "top_k", top_k=2)
  dispatcher = registry.load("dispatchers", "sorted")
  recipe = layer_lib.Recipe(4, router, dispatcher, experts_lib.build(8))
  module = linen.MoE(recipe)
  x_BLD = jax.random.normal(jax.random.key(0), (2, 3, 8))
  variables = jax.jit(module.init)(jax.random.key(1), x_BLD)
  replayed = np.full((2, 3, 2, 3), -1, np.int16)
  replayed[:, :, 1, :2] = 3, 0
  call = functools.partial(module.apply, variables, x_BLD, collect="routing")
  call = jax.jit(call)
  _, _, kept = call(replayed=replayed, layer_index=1)
  chosen = np.asarray(kept["choice"].expert_TK).reshape(-1, 2)
  assert (chosen == [[3, 0]]).all()
  assert kept["choice"].valid_TK.all()


def test_traces_that_do_not_fit(recorded, tmp_path):
  folder, _, _ = recorded
  replay = {"name": "next_token", "replay": str(folder / "trace")}

  def refused(words, **changes):
    with pytest.raises(ConfigError, match=words):
      run(
        tmp_path / f"refused_{len(changes)}_{words[:9]}",
        settings(**{"task": replay} | changes),
      )

  refused(
    "layer 00 has .*'num_experts': 4.*'num_experts': 8",
    model__moe__num_experts=8,
  )
  refused("layer 01 has .* has none", model__num_layers=1)
  refused(
    "is for routers that can be told",
    model__moe__router={"name": "random"},
    model__moe__balancers={},
  )
  # Second experts that were drawn away are not in a trace.
  refused(
    "is for routers that can be told",
    model__moe__router={"name": "top_k", "second_expert": "random"},
    model__moe__top_k=2,
  )
  refused("other tokens than step 1", data__seq_len=8)
  missing = {"name": "next_token", "replay": str(tmp_path)}
  refused("has no trace of step 1; record", task=missing)
  with pytest.raises(ConfigError, match="no trace of step 5"):
    program.Program(settings(task=replay, train__num_steps=6))  # Not in step 5.


def test_files_that_are_no_traces(recorded, tmp_path):
  folder, _, _ = recorded
  whole = (folder / "trace" / "00000001.safetensors").read_bytes()
  path = tmp_path / "x.safetensors"
  for content in (b"", b"hello", whole[:100], whole[: len(whole) // 2]):
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is no router trace"):
      traces.load(path)
  from safetensors.numpy import save

  path.write_bytes(save({"a": np.zeros(3)}))
  with pytest.raises(ConfigError, match="is no router trace"):
    traces.load(path)
  facts = {
    "layers": {"00": {"num_experts": 4, "top_k": 2}},
    "domains": [],
    "step": 1,
  }
  path.write_bytes(
    save({"token": np.zeros(3)}, {traces.HEADER: json.dumps(facts)})
  )
  with pytest.raises(ConfigError, match="is no router trace .*tokens of shape"):
    traces.load(path)


def test_damaged_traces(tmp_path):
  """Whatever an analysis or a replay would trip over is found when it is read."""
  from safetensors.numpy import save

  path = tmp_path / "x.safetensors"
  whole = drawn()
  arrays = {k: np.array(x) for k, x in whole.arrays.items()}
  arrays["01/weight"] = arrays["01/score"] = np.ones(
    arrays["01/expert"].shape, np.float32
  )
  facts = {"layers": whole.layers, "domains": whole.domains, "step": 1}

  def write(changed=(), **header):
    kept = {
      k: v for k, v in {**arrays, **dict(changed)}.items() if v is not None
    }
    header = {traces.HEADER: json.dumps(facts | header)}
    path.write_bytes(save(kept, header))

  write()
  assert traces.load(path).layers == whole.layers

  def put(name, at, value):
    x = arrays[name].copy()
    x[at] = value
    return {name: x}

  expert, shape = arrays["01/expert"], arrays["token"].shape
  for changed, words in (
    (
      put("01/expert", (0, 0, 0), 5),
      r"01/expert has values outside of \[-1, 4\]",
    ),
    (put("01/expert", (0, 0, 0), -2), "outside"),
    (put("01/expert", (0, 0), 3), "expert twice"),
    ({"01/expert": expert.astype(np.float32)}, "01/expert is float32"),
    ({"01/expert": expert[..., :1]}, r"not i \(6, 20, 2\)"),
    ({"01/weight": arrays["01/weight"][:, :5]}, "01/weight is"),
    (put("01/score", (1, 1, 1), np.nan), "01/score has values"),
    ({"01/score": None}, "01/score"),
    (put("token", (0, 0), -1), "token has values"),
    (put("domain", 0, -1), "domain has values"),
    ({"domain": arrays["token"]}, "domain is"),
    ({"mask": arrays["mask"][1:]}, "mask is"),
    ({"mask": np.zeros(shape, bool)}, "all its tokens are padding"),
  ):
    write(changed)
    with pytest.raises(ConfigError, match=f"is no router trace .*{words}"):
      traces.load(path)
  for layers in (
    {},
    {"01": {"top_k": 2}},
    {"01": {"num_experts": "many"}},
    [3],
  ):
    write(layers=layers)
    with pytest.raises(ConfigError, match="is no router trace"):
      traces.load(path)


# Analyses, against loops.


def drawn(seed=0, rows=6, length=20, experts=5, top_k=2) -> traces.Trace:
  rng = np.random.default_rng(seed)
  order = rng.permuted(np.tile(np.arange(experts), (rows, length, 1)), axis=-1)
  mask = rng.random((rows, length)) < 0.8
  expert = np.where(mask[..., None], order[..., :top_k], -1)
  expert[..., 1] = np.where(rng.random(mask.shape) < 0.2, -1, expert[..., 1])
  # Other traces are of the same tokens.
  token = np.random.default_rng(9).integers(0, 7, (rows, length))
  arrays = {
    "token": token,
    "mask": np.random.default_rng(8).random((rows, length)) < 0.9,
    "domain": np.arange(rows) % 3,
    "01/expert": expert,
  }
  layers = {"01": {"num_experts": experts, "top_k": top_k}}
  return traces.Trace(layers, ("a", "b", "c"), 1, arrays)


def tokens_of(trace):
  """(row, place, its experts) of unpadded tokens."""
  for row, place in zip(*np.nonzero(trace.arrays["mask"])):
    experts = trace.arrays["01/expert"][row, place]
    yield row, place, {e for e in experts.tolist() if e >= 0}


def test_saturation():
  early, late = drawn(1), drawn(2)
  shares = [
    len(a & b) / len(b)
    for (*_, a), (*_, b) in zip(tokens_of(early), tokens_of(late))
    if b
  ]
  found = traces.saturation(early, late)["01"]
  assert found == pytest.approx(np.mean(shares)) and 0 < found < 1
  assert traces.saturation(late, late)["01"] == 1
  with pytest.raises(ConfigError, match="same layers and tokens"):
    traces.saturation(early, drawn(2, rows=5))


def test_domains_without_names():
  """A trace of training has their numbers alone."""
  trace = drawn(4)
  named, unnamed = trace, trace._replace(domains=())
  np.testing.assert_array_equal(
    traces.by_domain(unnamed)["01"], traces.by_domain(named)["01"]
  )


def test_coactivation():
  trace, together, count = drawn(3), np.zeros((5, 5)), np.zeros(5)
  for *_, experts in tokens_of(trace):
    for i in experts:
      count[i] += 1
      for j in experts - {i}:
        together[i, j] += 1
  found = traces.coactivation(trace)["01"]
  np.testing.assert_allclose(found, together / count[:, None])
  assert (found.diagonal() == 0).all() and found.max() > 0


def test_specialisation():
  trace = drawn(4)
  token, domain = np.zeros((7, 5)), np.zeros((3, 5))
  seen, of_domain = np.zeros(7), np.zeros(3)
  for row, place, experts in tokens_of(trace):
    number = trace.arrays["token"][row, place]
    seen[number] += 1
    of_domain[row % 3] += 1
    for e in experts:
      token[number, e] += 1
      domain[row % 3, e] += 1
  np.testing.assert_allclose(
    traces.by_domain(trace)["01"], domain / of_domain[:, None]
  )
  share = token / seen[:, None]
  np.testing.assert_allclose(traces.by_token(trace, 7)["01"], share)
  expected = sum(share[v].max() * seen[v] for v in range(7)) / seen.sum()
  found = traces.vocabulary(trace, 7, least=1)["01"]
  assert found == pytest.approx(expected)
  assert traces.vocabulary(trace, 7, least=10**6) == {"01": 0.0}


# The commands.


def test_evaluate_and_report(recorded, tmp_path, monkeypatch, capsys):
  """Traces of a run's parameters, and of those two steps before."""
  folder, _, _ = recorded
  monkeypatch.setattr(mixed, "prepare", lambda *a, **k: small.SmallCorpus())
  files = []
  for step in (2, 4):
    files.append(str(tmp_path / f"{step}.safetensors"))
    checkpoint = str(folder / "checkpoints" / str(step))
    assert not evaluate.main(
      [f"--checkpoint={checkpoint}", f"--trace={files[-1]}"]
    )
  capsys.readouterr()
  assert [traces.load(file).step for file in files] == [2, 4]
  trace = traces.load(files[1])
  assert trace.domains == ("a", "b") and {*trace.arrays["domain"]} == {0, 1}
  for layer, sizes in trace.layers.items():
    chosen = trace.arrays[f"{layer}/expert"]
    real = trace.arrays["mask"]
    assert (chosen[~real] == -1).all() and (chosen[real] >= 0).all()
    assert chosen.max() == sizes["num_experts"] - 1
  out = tmp_path / "report"
  assert not report.main([*files, f"--out={out}"])
  text = capsys.readouterr().out
  assert "saturation" in text and "| 01 |" in text
  facts = json.loads((out / "traces.json").read_text())
  assert 0 < facts["saturation"]["00"] <= 1
  assert np.shape(facts["by_domain"]["01"]) == (2, 4)
  for name in ("coactivation", "domains"):
    assert (out / f"{name}.png").stat().st_size > 5000
  with pytest.raises(ConfigError, match="one trace or two, not 3"):
    report.main([*files, files[0]])
