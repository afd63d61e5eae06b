"""The benchmark's ways of computing a layer are one layer, and its ratios."""

import functools
import json

import jax
import numpy as np
import pytest

from benchmarks import moe_layer
from moe_jax.errors import ConfigError

SMALL = moe_layer.Shape(d_model=16, d_expert=8, num_experts=4, top_k=2)


@pytest.fixture
def small(monkeypatch):
  monkeypatch.setattr(moe_layer, "TOKENS", 64)
  monkeypatch.setitem(moe_layer.SHAPES, "small", SMALL)
  return moe_layer.implementations(SMALL, tokens_per_group=32)


def test_all_of_them_compute_the_same(small):
  """And those with a capacity do for the tokens of which none is dropped."""

  @functools.cache
  def value_and_gradient(name):
    layer, params, x_TD = small[name]

    @jax.jit
    def both(params, x_TD):
      y_TD, pull = jax.vjp(layer, params, x_TD)
      return y_TD, pull(x_TD)

    return jax.tree.leaves(both(params, x_TD))

  ours = value_and_gradient("sorted/cpu")
  for name in set(moe_layer.DROPLESS) - {"sorted/cpu"}:
    for one, other in zip(ours, value_and_gradient(name), strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
  for name in moe_layer.DROPPING:
    layer, params, x_TD = small[name]
    same_TD = np.isclose(layer(params, x_TD), ours[0], rtol=1e-4, atol=1e-4)
    assert same_TD.all(1).mean() > 0.5, name
  for one, other in zip(*map(value_and_gradient, moe_layer.DENSE)):
    np.testing.assert_allclose(one.ravel(), other.ravel(), rtol=1e-4, atol=1e-4)


def test_ratios_are_of_the_faster_dense_layer():
  seconds = {
    "dense": {d: [2.0, 4.0, 2.0] for d in moe_layer.DIRECTIONS},
    "dense/cpu": {d: [1.0, 2.0, 1.0] for d in moe_layer.DIRECTIONS},
    "slow": {d: [10.0] for d in moe_layer.DIRECTIONS},
    "fast": {d: [1.5, 2.0, 1.0] for d in moe_layer.DIRECTIONS},
  }
  run = {"seconds": seconds, "matmul_flops_per_second": 1e12}
  rows = moe_layer.summarize("S1", [run, run])
  found = {r["implementation"]: r["forward_ratio"] for r in rows}
  assert found == {"dense": 2.0, "dense/cpu": 1.0, "slow": 10.0, "fast": 1.0}
  assert rows[0]["forward_backward_ratio_interval"] == 0
  share = moe_layer.SHAPES["S1"].flops / 1e12
  assert rows[1]["forward_of_matmul_peak"] == pytest.approx(share)
  text = moe_layer.table(rows, "S1")
  assert "| fast | 1.00 ± 0.00 | 1.00 ± 0.00 |" in text


def test_it_times_and_writes_json(small, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(moe_layer, "_peak", lambda: 1e9)
  monkeypatch.setattr(
    moe_layer,
    "_child",
    lambda shape, args: moe_layer.measure(shape, args.rounds, args.only),
  )
  path = tmp_path / "layer.json"
  flags = ["--shapes=small", "--processes=2", "--rounds=2", "--only=ragged_dot"]
  assert moe_layer.main([*flags, f"--json={path}"]) == 0
  found = json.loads(path.read_text())
  assert {"processor", "cores", "jax", "date"} <= found["machine"].keys()
  names = [row["implementation"] for row in found["rows"]]
  assert names == ["dense", "dense/cpu", "ragged_dot"]
  assert all(row["forward_ratio"] > 0 for row in found["rows"])
  assert "| ragged_dot |" in capsys.readouterr().out


def test_what_there_is_not():
  with pytest.raises(ConfigError, match='no shape "S9"; did you mean'):
    moe_layer.main(["--shapes=S9"])
  with pytest.raises(ConfigError, match='"sorted" .*did you mean "sorted/cpu"'):
    moe_layer.main(["--shapes=S1", "--only=sorted"])
