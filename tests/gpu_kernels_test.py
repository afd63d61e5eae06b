"""The kernel that a GPU gets for a product; each kernel is right.

The kernels run in Pallas' interpreter, on a stand-in for a device.
"""

import concurrent.futures
import importlib.util
import json
import os
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import params as interpreter
from jax.experimental.pallas.ops.gpu import transposed_ragged_dot_mgpu

from configs import tiny
from moe_jax import models
from moe_jax.core.errors import ConfigError
from moe_jax.moe import kernels
from moe_jax.moe.kernels import gpu
from tests import grouped_matmul_test

H100 = "NVIDIA H100 80GB HBM3"
MISSING = "no module"
# What the interpreter takes. That of jax 0.10 reads nothing transposed, and none
# takes tokamax's gradient of weights; tokamax is not there on Python 3.11.
INTERPRETED = [("pallas", "y")]
if jax.__version_info__ >= (0, 11):
  INTERPRETED += [("pallas", "dx"), ("pallas", "dw")]
if importlib.util.find_spec("tokamax"):
  INTERPRETED += [("mosaic", "y"), ("mosaic", "dx")]
LOADS = [
  (30, 0, 41, 5),
  (0, 77, 0, 0),
  (0, 0, 0, 0),
  (64, 0, 0, 64),
  (1, 2, 3, 4),
]


def device(kind=H100, capability="9.0", platform="gpu"):
  return types.SimpleNamespace(
    device_kind=kind,
    compute_capability=capability,
    platform=platform,
    core_count=3,
  )


@pytest.fixture
def on(monkeypatch):
  """Sets the device, and what is installed beside jax; forgets choices."""
  monkeypatch.setattr(gpu, "_chosen", {})
  monkeypatch.setattr(gpu, "_said", set())

  def be(found, mosaic=True, triton=True):
    monkeypatch.setattr(gpu, "device", lambda: found)
    there = {"pallas_mosaic_gpu": mosaic, "triton": triton}
    monkeypatch.setattr(
      gpu.load("mosaic"), "missing", lambda m: None if there[m] else MISSING
    )
    monkeypatch.setattr(gpu.load("triton"), "_too_old", lambda: None)

  return be


def product(kind="y", rows=131072, e=128, d=2048, f=768, dtype="bfloat16"):
  return gpu.Product(kind, rows, e, d, f, dtype)


def test_a_product_gets_the_fastest_of_its_shape(on):
  """The tiles that tokamax's authors measured for the shape of Qwen3-30B-A3B."""
  on(device())
  found = {kind: gpu.choose(product(kind)) for kind in gpu.ORDER}
  assert {k: c.candidate for k, c in found.items()} == {
    "y": "mosaic",  # 0.96 ms, Triton 1.07.
    "dx": "mosaic",  # 1.39 and 2.39.
    "dw": "triton",  # 0.66 and 3.80.
  }
  tiles = found["y"].tiles
  assert (tiles["block_m"], tiles["num_stages"], tiles["persistent"]) == (
    *(128, 4),
    True,
  )
  # A quarter of the tokens on a quarter of the experts has the same rows each.
  part = gpu.choose(product("dw", rows=32768, e=32))
  assert part == found["dw"]


def test_without_a_package_the_fastest_of_the_others(on):
  on(device(), triton=False)
  assert gpu.choose(product("dw")).candidate == "mosaic"
  assert gpu.choose(product("dw")).tiles["block_m"] == 128
  on(device(), mosaic=False, triton=False)
  gpu._chosen.clear()
  assert gpu.choose(product("dw")).candidate == "pallas"


@pytest.mark.parametrize(
  "found,kind,wanted",
  [
    (device("NVIDIA H200"), "dw", "triton"),  # As on an H100.
    (device("NVIDIA A100-SXM4-40GB", "8.0"), "y", "mosaic"),
    (device("NVIDIA A100-SXM4-40GB", "8.0"), "dw", "triton"),
    (device("NVIDIA B200", "10.0"), "dx", "mosaic"),
    (device("NVIDIA B200", "10.0"), "dw", "triton"),
    (device("Tesla V100", "7.0"), "y", "xla"),
    (device("cpu", "0.0", "cpu"), "y", "xla"),
  ],
)
def test_kinds_of_devices(on, found, kind, wanted):
  on(found)
  choice = gpu.choose(product(kind))
  assert choice.candidate == wanted
  if found.device_kind not in (H100, "NVIDIA H200"):
    # Tiles of Hopper are of no use there: tokamax takes its own.
    assert wanted != "mosaic" or choice.tiles == {}


