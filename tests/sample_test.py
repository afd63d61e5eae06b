"""The command that samples, on runs of the two networks of Wan2.2's tiny."""

import json

import jax
import numpy as np
import pytest
from PIL import Image, ImageSequence

from moe_jax import evaluate, main, sample
from moe_jax.core import parallel
from moe_jax.core.errors import ConfigError, RunError
from moe_jax.data.images import written
from moe_jax.hf.of_config import wan
from moe_jax.models.generation import conditions, flow
from moe_jax.training import program, starts, trained
from tests import pair_of_runs
from tests.diffusion_test import folder_of

FLAGS = (
  "--config=configs/wan2_2.py:tiny",
  "--config.data.batch_size=32",
  "--config.train.num_steps=150",
  "--config.train.log_every=30",
  "--config.eval.batch_size=64",
  "--config.model.remat=none",
)


MESH_OR_NONE = parallel.mesh_or_none


@pytest.fixture(scope="module", autouse=True)
def one_device():
  """The tests are of whole runs, and `diffusion_test` has the meshes."""
  with pytest.MonkeyPatch.context() as m:
    m.setattr(parallel, "mesh_or_none", lambda *_: None)
    yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """The work directories of the two networks."""
  folder = tmp_path_factory.mktemp("runs")
  for expert in ("high", "low"):
    flags = [f"--config.task.expert={expert}", f"--workdir={folder}/{expert}"]
    main.main([*FLAGS, *flags])
  return folder


def lines(folder, split):
  return [row for row in pair_of_runs.lines(folder) if row["split"] == split]


def frames(path):
  """The frames of a GIF."""
  with Image.open(path) as image:
    frames = ImageSequence.Iterator(image)
    return [np.asarray(one.convert("RGB")) for one in frames]


@pytest.mark.long
def test_both_learn_in_their_own_range(runs):
  ranges = {"high": 1, "low": 7}
  for expert, number in ranges.items():
    losses = [row["loss"] for row in lines(runs / expert, "train")]
    assert losses[-1] < 0.8 * losses[0]
    (found,) = lines(runs / expert, "validation")
    own = [k for k in found if k.startswith("loss/")]
    assert len(own) == number
    mean = np.mean([found[k] for k in own])
    assert found["loss"] == pytest.approx(mean, rel=1e-5)


def test_samples(runs, tmp_path, capsys):
  flags = [
    f"--checkpoint={runs}/high",
    f"--low={runs}/low",
    f"--out={tmp_path}",
  ]
  flags += ["--number=5", "--steps=10", "--label=3"]
  assert sample.main(flags) == 0
  said = capsys.readouterr().out
  # shift = 3: t = 3u / (1 + 2u) is at least 0.875 for u = 1, 0.9, 0.8, 0.7.
  assert "steps 0 to 3, from t = 1.000 on: the network high" in said
  assert "steps 4 to 9, from t = 0.818 on: the network low" in said
  image = np.asarray(Image.open(tmp_path / "samples.png"))
  assert image.shape == (16, 24) and image[:, :8].std() > 0
  assert (image[8:, 16:] == 0).all()  # There are five samples in six places.
  sample.main([*flags, "--seed=1"])
  other = np.asarray(Image.open(tmp_path / "samples.png"))
  assert (other != image).any()
  sample.main(flags)
  again = np.asarray(Image.open(tmp_path / "samples.png"))
  np.testing.assert_array_equal(again, image)


def test_samples_in_parts(runs, tmp_path, monkeypatch):
  """The same samples, three or two at once, from networks that are read once."""
  read, weights = [], trained.weights

  def reader(path, *options):
    read.append(path)
    return weights(path, *options)

  monkeypatch.setattr(trained, "weights", reader)
  flags = [f"--checkpoint={runs}/high", f"--low={runs}/low"]
  flags += ["--number=5", "--steps=8"]
  for name, more in (("whole", []), ("parts", ["--batch_size=3"])):
    sample.main([*flags, *more, f"--out={tmp_path}/{name}"])
  whole, parts = (
    np.asarray(Image.open(tmp_path / name / "samples.png")).astype(int)
    for name in ("whole", "parts")
  )
  assert whole.shape == (16, 24) and whole[:, :8].std() > 0
  np.testing.assert_allclose(parts, whole, atol=1)
  assert read == [f"{runs}/high", f"{runs}/low"] * 2


