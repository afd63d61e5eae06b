"""Checkpoints: whole, checked, and restored onto any mesh."""

import contextlib
import errno
import json
import pathlib
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from moe_jax.core import checksums, parallel
from moe_jax.core.errors import ConfigError, RunError
from moe_jax.training import checkpoint

SPECS = {
  "params": {"experts": jax.P("expert", "fsdp"), "scale": jax.P()},
  "half": jax.P(("data", "expert")),
  "flags": jax.P(),
  "rng": jax.P(),
  "step": jax.P(),
}
MESHES = ((2, 1, 4, 1), (1, 1, 8, 1), (1, 2, 2, 2), None)


def shardings(sizes):
  if sizes is None:
    one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    return jax.tree.map(lambda _: one, SPECS)
  mesh = parallel.make_mesh(sizes)
  return jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), SPECS)


def state(seed=0, sizes=None):
  rng = np.random.default_rng(seed)
  values = {
    "params": {
      "experts": rng.standard_normal((8, 16), np.float32),
      "scale": rng.standard_normal(6, np.float32),
    },
    "half": jnp.asarray(rng.standard_normal((16, 4)), jnp.bfloat16),
    "flags": rng.random(5) < 0.5,
    "rng": jax.random.key(seed),
    "step": np.int32(seed),
  }
  return jax.tree.map(jax.device_put, values, shardings(sizes))


def abstract(sizes=None):
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    jax.eval_shape(state),
    shardings(sizes),
  )


def same(one, other):
  def check(a, b):
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

  jax.tree.map(check, one, other)


@pytest.fixture
def folder(tmp_path):
  """A folder of three checkpoints: steps 1, 2 and 3."""
  with opened(tmp_path / "checkpoints") as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, state(step), {"note": step})
  return tmp_path / "checkpoints"


def opened(folder, **options):
  return contextlib.closing(checkpoint.Checkpoints(folder, **options))


@pytest.mark.parametrize("wrote", MESHES)
def test_any_mesh_reads_what_any_mesh_wrote(tmp_path, wrote):
  with opened(tmp_path / "c") as checkpoints:
    checkpoints.save(7, state(7, wrote), {"line": {"loss": [0.1 + 0.2, 3.0]}})
    checkpoints.wait()
    for sizes in MESHES:
      found = checkpoints.restore(abstract(sizes))
      assert found.step == 7
      assert found.meta == {"line": {"loss": [0.1 + 0.2, 3.0]}}
      same(found.state, state(7))
      for x, s in zip(
        jax.tree.leaves(found.state), jax.tree.leaves(shardings(sizes))
      ):
        assert x.sharding.is_equivalent_to(s, x.ndim)


def test_the_digest_is_of_the_values_and_not_of_the_mesh():
  first, *others = (checksums.of_arrays(state(1, sizes)) for sizes in MESHES)
  assert all(other == first for other in others)
  assert (
    first["rng"][0] == "key<fry>[]" and first["half"][0] == "bfloat16[16, 4]"
  )


@pytest.mark.parametrize(
  "dtype", ["float64", "float32", "bfloat16", "int8", "bool"]
)
def test_the_digest_sees_one_bit_and_one_exchange(dtype):
  with jax.enable_x64(True):
    raw = np.random.default_rng(0).integers(0, 256, 96, np.uint8)
    if dtype == "bool":
      raw &= 1
    seen = {_digest(raw, dtype)}
    for byte in range(0, 96, 7):
      other = raw.copy()
      other[byte] ^= 1 if dtype == "bool" else 1 << byte % 8
      seen.add(_digest(other, dtype))
    exchanged = raw.reshape(12, 8)[::-1].reshape(-1)
    seen.add(_digest(exchanged, dtype))
  assert len(seen) == 1 + 14 + 1


def _digest(raw, dtype):
  x = jnp.asarray(raw.view(jnp.dtype(dtype)).reshape(2, -1))
  return checksums.of_arrays({"x": x})["x"][1]


def test_the_newest_is_restored_and_nothing_is_none(tmp_path, folder):
  with opened(folder) as checkpoints:
    assert checkpoints.steps() == [1, 2, 3]
    found = checkpoints.restore(abstract())
    assert (found.step, found.meta) == (3, {"note": 3})
  with opened(tmp_path / "empty") as checkpoints:
    assert checkpoints.restore(abstract()) is None


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0xFF
  path.write_bytes(bytes(content))