def test_what_a_kernel_cannot_do_goes_to_the_next_one(on, caplog):
  on(device())
  for p, wanted in (
    (product(dtype="float32"), "triton"),
    (product(d=72), "triton"),
    (product(dtype="float64"), "xla"),
  ):
    assert gpu.choose(p).candidate == wanted
    assert gpu.choose(p).candidate == wanted
  said = [r.getMessage() for r in caplog.records]
  assert len(said) == 1, "said once, and only where all experts multiply"
  assert "y of 128 matrices 2048 x 768 in float64" in said[0]
  assert "mosaic: it does not multiply float64" in said[0]


def test_the_only_candidate_says_why_it_cannot(on):
  on(device(), mosaic=False)
  for name, p, why in (
    ("triton", product(dtype="float64"), "does not multiply float64"),
    ("mosaic", product(d=72), "widths divisible by 64"),
    ("mosaic", product(), MISSING),
    ("pallas", product(), "64 experts of a device at most"),
  ):
    with pytest.raises(ConfigError, match=f"gpu:{name}.*: .*{why}"):
      gpu.choose(p, name)
  assert gpu.choose(product("dw"), "pallas").candidate == "pallas"
  on(device("cpu", "0.0", "cpu"))
  with pytest.raises(ConfigError, match="gpu:pallas.*does not run on cpu"):
    grouped_matmul_test.check(
      "gpu:pallas", (3,), jnp.bfloat16, 0, (3, 64, 1, 64)
    )


def test_the_table_is_right():
  """Every entry is a choice that its candidate does not refuse."""
  for kind, entries in gpu.table().items():
    found = device(kind)
    for entry in entries:
      p = gpu.Product(
        *(entry[k] for k in ("product", "rows", "num_experts", "d", "f")),
        "bfloat16",
      )
      candidate = gpu.load(entry["candidate"])
      names = set(candidate.tilings(p, found)[0])
      assert names <= set(entry["tiles"]), entry
      assert gpu.needs(p, found, range(9, 10)) is None
      rate = 2 * p.rows * p.d * p.f / entry["milliseconds"]
      assert 0 < rate < 989e9, "beyond the peak"


def test_what_is_learned_holds_for_this_process(on, monkeypatch):
  on(device("NVIDIA B200", "10.0"))
  table = json.loads(json.dumps(gpu.table()))
  monkeypatch.setattr(gpu, "table", lambda: table)
  assert gpu.choose(product("dw")).candidate == "triton"
  entry = {"product": "dw", "rows": 8, "num_experts": 1, "d": 64, "f": 64}
  entry |= {"candidate": "xla", "tiles": {}, "milliseconds": 1.0}
  gpu.learn("NVIDIA B200", [entry])
  assert gpu.choose(product("dw")).candidate == "xla"
  # On an H200, what was measured on an H100 holds where nothing is nearer.
  on(device("NVIDIA H200"))
  gpu.learn("NVIDIA H200", [entry])
  assert gpu.choose(product("dw")).candidate == "triton"
  assert gpu.choose(product("dw", 8, 1, 64, 64)).candidate == "xla"


@pytest.mark.parametrize("candidate,kind", INTERPRETED)
def test_kernels_in_the_interpreter(on, monkeypatch, candidate, kind):
  """Odd loads, empty experts, all rows on one, and none at all."""
  on(device())
  interpretable(monkeypatch, candidate)
  dtypes = (jnp.bfloat16, jnp.float16)
  for n, sizes in enumerate(LOADS):
    rows, d, f = (128 if sum(sizes) == 128 else 85), 128, (64, 192)[n % 2]
    x, w, dy = grouped_matmul_test.random_inputs(
      n, dtypes[n % 2], (rows, d, len(sizes), f)
    )
    live = sum(sizes)
    x[live:] = dy[live:] = 0
    a, b = {"y": (x, w), "dx": (dy, w), "dw": (x, dy)}[kind]
    with interpreter.force_gpu_interpret_mode():
      got = gpu.compute(
        kind, *map(jnp.asarray, (a, b)), jnp.array(sizes), (d, f), candidate
      )
    wanted = grouped_matmul_test.loops(x, w, sizes, dy)
    wanted = dict(zip(("y", "dx", "dw"), wanted))[kind]
    kept = slice(None) if kind == "dw" else slice(live)
    assert got.dtype == x.dtype and got.shape == wanted.shape
    np.testing.assert_allclose(
      np.float64(got)[kept], wanted[kept], rtol=2e-2, atol=2e-2
    )