def test_samples_on_a_mesh(runs, tmp_path, monkeypatch):
  """Samples are those of one device; more of them fill the devices."""
  monkeypatch.setattr(parallel, "mesh_or_none", MESH_OR_NONE)
  devices, build = [], program.build_model

  def built(config, task, mesh=None):
    devices.append(mesh and mesh.size)
    return build(config, task, mesh)

  monkeypatch.setattr(program, "build_model", built)
  flags = [f"--checkpoint={runs}/high", f"--low={runs}/low"]
  flags += ["--number=3", "--steps=8"]
  for name, mesh in (("one", []), ("mesh", ["--mesh=2,2,1,2"])):
    sample.main([*flags, *mesh, f"--out={tmp_path}/{name}"])
  one, mesh = (
    np.asarray(Image.open(tmp_path / name / "samples.png")).astype(int)
    for name in ("one", "mesh")
  )
  assert one.shape == (16, 16) and one[:, :8].std() > 0
  assert devices == [None, 8]
  np.testing.assert_allclose(mesh, one, atol=1)  # Numbers are rounded to bytes.


def test_published_weights_are_the_same(runs, tmp_path, capsys):
  """Written as Wan's code names them and read again, without classes."""
  path = folder_of(tmp_path, train_label=None, validation_label=None)
  flags = [*FLAGS[:1], *FLAGS[3:], f"--config.data.dir={path}"]
  flags += ["--config.task.num_classes=0"]
  flags += ["--config.train.num_steps=2", "--config.data.batch_size=4"]
  flags += [
    "--config.model.video.patch=(1, 2, 2)",
    "--config.eval.batch_size=4",
  ]
  for expert in ("high", "low"):
    own = [f"--config.task.expert={expert}", f"--workdir={tmp_path}/{expert}"]
    main.main([*flags, *own])
    config = trained.config_of(f"{tmp_path}/{expert}")
    model = program.build_model(config, program.build_task(config))
    _, variables = trained.weights(f"{tmp_path}/{expert}", model)
    wan.save(tmp_path / f"{expert}_wan", model, variables["params"])
  text = ["--text", f"{tmp_path}/train_text.npy", "--number=2", "--steps=4"]
  for name, more in {
    "a": [f"--checkpoint={tmp_path}/high", f"--low={tmp_path}/low"],
    "b": [
      f"--wan={tmp_path}/high_wan",
      f"--wan_low={tmp_path}/low_wan",
      *FLAGS[:1],
      "--config.task.shape=(2, 4, 4, 1)",
      "--config.task.text=(3, 5)",
      "--config.task.num_classes=0",
    ],
  }.items():
    assert sample.main([*text, *more, f"--out={tmp_path}/{name}"]) == 0
  for i in range(2):
    first, second = (frames(tmp_path / x / f"00{i}.gif") for x in "ab")
    assert len(first) == 2
    np.testing.assert_array_equal(first, second)
  # The same files are evaluated, and begin a run.
  for name, source in {
    "c": [f"--checkpoint={tmp_path}/low"],
    "d": [
      f"--hf={tmp_path}/low_wan",
      f"--config={tmp_path}/low/config.json",
    ],
  }.items():
    evaluate.main([*source, f"--json={tmp_path}/{name}.json"])
  found = [json.loads((tmp_path / f"{x}.json").read_text()) for x in "cd"]
  assert found[0] == found[1] and found[0]["metrics"]["loss"] > 0
  begun = starts.variables(f"{tmp_path}/low_wan", config, model)["params"]
  jax.tree.map(np.testing.assert_array_equal, begun, variables["params"])