def damage(kind, step):
  """Each way a disk can spoil a checkpoint."""
  files = sorted(p for p in (step / "state").rglob("*") if p.is_file())
  if kind == "flipped":
    for path in files:
      if path.parent.name == "d" and path.stat().st_size:
        flip(path)
  elif kind == "cut short":
    for path in files:
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  elif kind == "without meta":
    (step / "meta" / "metadata").unlink()
  elif kind == "other arrays":  # Bytes that the storage takes for good ones.
    arrays = about(step)["arrays"]
    rewrite(step, arrays={k: [t, "0" * 8] for k, (t, _) in arrays.items()})
  elif kind == "without types":  # Random keys would be read as integers.
    (step / "state" / "array_metadatas" / "process_0").unlink()
  elif kind == "other meta":
    path = step / "meta" / "metadata"
    text = path.read_text()
    path.write_text(text.replace('"note": 3', '"note": 2'))
    assert path.read_text() != text
  elif kind == "not UTF-8":
    path = step / "meta" / "metadata"
    path.write_bytes(path.read_bytes().replace(b"note", b"n\xefte"))
  elif kind == "deep":
    (step / "meta" / "metadata").write_text("[" * 100_000)


def about(step):
  return json.loads((step / "meta" / "metadata").read_text())


def rewrite(step, **changes):
  """Changes what lies beside the arrays, with the checksum that it must have."""
  changed = about(step) | changes
  del changed["checksum"]
  changed["checksum"] = checksums.of_json(changed)
  (step / "meta" / "metadata").write_text(json.dumps(changed))


JSON_DAMAGES = "without meta", "other meta", "not UTF-8", "deep"
ARRAY_DAMAGES = "flipped", "cut short", "other arrays", "without types"


@pytest.mark.parametrize("kind", JSON_DAMAGES + ARRAY_DAMAGES)
def test_a_damaged_one_is_set_aside_and_the_one_before_is_used(
  folder, kind, caplog
):
  damage(kind, folder / "3")
  with opened(folder) as checkpoints:
    found = checkpoints.restore(abstract())
    assert found.step == 2
    same(found.state, state(2))
    assert "3 is damaged" in caplog.text and "step 2" in caplog.text
    aside = folder.with_name("damaged_checkpoints")
    assert [p.name for p in aside.iterdir()] == ["3.1"]
    # The same step can be reached and written again.
    checkpoints.save(3, state(30), {})
    checkpoints.wait()
    same(checkpoints.restore(abstract()).state, state(30))


def test_a_name_for_what_is_set_aside_is_free(folder):
  """Somebody has looked at 3.1 and removed it."""
  taken = folder.with_name("damaged_checkpoints") / "3.2" / "state"
  taken.mkdir(parents=True)
  damage("without meta", folder / "3")
  with opened(folder) as checkpoints:
    assert checkpoints.restore(abstract()).step == 2
  found = sorted(p.name for p in taken.parent.parent.iterdir())
  assert found == ["3.1", "3.2"]


def test_all_damaged_is_an_error_and_nothing_is_moved(folder):
  for step in folder.glob("[0-9]"):
    damage("other arrays", step)
  with opened(folder) as checkpoints:
    with pytest.raises(ConfigError, match="can be read: 3, 2, 1 are damaged"):
      checkpoints.restore(abstract())
    assert checkpoints.steps() == [1, 2, 3]


@pytest.mark.parametrize(
  "error",
  [
    PermissionError(errno.EACCES, "Permission denied", "state"),
    OSError(errno.EIO, "Input/output error"),
    MemoryError(),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."),
    ValueError("UNAVAILABLE: Error reading from gs://"),
  ],
  ids=lambda e: type(e).__name__,
)
def test_what_a_machine_lacks_is_no_damage(folder, error, monkeypatch):
  """Newer steps are not given up for it."""

  def lacking(*_, **__):
    raise error

  def check_whole(checkpoints):
    assert checkpoints.restore(abstract()).step == 3
    assert not folder.with_name("damaged_checkpoints").exists()

  with opened(folder) as checkpoints:
    with monkeypatch.context() as m:
      m.setattr(ocp.CheckpointManager, "restore", lacking)
      with pytest.raises(RunError, match="3 cannot be read .* may be whole"):
        checkpoints.restore(abstract())
    check_whole(checkpoints)
  monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", lacking)
  with pytest.raises(RunError, match="3 cannot be read .* may be whole"):
    checkpoint.load_params(folder)


def test_one_that_was_not_finished_is_none(folder):
  """A killed process leaves a folder whose name is no step's."""
  unfinished = folder / "4.orbax-checkpoint-tmp"
  (folder / "3").rename(unfinished)
  with opened(folder) as checkpoints:
    assert checkpoints.restore(abstract()).step == 2


def test_how_many_are_kept(tmp_path):
  with opened(tmp_path / "c", keep_last=2, keep_every=4) as checkpoints:
    for step in range(1, 8):
      checkpoints.save(step, state(step), {})
    checkpoints.wait()
    assert checkpoints.steps() == [4, 6, 7]