def check_network_in_the_interpreter(on, monkeypatch):
  """Forward and all gradients, NaN in the rows that belong to nobody."""
  on(device())
  interpretable(monkeypatch, "pallas")
  grouped_matmul_test.value_and_gradient.cache_clear()
  with interpreter.force_gpu_interpret_mode():
    for sizes in LOADS[:3]:
      grouped_matmul_test.check(
        "gpu:pallas", sizes, jnp.bfloat16, 2e-2, shape=(85, 128, 4, 64)
      )
  grouped_matmul_test.value_and_gradient.cache_clear()


if ("pallas", "dw") in INTERPRETED:
  test_network_in_the_interpreter = check_network_in_the_interpreter


def test_tiles_of_another_shape_are_cut_to_fit():
  pallas = gpu.load("pallas")
  tiles = {"block_m": 128, "block_n": 192, "block_k": 64}
  assert pallas.dividing(tiles, block_m=320, block_n=384) == {
    **{"block_m": 64, "block_n": 192, "block_k": 64}
  }
  assert pallas.dividing(tiles, block_n=256) == tiles | {"block_n": 64}


def interpretable(monkeypatch, candidate):
  """Lets a kernel look at the stand-in instead of the device that is there."""
  if candidate == "pallas":
    seen = types.SimpleNamespace(**vars(jax))
    seen.devices = lambda: [gpu.device()]
    monkeypatch.setattr(transposed_ragged_dot_mgpu, "jax", seen)
    return
  from tokamax._src import gpu_utils
  from tokamax._src.ops.ragged_dot import (
    pallas_mosaic_gpu_kernel_sm90 as hopper,
  )

  seen = types.SimpleNamespace(get_default_device=gpu.device)
  for module in (gpu_utils, hopper):
    monkeypatch.setattr(module, "backend", seen)


class StandIn:
  """An operation of tokamax, by XLA, which notes its tiles."""

  def __init__(self, given, config):
    self.given, self.config = given, config

  def replace(self, bypass_device_check):
    return self

  def __call__(
    self,
    a,
    b,
    *,
    group_sizes,
    ragged_dot_dimension_numbers,
    precision,
    preferred_element_type,
  ):
    self.given.append((ragged_dot_dimension_numbers, a.shape, self.config))
    tiles = {}
    return gpu.load("xla").run(
      ragged_dot_dimension_numbers, a, b, group_sizes, tiles
    )


@pytest.fixture
def tokamax(monkeypatch):
  """A stand-in for tokamax and Triton; the list of what its operations were given."""
  given, root = [], "tokamax._src.ops.ragged_dot"

  def module(name, **members):
    made = types.ModuleType(name)
    vars(made).update(members)
    monkeypatch.setitem(sys.modules, name, made)
    return made

  def operation(config):
    return StandIn(given, config)

  parts = {
    "base": module(
      f"{root}.base",
      DEFAULT_RAGGED_DOT_DIM_NUMS="y",
      TRANS_RHS_RAGGED_DOT_DIM_NUMS="dx",
      RAGGED_CONTRACTING_DOT_DIM_NUMS="dw",
    ),
    "pallas_mosaic_gpu": module(
      f"{root}.pallas_mosaic_gpu",
      Config=dict,
      PallasMosaicGpuRaggedDot=operation,
    ),
    "triton": module(f"{root}.triton", Config=dict, TritonRaggedDot=operation),
  }
  for name in ("tokamax", "tokamax._src", "tokamax._src.ops"):
    module(name)
  module(root, **parts)
  knobs = types.SimpleNamespace(NvidiaTool=Assembler)
  module("triton", knobs=knobs, __version__="3.9.0")
  ours = gpu.load("triton")
  kept = ours._match_assembler, ours._too_old, gpu.load("mosaic").missing
  for function in kept:
    function.cache_clear()
  yield given
  for function in kept:
    function.cache_clear()


class Assembler:
  """The path of ptxas and its version of CUDA, as Triton sees them."""

  def __init__(self, path, version):
    self.path, self.version = path, version

  @classmethod
  def from_path(cls, path):
    known = {"/usr/bin/ptxas": "13.10", "/wheel/bin/ptxas": "13.9"}
    return cls(path, known[path]) if path in known else None