REFUSED = {
  "weights --low .* are missing": ["--checkpoint={high}"],
  "weights of task.expert = high are missing": [
    "--checkpoint={low}",
    "--low={low}",
  ],
  "has task.expert = 'high', not 'low'": [
    "--checkpoint={high}",
    "--low={high}",
  ],
  "has task.boundary = 0.875, not 0.5": [
    *("--checkpoint={high}", "--low={low}", "--config.task.boundary=0.5")
  ],
  "task.predict is 'velocity' in the run": [
    *("--checkpoint={high}", "--low={low}", "--config.task.predict=noise")
  ],
  "--label=10 is not below the 10 classes": [
    *("--checkpoint={high}", "--low={low}", "--label=10")
  ],
  "no \\*.safetensors; give the folder of one network": [
    *("--checkpoint={high}", "--wan_low={out}")
  ],
  "--wan and --config belong together": ["--wan={high}"],
  "--low and --wan_low are of one network": [
    *("--checkpoint={high}", "--low={low}", "--wan_low={low}")
  ],
  "has no moving average": [*("--checkpoint={high}", "--low={low}", "--ema")],
  "--text is of texts, and this model has none": [
    *("--checkpoint={high}", "--low={low}", "--text=a.npy")
  ],
  "--more is of channels beside": [
    *("--checkpoint={high}", "--low={low}", "--more=a.npy")
  ],
  "has the shape .*change nothing that makes": [
    *("--checkpoint={high}", "--low={low}", "--config.model.d_ff=40")
  ],
  "has no config.json of a run": ["--checkpoint={out}"],
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_refused(runs, tmp_path, words):
  places = {"high": runs / "high", "low": runs / "low", "out": tmp_path}
  flags = [flag.format(**places) for flag in REFUSED[words]]
  with pytest.raises(ConfigError, match=words):
    sample.main([*flags, f"--out={tmp_path}/out"])
  assert not (tmp_path / "out").exists()


def test_a_second_network_that_predicts_something_else(runs, tmp_path):
  flags = ["--config.task.expert=low", f"--workdir={tmp_path}/noise"]
  flags += ["--config.train.num_steps=2", "--config.task.predict=noise"]
  main.main([*FLAGS, *flags])
  flags = [f"--checkpoint={runs}/high", f"--low={tmp_path}/noise"]
  with pytest.raises(
    ConfigError, match="task.predict = 'noise', not 'velocity'"
  ):
    sample.main([*flags, f"--out={tmp_path}/out"])


@pytest.mark.parametrize(
  "flag", ["--guidance=nan", "--guidance=-1", "--seed=-1"]
)
def test_impossible_flags(flag, capsys):
  with pytest.raises(SystemExit):
    sample.main(["--checkpoint=a", "--out=b", flag])
  assert flag.partition("=")[2] in capsys.readouterr().err


def test_samples_that_are_no_numbers(tmp_path):
  """Nothing is written in place of a black image."""
  with pytest.raises(
    RunError, match="samples have numbers that are not finite"
  ):
    written.write(np.full((1, 1, 2, 2, 1), np.nan), tmp_path)
  assert not [*tmp_path.iterdir()]


class arch:  # noqa: N801
  """The sizes of a model that reads texts and a channel beside."""

  num_classes, text, shape, more_channels = 0, (3, 5), (1, 2, 2, 1), 1


def saved(path, **arrays):
  """Paths of files with an array each, and of another one for `more`."""
  arrays = {"more": np.zeros((1, 2, 2, 1), np.uint8)} | arrays
  for name, array in arrays.items():
    np.save(path / f"{name}.npy", array)
  return {name: str(path / f"{name}.npy") for name in arrays}


def test_conditions_of_files(tmp_path):
  """Texts take turns; the text that guidance leads away from has its own mask."""
  rng = np.random.default_rng(0)
  text, away = (rng.normal(size=(n, 3, 5)).astype(np.float32) for n in (2, 1))
  mask = np.array([[True, False, False], [True, True, False]])
  paths = saved(tmp_path, text=text, text_mask=mask, text_none=away)
  condition, none, more = conditions.read(conditions.Given(**paths), arch, 3)
  np.testing.assert_array_equal(condition.text_BMT, text[[0, 1, 0]])
  np.testing.assert_array_equal(condition.mask_BM, mask[[0, 1, 0]])
  np.testing.assert_array_equal(none.text_BMT, away[[0, 0, 0]])
  assert none.mask_BM.all() and none.mask_BM.shape == (3, 3)
  assert (more == -1).all()  # Bytes of 0.
  paths |= saved(tmp_path, text_none_mask=mask[:1])
  _, none, _ = conditions.read(conditions.Given(**paths), arch, 2)
  np.testing.assert_array_equal(none.mask_BM, mask[[0, 0]])
  del paths["text_mask"]
  condition, none, _ = conditions.read(conditions.Given(**paths), arch, 2)
  assert condition.mask_BM.all() and not none.mask_BM.all()


@pytest.mark.parametrize(
  "arrays, words",
  [
    (
      {"text_mask": np.ones((1, 3), np.uint8)},
      "--text_mask=.* has uint8, and not true",
    ),
    (
      {"text": np.ones((1, 3, 5), np.uint8)},
      "--text=.* has uint8, and not fractions",
    ),
    ({"text": np.full((1, 3, 5), "a")}, "--text=.* and not fractions"),
    (
      {"text": np.ones((0, 3, 5))},
      "has the shape .0, 3, 5., and the model needs",
    ),
    ({"text": np.full((1, 3, 5), np.inf)}, "--text=.* that are not finite"),
    ({"more": np.ones((1, 2, 2, 1), np.uint16)}, "--more=.* has uint16"),
    ({"text_none_mask": np.ones((1, 3), bool)}, "is of --text_none; give both"),
  ],
)
def test_impossible_arrays(tmp_path, arrays, words):
  paths = saved(tmp_path, **({"text": np.ones((1, 3, 5))} | arrays))
  with pytest.raises(ConfigError, match=words):
    conditions.read(conditions.Given(**paths), arch, 2)


def test_a_run_is_sampled_without_its_data(runs, tmp_path):
  """Sizes of the data are in run.json."""
  path = folder_of(tmp_path, train_label=None, validation_label=None)
  flags = [f"--config.data.dir={path}", "--config.task.num_classes=0"]
  flags += ["--config.task.boundary=None", "--config.task.expert=None"]
  flags += [
    "--config.model.video.patch=(1, 2, 2)",
    "--config.train.num_steps=2",
  ]
  flags += ["--config.data.batch_size=4", "--config.eval.batch_size=4"]
  main.main([*FLAGS, *flags, f"--workdir={tmp_path}/run"])
  np.save(tmp_path / "text.npy", np.zeros((1, 3, 5), np.float32))
  for file in tmp_path.glob("*_*.npy"):
    file.unlink()
  flags = [f"--checkpoint={tmp_path}/run", f"--text={tmp_path}/text.npy"]
  sample.main([*flags, "--number=2", "--steps=2", f"--out={tmp_path}/out"])
  assert len(frames(tmp_path / "out" / "001.gif")) == 2


def test_the_second_network_is_checked_before_the_first_runs(
  runs, tmp_path, monkeypatch
):
  """A run of other sizes, and one without a checkpoint."""
  flags = ["--config.task.expert=low", f"--workdir={tmp_path}/wide"]
  flags += ["--config.train.num_steps=2", "--config.model.d_ff=40"]
  main.main([*FLAGS, *flags])
  (tmp_path / "none").mkdir()
  (tmp_path / "none" / "config.json").write_text(
    (runs / "low" / "config.json").read_text()
  )
  monkeypatch.setattr(flow, "sample", None)
  for low, words in (("wide", "has the shape"), ("none", "no checkpoint in")):
    flags = [f"--checkpoint={runs}/high", f"--low={tmp_path}/{low}"]
    with pytest.raises(ConfigError, match=words):
      sample.main([*flags, f"--out={tmp_path}/out"])


def test_guidance_of_each_network(runs, tmp_path, monkeypatch):
  """The first number is that of the network for more noise."""
  given = []

  def sampled(model, networks, noise, *args, **options):
    given.append([(one.name, one.guidance) for one in networks])
    return noise

  monkeypatch.setattr(flow, "sample", sampled)
  flags = [f"--checkpoint={runs}/high", f"--low={runs}/low"]
  flags += [f"--out={tmp_path}", "--number=1"]
  for more in ([], ["--guidance=5,2"], ["--guidance=7"]):
    sample.main([*flags, *more])
  assert given == [
    [("high", high), ("low", low)] for high, low in ((4, 3), (5, 2), (7, 7))
  ]
  with pytest.raises(SystemExit):
    sample.main([*flags, "--guidance=4,3,2"])


@pytest.mark.long
def test_any_number_of_samples_fills_whole_groups(tmp_path):
  """The rest is left out, and the first few are the same."""
  flags = ["--config.train.num_steps=2", "--config.task.boundary=None"]
  flags += ["--config.task.expert=None", "--config.model.pattern=('moe',)"]
  flags += ["--config.model.moe.tokens_per_group=8 sequences"]
  flags += ["--config.train.hooks.a.name=pictures"]
  flags += ["--config.train.hooks.a.every=2"]
  main.main([*FLAGS, *flags, f"--workdir={tmp_path}/run"])
  found = {}
  for number in (3, 8):
    flags = [f"--checkpoint={tmp_path}/run", f"--number={number}", "--steps=2"]
    sample.main([*flags, f"--out={tmp_path}/{number}"])
    found[number] = np.asarray(Image.open(tmp_path / f"{number}/samples.png"))
  assert found[3].shape == (16, 16) and found[8].shape == (24, 24)
  np.testing.assert_array_equal(found[3][:8], found[8][:8, :16])
  assert found[3][:8].std() > 0 and (tmp_path / "run" / "pictures").is_dir()


def test_a_boundary_outside(tmp_path):
  for value in (-0.1, 1.5):
    flags = [f"--config.task.boundary={value}", f"--workdir={tmp_path}/run"]
    with pytest.raises(ConfigError, match="task.boundary = .* is not a number"):
      main.main([*FLAGS, *flags])


def test_evaluation(runs, tmp_path):
  evaluate.main([f"--checkpoint={runs}/low", f"--json={tmp_path}/a.json"])
  found = json.loads((tmp_path / "a.json").read_text())["metrics"]
  (wanted,) = lines(runs / "low", "validation")
  assert found["loss/0.000-0.125"] > found["loss/0.750-0.875"]
  assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6)