def test_one_of_another_model_is_refused(folder):
  like = abstract()
  like["params"]["scale"] = jax.ShapeDtypeStruct(
    (7,), jnp.float32, sharding=like["params"]["scale"].sharding
  )
  with opened(folder) as checkpoints, pytest.raises(ConfigError) as e:
    checkpoints.restore(like)
  for words in ("another model", "params/scale", "[6]", "[7]", "--workdir"):
    assert words in str(e.value)


def test_one_of_another_version_lacks_an_array(folder):
  like = abstract()
  like["params"]["new"] = like["params"]["scale"]
  words = "another version of moe_jax: 1 of its arrays differ .params/new is nothing there"
  with opened(folder) as checkpoints, pytest.raises(ConfigError, match=words):
    checkpoints.restore(like)


def test_one_of_the_old_layout_is_refused(folder):
  """A checkpoint of a layout that is not known yet is refused, too."""
  path = folder / "3" / "meta" / "metadata"
  whole = path.read_bytes()
  old = {"format": 1, "digest": ["0"], "shapes": {"w": "int8[]"}, "meta": {}}
  with opened(folder) as checkpoints:
    for number, write in (
      (1, lambda: path.write_text(json.dumps(old))),
      (3, lambda: rewrite(folder / "3", format=3)),
    ):
      write()
      words = f"3 has format {number}, not 2; use the version"
      with pytest.raises(ConfigError, match=words):
        checkpoints.restore(abstract())
      with pytest.raises(ConfigError, match=words):
        checkpoint.load_params(folder)
      path.write_bytes(whole)
  # Format 1 had no checksum; what has a wrong one is damaged.
  path.write_text(json.dumps(old | {"checksum": "0"}))
  same(checkpoint.load_params(folder), state(2)["params"])


def test_variables_of_which_a_part_is_gone_are_not_loaded(folder, monkeypatch):
  """A bias that the list of arrays no longer names is such a part."""
  read = checkpoint._read_arrays
  monkeypatch.setattr(checkpoint, "_read_arrays", lambda *a: {"balance": {}})
  with pytest.raises(ConfigError, match="no checkpoint in .* can be read"):
    checkpoint.load_params(folder)
  monkeypatch.setattr(checkpoint, "_read_arrays", read)
  checkpoint.load_params(folder)


def test_parameters_load_as_numpy_from_anywhere(tmp_path, folder, caplog):
  want = jax.device_get(state(3)["params"])
  for path in (tmp_path, folder, folder / "3", str(folder / "3")):
    found = checkpoint.load_params(path)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(found))
    same(found, want)
  same(checkpoint.load_params(folder / "1"), state(1)["params"])
  assert not caplog.records, "it warns of something"
  with pytest.raises(ConfigError, match="no checkpoint in"):
    checkpoint.load_params(tmp_path / "nowhere")
  with pytest.raises(ConfigError, match=r"no moving average"):
    checkpoint.load_variables(folder, ema=True)


def test_float64_loads_where_jax_has_none(tmp_path):
  with jax.enable_x64(True):
    wide = {"params": {"w": jnp.linspace(0, 1, 7), "scale": jnp.float64(0.1)}}
    assert wide["params"]["w"].dtype == jnp.float64
    with opened(tmp_path) as checkpoints:
      checkpoints.save(1, wide, {})
  assert not jax.config.jax_enable_x64
  same(checkpoint.load_params(tmp_path), jax.device_get(wide["params"]))


@pytest.mark.parametrize("kind", ["flipped", "other arrays", "other meta"])
def test_parameters_of_a_damaged_one_are_not_loaded(folder, kind, caplog):
  damage(kind, folder / "3")
  same(checkpoint.load_params(folder), state(2)["params"])
  assert "3 is damaged" in caplog.text
  with pytest.raises(ConfigError, match="no checkpoint in .* can be read: 3"):
    checkpoint.load_params(folder / "3")


def test_a_full_disk_leaves_the_last_one_whole(folder):
  """A limit on the size of files fails like a disk that is full."""
  large = state() | {"half": jnp.ones((1024, 1024), jnp.bfloat16)}
  large["half"] = jax.random.normal(jax.random.key(0), (512, 1024))
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  checkpoints = checkpoint.Checkpoints(folder)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    with pytest.raises(RunError) as e:
      checkpoints.save(4, large, {})
      checkpoints.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  for words in ("step 4", str(pathlib.Path(folder) / "3"), "Free space"):
    assert words in str(e.value)
  with opened(folder) as checkpoints:
    assert checkpoints.restore(abstract()).step == 3


def test_a_disk_without_room_is_not_written_to(folder, monkeypatch):
  usage = shutil.disk_usage(folder)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
  before = sorted(pathlib.Path(folder).iterdir())
  with (
    opened(folder) as checkpoints,
    pytest.raises(RunError, match="step 4 .*0.0 MB are free.*Free space"),
  ):
    checkpoints.save(4, state(4), {})
  assert sorted(pathlib.Path(folder).iterdir()) == before