def test_triton_writes_for_the_assembler_that_is_there(tokamax, monkeypatch):
  """XLA takes one of these two, so that the older one reads it too."""
  triton = gpu.load("triton")
  ampere, newer = triton._ASSEMBLERS
  monkeypatch.setattr(triton.shutil, "which", lambda name: f"/usr/bin/{name}")
  monkeypatch.setattr("jax._src.lib.cuda_path", "/wheel")
  monkeypatch.setenv(ampere, "mine")
  monkeypatch.setenv(newer, "")
  monkeypatch.delenv(newer)
  triton._match_assembler()
  assert (os.environ[ampere], os.environ[newer]) == ("mine", "/wheel/bin/ptxas")
  monkeypatch.delenv(newer)
  monkeypatch.setattr("jax._src.lib.cuda_path", None)
  monkeypatch.setattr(triton.shutil, "which", lambda name: None)
  triton._match_assembler.cache_clear()
  triton._match_assembler()
  assert newer not in os.environ


def test_an_older_triton_is_refused(tokamax, monkeypatch):
  """jax-triton takes it, and tokamax's kernels do not compile."""
  triton = gpu.load("triton")
  product = gpu.Product("y", 77, 4, 128, 64, "bfloat16")
  assert triton.refusal(product, device()) is None
  monkeypatch.setattr(sys.modules["triton"], "__version__", "3.8.1")
  triton._too_old.cache_clear()
  words = "Triton 3.8.1 is older than 3.9; install triton>=3.9"
  assert triton.refusal(product, device()) == words


def test_modules_of_tokamax_are_imported_one_after_another(monkeypatch):
  """Some import each other, and two threads would wait for each other."""
  busy, most = [], []

  def slow(name):
    busy.append(name)
    most.append(len(busy))
    time.sleep(0.05)
    busy.remove(name)

  mosaic = gpu.load("mosaic")
  monkeypatch.setattr(mosaic.importlib, "import_module", slow)
  mosaic.missing.cache_clear()
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    assert [*pool.map(mosaic.missing, "abcd")] == [None] * 4
  mosaic.missing.cache_clear()
  assert most == [1] * 4


def test_three_products_by_two_kernels(on, tokamax):
  """The whole network's gradient, each product with its own tiles."""
  on(device())
  sizes = (30, 0, 41, 5)
  grouped_matmul_test.value_and_gradient.cache_clear()
  for only in ("gpu", "gpu:mosaic", "gpu:triton"):
    tokamax.clear()
    grouped_matmul_test.check(
      only, sizes, jnp.bfloat16, 2e-2, shape=(77, 128, 4, 64)
    )
    by_kind = {kind: (shape, tiles) for kind, shape, tiles in tokamax}
    assert set(by_kind) == {"y", "dx", "dw"}
    for kind, (shape, tiles) in by_kind.items():
      key = gpu.Product(kind, 77, 4, 128, 64, "bfloat16")
      choice = gpu.choose(key, only.partition(":")[2] or None)
      if choice.candidate == "mosaic":
        assert shape[0] == 128 and tiles == {"split_k": 1} | choice.tiles
      else:
        assert shape[0] == 77 and tiles == choice.tiles
  chosen = kernels.chosen("gpu")
  dw = chosen["dw of 4 matrices 128 x 64 in bfloat16, 77 rows"]
  assert dw.startswith("triton block_m=")
  only = kernels.chosen("gpu:mosaic")
  assert len(only) == 3 and all("mosaic" in text for text in only.values())
  assert not kernels.is_checked("gpu") and kernels.chosen("cpu") == {}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_without_any_kernel(on, dtype, caplog):
  on(device("cpu", "0.0", "cpu"))
  grouped_matmul_test.value_and_gradient.cache_clear()
  tolerance = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}[dtype]
  for seed, sizes in enumerate(grouped_matmul_test.SIZES):
    grouped_matmul_test.check("gpu", sizes, dtype, tolerance, seed=seed)
  said = [r.getMessage() for r in caplog.records]
  assert len(said) == 1 and "every expert's matrix" in said[0]
  grouped_matmul_test.test_no_rows_at_all("gpu")


def test_a_config_names_a_candidate():
  c = tiny.get_config()
  c.model.moe.update(dispatcher={"name": "sorted"}, capacity_factor=None)
  for name in gpu.CANDIDATES:
    c.model.moe.grouped_matmul = f"gpu:{name}"
    models.build(c.model, vocab_size=9)
  c.model.moe.grouped_matmul = "gpu:tritn"
  with pytest.raises(ConfigError, match="'gpu:tritn'.*mean \"gpu:triton\""):
    models.build(c.model, vocab_size=9)