@pytest.mark.long
def test_a_run_that_was_stopped_is_the_run(tmp_path):
  flags = [*FLAGS, "--config.train.num_steps=12", "--config.checkpoint.every=5"]
  pair_of_runs.check_stopped(flags, tmp_path)


def test_pictures_of_denoised_images(tmp_path):
  """Three rows of images, their experts, and samples of a network for all timesteps.

  The layer sees the timestep, and has an expert for those below 0.4, and another one.
  """
  router = {"name": "by_feature", "feature": "timestep", "num_values": 2}
  moe = {"model.moe.router": router | {"boundaries": (0.4,)}}
  moe |= {"model.moe.num_experts": 2, "model.moe.top_k": 1}
  moe |= {"model.moe.balancers": {}, "model.pattern": ("moe",)}
  hook = {"train.hooks.a.name": "pictures", "train.hooks.a.every": 2}
  more = {"train.num_steps": 2, "task.boundary": None, "task.expert": None}
  values = (moe | hook | more).items()
  flags = [f"--config.{key}={value}" for key, value in values]
  main.main([*FLAGS, *flags, f"--workdir={tmp_path}"])
  shapes = {"denoised": (4 * 66, 8 * 66, 3), "samples": (66, 8 * 66, 3)}
  image = {}
  for name, shape in shapes.items():
    file = tmp_path / "pictures" / name / "00000002.png"
    image[name] = np.asarray(Image.open(file))
    assert image[name].shape == shape and image[name][:66].std() > 20
  tiles = image["denoised"][-66:].reshape(66, 8, 66, 3).swapaxes(0, 1)
  colours = [np.unique(x.reshape(-1, 3), axis=0) for x in tiles[:, 1:-1, 1:-1]]
  assert [len(own) for own in colours] == [1] * 8  # A video has one timestep.
  # Timesteps are 1/9, 2/9, ..., 8/9.
  first = [(own == colours[0]).all() for own in colours]
  assert first == [True] * 3 + [False] * 5
