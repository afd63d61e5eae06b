"""Runs that classify images: from the command, stopped, evaluated, gone on from."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from moe_jax import evaluate, generate, main, params
from moe_jax.core import parallel
from moe_jax.core.errors import ConfigError
from moe_jax.data.images import prepared
from moe_jax.hf.of_config import vmoe
from moe_jax.models.parts import image
from moe_jax.moe import types
from moe_jax.run import config as config_lib
from moe_jax.tasks import classify_images, few_shot, pictures
from moe_jax.training import program, starts, trained
from tests import compiled, pair_of_runs

FLAGS = (
  "--config=configs/vmoe.py:tiny",
  "--config.data.batch_size=32",
  "--config.train.num_steps=300",
  "--config.optim.learning_rate=0.01",
  "--config.train.log_every=10",
  "--config.eval.batch_size=64",
  "--config.eval.batches_per_domain=None",
  "--config.model.remat=none",  # It compiles faster.
)


def lines(folder, split):
  return [row for row in pair_of_runs.lines(folder) if row["split"] == split]


@pytest.fixture(scope="module", autouse=True)
def one_device():
  """The tests are of whole runs, and `vision_test` has the meshes."""
  with pytest.MonkeyPatch.context() as m:
    m.setattr(parallel, "mesh_or_none", lambda *_: None)
    yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The work directory of a run of V-MoE's tiny on digits."""
  folder = tmp_path_factory.mktemp("run")
  main.main([*FLAGS, f"--workdir={folder}"])
  return folder


class Files(NamedTuple):
  """A run's weights as V-MoE's code stores them."""

  prefix: str
  model: object
  config: object
  params: dict


@pytest.fixture(scope="module")
def files(run):
  config = trained.config_of(str(run))
  model = program.build_model(config, program.build_task(config))
  _, variables = trained.weights(str(run), model)
  vmoe.save(f"{run}/weights", model, variables["params"])
  return Files(f"{run}/weights", model, config, variables["params"])


@pytest.mark.long
def test_it_learns(run):
  losses = [row["loss"] for row in lines(run, "train")]
  assert losses[-1] < 0.8 * losses[0]
  (found,) = lines(run, "validation")
  assert found["accuracy"] > 0.2 and found["accuracy_5"] > found["accuracy"]
  facts = json.loads((run / "run.json").read_text())
  assert facts["tokens_per_step"] == 32 * 17


@pytest.mark.long
@pytest.mark.parametrize("name", ["vmoe", "soft_moe"])
def test_a_run_that_was_stopped_is_the_run(tmp_path, name):
  flags = [f"--config=configs/{name}.py:tiny", *FLAGS[1:]]
  flags += ["--config.train.num_steps=12", "--config.checkpoint.every=5"]
  pair_of_runs.check_stopped(flags, tmp_path)


def metrics_of(run, path, *flags):
  evaluate.main([f"--checkpoint={run}", f"--json={path}", *flags])
  return json.loads(path.read_text())["metrics"]


def test_evaluation(run, tmp_path, capsys):
  """Metrics are those of the run's end; with other routing; and after a few images."""
  found = metrics_of(run, tmp_path / "a.json", "--few_shot=1,5")
  (wanted,) = lines(run, "validation")
  for name in ("loss", "accuracy", "max_vio"):
    assert found[name] == pytest.approx(wanted[name], rel=1e-5)
  assert 0.1 < found["few_shot/1"] < found["few_shot/5"] < 1
  said = capsys.readouterr().out
  assert "106 examples, 64 at a time" in said and "Other than" not in said
  less = ["--config.model.moe.eval_capacity_factor=0.5"]
  less.append("--config.model.moe.capacity_multiple=1")
  plain = metrics_of(run, tmp_path / "b.json", *less)
  changed = ", ".join(flag.removeprefix("--config.") for flag in less)
  assert f"Other than in the run: {changed}\n" in capsys.readouterr().out
  best = ["--config.model.moe.router.priority=score"]
  by_score = metrics_of(run, tmp_path / "c.json", *less, *best)
  assert plain["dropped"] > 0.4 and by_score["dropped"] > 0.4
  assert plain["loss"] != by_score["loss"]
  all_of_them = metrics_of(run, tmp_path / "d.json", *less, "--dropless")
  assert all_of_them["dropped"] == 0


@pytest.mark.parametrize(
  "flags, words",
  [
    (
      ["--config.model.d_model=24"],
      "has the shape .*change nothing that makes",
    ),
    (
      ["--seq_len=4"],
      "--seq_len is for text, and the task classify_images has none",
    ),
    (["--few_shot=400"], "--few_shot=400 needs as many training images"),
    (["--config.model.moe.top_k=9"], "top_k = 9 is more than"),
  ],
)
def test_evaluations_that_are_refused(run, flags, words):
  with pytest.raises(ConfigError, match=words):
    evaluate.main([f"--checkpoint={run}", *flags])


def test_no_text_can_be_written(run):
  with pytest.raises(ConfigError, match="classify_images, which has no text"):
    generate.main([f"--checkpoint={run}", "--prompt=a"])


def started(tmp_path, *flags):
  main.main(
    [*FLAGS, "--config.train.num_steps=2", f"--workdir={tmp_path}/next", *flags]
  )
  return lines(tmp_path / "next", "train")


def test_other_images_and_classes(run, tmp_path, caplog):
  """Places are interpolated, and the output begins anew with its bias."""
  flags = [f"--config.init_from={run}", "--config.task.size=12"]
  flags += ["--config.task.num_classes=12", "--config.train.log_every=1"]
  first = started(tmp_path, *flags)[0]
  assert "places of 4 x 4 patches" in caplog.text
  assert "output layer is new" in caplog.text
  loss = 11 * np.log1p(np.exp(-2)) + np.log1p(np.exp(2))
  assert first["loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.long
def test_other_classes_with_a_moving_average(run, tmp_path):
  flags = [f"--config.init_from={run}", "--config.task.num_classes=12"]
  started(tmp_path, *flags, "--config.train.ema=0.9")
  (found,) = lines(tmp_path / "next", "validation")
  assert np.isfinite(found["ema/loss"])


def test_places_are_interpolated():
  """On a line between places, and other shapes of as many places too."""
  rows = np.arange(4.0)[:, None] * np.ones((4, 4))
  square = np.stack([rows, rows.T], axis=-1).reshape(1, 16, 2)
  kept = image._resized(square, False, (4, 4), "here")
  np.testing.assert_array_equal(kept, square)
  found = image._resized(square, False, (8, 4), "here").reshape(8, 4, 2)
  wanted = np.clip((np.arange(8) + 0.5) / 2 - 0.5, 0, 3)
  np.testing.assert_allclose(found[..., 0], wanted[:, None] * np.ones(4))
  np.testing.assert_allclose(found[..., 1], np.arange(4.0) * np.ones((8, 1)))
  long = image._resized(square, False, (2, 8), "here").reshape(2, 8, 2)
  np.testing.assert_allclose(long[..., 0], [[0.5] * 8, [2.5] * 8])


def test_another_dataset_has_a_place_of_its_own(tmp_path, run, monkeypatch):
  """`--dataset` without `--data_dir` is not looked for in the run's folder."""
  asked = []

  def build_task(config, mesh):
    asked.append((config.data.name, config.data.dir))
    raise ConfigError("seen")

  monkeypatch.setattr(program, "build_task", build_task)
  flags = [f"--checkpoint={run}", "--config.data.dir=elsewhere"]
  for more in ([], ["--dataset=digits"], ["--dataset=a", "--data_dir=b"]):
    monkeypatch.setattr(trained, "has_text", lambda _: False)
    with pytest.raises(ConfigError, match="seen"):
      evaluate.main([*flags, *more])
  assert asked == [("digits", "elsewhere"), ("digits", None), ("a", "b")]


def test_files_of_vmoe_are_of_images(files, tmp_path):
  prefix, model, config, params = files
  begun = starts.read(prefix, model, config)["params"]
  jax.tree.map(np.testing.assert_array_equal, begun, params)
  flags = ["--config=configs/tiny.py", f"--config.init_from={prefix}"]
  with pytest.raises(ConfigError, match="for model.name = vision alone"):
    main.main([*flags, f"--workdir={tmp_path}/text"])


@pytest.mark.long
def test_files_of_vmoe_begin_a_run_on_other_images(
  run, files, tmp_path, caplog, monkeypatch
):
  """Their places are interpolated; other kinds of models are refused uncompiled."""
  prefix = files.prefix
  flags = ["--config.task.size=12", "--config.task.num_classes=12"]
  every = "--config.train.log_every=1"
  losses = [
    started(tmp_path / name, f"--config.init_from={start}", every, *flags)
    for name, start in (("a", run), ("b", prefix))
  ]
  assert losses[0][0]["loss"] == losses[1][0]["loss"]
  assert caplog.text.count("places of 4 x 4 patches") == 2
  monkeypatch.setattr(starts, "replaced", None)
  refused = {"model.image.pooling=mean": "has a class token"}
  refused["model.d_ff=40"] = "from which the model's .* cannot be made"
  for flag, words in refused.items():
    with pytest.raises(ConfigError, match=words):
      started(
        tmp_path / "c", f"--config.init_from={prefix}", f"--config.{flag}"
      )


def test_whole_numbers_are_no_weights(files):
  _, model, _, params = files
  arrays = vmoe.of_params(params, model)
  arrays["head/kernel"] = arrays["head/kernel"].astype(np.int32)
  with pytest.raises(ConfigError, match="head/kernel of int32"):
    vmoe.to_params(arrays, model, "here")


def test_files_of_vmoe_are_evaluated(run, files, tmp_path):
  """Metrics are those of the run that wrote the files, with slots of the flags."""
  prefix, found = files.prefix, {}
  for name, source in {
    "run": [f"--checkpoint={run}"],
    "files": [f"--hf={prefix}", f"--config={run}/config.json"],
  }.items():
    flags = ["--config.model.moe.eval_capacity_factor=0.5", "--few_shot=1"]
    evaluate.main([*source, *flags, f"--json={tmp_path}/{name}.json"])
    found[name] = json.loads((tmp_path / f"{name}.json").read_text())
  assert found["run"] == found["files"]
  assert found["run"]["metrics"]["dropped"] > 0.2
  refused = {
    "--ema is of a run": ["--ema", f"--hf={prefix}"],
    "has no weights for the task of --config": [f"--hf={tmp_path}"],
  }
  for words, flags in refused.items():
    with pytest.raises(ConfigError, match=words):
      evaluate.main([*flags, f"--config={run}/config.json"])


def test_parameters_without_images(tmp_path, capsys):
  params.main(["--config=configs/vmoe.py:s_32", f"--json={tmp_path}/a.json"])
  found = json.loads((tmp_path / "a.json").read_text())
  assert found["total"] == 296_895_347
  for key in ("size", "num_classes"):
    with pytest.raises(
      ConfigError, match=f"task.{key} = None is that of the data"
    ):
      params.main(
        ["--config=configs/vmoe.py:s_32", f"--config.task.{key}=None"]
      )


IMPOSSIBLE = {
  "task.num_classes = 3 is less than the 10 classes": ["task.num_classes=3"],
  'no images under the name "text"': ["task.image=text"],
  "task.channels = 2 is not": ["task.channels=2"],
  "task.loss = 'other' is not": ["task.loss=other"],
  'task.augment has no "blur"': ["task.augment.blur=1"],
  "needs images with 3 channels": ["task.augment.saturation=0.5"],
  "patch = 3 does not divide images of 8 x 8": ["model.image.patch=3"],
  'the model "decoder" is not for this task': ["model.name=decoder"],
  'there is no dataset "digit"': ["data.name=digit"],
}


@pytest.mark.parametrize("words", IMPOSSIBLE)
def test_impossible_configs(words, tmp_path):
  """Before anything is written."""
  flags = [f"--config.{text}" for text in IMPOSSIBLE[words]]
  with pytest.raises(ConfigError, match=words):
    main.main([*FLAGS, *flags, f"--workdir={tmp_path}/run"])
  assert not [*tmp_path.glob("run/[!.]*")]


def test_every_tiny_has_its_task():
  for name in ("vmoe", "soft_moe"):
    c = config_lib.load(f"configs/{name}.py:tiny")
    task = program.build_task(c, prepare=False)
    assert task.given == {"image_shape": (8, 8, 1), "num_classes": 10}


def images_of_three(validation=90):
  """Images whose first pixel tells the class, and whose other pixels are noise."""
  rng = np.random.default_rng(0)
  labels = {"train": np.arange(60) % 3, "validation": np.arange(validation) % 3}
  arrays = {
    k: (rng.integers(0, 255, (len(y), 2, 2, 1)).astype(np.uint8), y)
    for k, y in labels.items()
  }
  for x, y in arrays.values():
    x[:, 0, 0, 0] = 80 * y
  return prepared.Images("x", (2, 2, 1), ("a", "b", "c"), "0", arrays)


def after_few_shots(images, vectors, shots=(1, 5)):
  """The metrics of a model that makes these vectors of images."""

  class Model:
    def apply(self, variables, x, mask, classify):
      return vectors(x), {}

  def scale(x):
    return x.astype(jnp.float32)

  return few_shot.accuracies(images, scale, Model(), {}, shots, 16)


def knows_all(x):
  return jax.nn.one_hot((x[:, 0, 0, 0] // 80).astype(int), 3)


def test_few_shots_of_a_model_that_knows_all():
  """Vectors from which a linear classifier can tell everything, or nothing."""
  images = images_of_three()
  good = after_few_shots(images, knows_all)
  assert good == {"few_shot/1": 1, "few_shot/5": 1, "few_shot_images": 45}
  chance = pytest.approx(1 / 3, abs=0.1)  # Three deviations of five draws.
  bad = after_few_shots(images, lambda x: x[:, 1].reshape(len(x), -1))
  assert bad["few_shot/1"] == chance and bad["few_shot/5"] == chance
  equal = after_few_shots(images, lambda x: jnp.ones((len(x), 4)))
  assert equal["few_shot/5"] == pytest.approx(1 / 3)  # All are of one class.
  # In folders of images all of a class stand together.
  pixels, labels = images.arrays["validation"]
  order = np.argsort(labels, kind="stable")
  images.arrays["validation"] = pixels[order], labels[order]
  assert after_few_shots(images, knows_all) == good


@pytest.mark.parametrize("size", [(60, 7), (12, 40), (9, 9)])
def test_few_shots_solve_the_normal_equations(size, monkeypatch):
  """It solves for fewer and for more vectors than features, as numpy does."""
  rng = np.random.default_rng(0)
  x_NF, target_NC = rng.normal(size=size), rng.normal(size=(size[0], 3))

  def solved(x_NF, target_NC, r):
    gram_FF = x_NF.T @ x_NF + r * np.eye(size[1])
    return np.linalg.solve(gram_FF, x_NF.T @ target_NC)

  left, values, right = few_shot._ridge(x_NF, target_NC)
  assert len(values) == min(size)
  for r in (0.01, 1.0, 100.0):
    found_FC = left @ (right / (values + r)[:, None])
    np.testing.assert_allclose(found_FC, solved(x_NF, target_NC, r), atol=1e-10)
  # And the accuracy, with one regularisation and images that can be half told.
  label_N, wanted_M = np.arange(size[0]) % 3, rng.integers(0, 3, 80)
  centres = rng.normal(size=(3, size[1])) * 2 / size[1] ** 0.5
  x_NF += centres[label_N]
  others_MF = rng.normal(size=(80, size[1])) + centres[wanted_M]
  x, others = ((v - x_NF.mean(0)) / x_NF.std(0) for v in (x_NF, others_MF))
  target_NC = 2 * np.eye(3)[label_N] - 1
  shares = target_NC.mean(0)
  for factor in (1e-6, 0.1, 10.0):
    r = factor * np.linalg.norm(x, 2) ** 2
    guess = (others @ solved(x, target_NC - shares, r) + shares).argmax(1)
    right = (guess == wanted_M)[1::2].mean()
    monkeypatch.setattr(few_shot, "_REGULARISATIONS", np.array([factor]))
    args = x_NF, label_N, others_MF, wanted_M, 3
    assert few_shot._accuracy(*args) == right
    assert 0.35 < right < 0.95


def test_few_shots_that_are_refused():
  """Before the evaluation by the task; and vectors that are no numbers."""
  task = classify_images.of_images(
    config_lib.load("configs/vmoe.py:tiny"), images_of_three(2), (2, 2)
  )
  task.check_few_shot((1, 20))
  with pytest.raises(ConfigError, match='=21 needs as many .* "a" has 20'):
    task.check_few_shot((1, 21))
  with pytest.raises(ConfigError, match="at least 2 validation .* x has 1;"):
    after_few_shots(images_of_three(1), knows_all)
  for broken in (lambda x: jnp.log(-knows_all(x)), lambda x: 1 / knows_all(x)):
    with pytest.raises(ConfigError, match="this model contain NaN or infinity"):
      after_few_shots(images_of_three(), broken)


def test_few_shots_choose_without_the_images_that_count(monkeypatch):
  """If two regularisations are alike on one half, the first one is taken."""
  monkeypatch.setattr(few_shot, "_REGULARISATIONS", np.array([1e9, 1e-9]))
  rng = np.random.default_rng(0)
  label_N = np.repeat([0, 1], [6, 4])
  x_NF = np.eye(2)[label_N] + 0.01 * rng.normal(size=(10, 2))
  # With much of it all are of the class that is seen most, as every second one is.
  wanted_M = np.tile([0, 1], 10)
  others_MF = np.eye(2)[wanted_M]
  found = few_shot._accuracy(x_NF, label_N, others_MF, wanted_M, 3)
  assert found == 0


def colours(maps):
  """The colours of the patches in a row of maps; a patch has one colour."""
  maps = maps.reshape(66, 8, 66, 3)[1:-1, :, 1:-1]
  patches = maps.reshape(4, 16, 8, 4, 16, 3).transpose(0, 2, 3, 1, 4, 5)
  patches = patches.reshape(-1, 16 * 16, 3)
  assert (patches == patches[:, :1]).all()
  return {tuple(patch[0]) for patch in patches}


def test_pictures_of_experts(tmp_path):
  """A row of images, a row of maps, and the same in TensorBoard."""
  flags = ["--config.train.num_steps=4", "--config.writers=('tensorboard',)"]
  flags += [
    "--config.train.hooks.a.name=pictures",
    "--config.train.hooks.a.every=2",
  ]
  main.main([*FLAGS, *flags, f"--workdir={tmp_path}"])
  folder = tmp_path / "pictures" / "experts"
  assert [p.name for p in sorted(folder.iterdir())] == [
    "00000002.png",
    "00000004.png",
  ]
  image = np.asarray(Image.open(folder / "00000004.png"))
  assert image.shape == (2 * 66, 8 * 66, 3)
  assert 1 < len(colours(image[66:])) <= 8
  events = b"".join(
    p.read_bytes() for p in (tmp_path / "tensorboard").iterdir()
  )
  assert b"PNG" in events and b"experts" in events


@pytest.mark.parametrize("router", ["soft", "expert_choice"])
def test_pictures_where_slots_or_experts_choose(router):
  """The layer with experts has a row, whose colours differ."""
  c = config_lib.load("configs/soft_moe.py:tiny")
  values = c.to_dict()
  values["model"]["moe"]["router"] = {"name": router}
  c = config_lib.locked(values)
  task = program.build_task(c)
  model = program.build_model(c, task)
  variables = compiled.init(model, jax.random.key(0))
  picture = task.pictures(model, variables)["experts"]
  assert picture.shape == (2 * 66, 8 * 66, 3)
  assert 2 < len(colours(picture[66:])) <= 9


def test_the_expert_with_the_largest_weight():
  """By loops over slots, of two groups; a token without a slot has no expert."""
  rng = np.random.default_rng(0)
  token_GEC = np.stack([rng.permutation(7)[:2] for _ in range(6)])
  token_GEC = token_GEC.reshape(2, 3, 2)
  weight_GEC, valid_GEC = rng.random((2, 3, 2)), rng.random((2, 3, 2)) < 0.8
  weight_GTE = np.zeros((2, 7, 3))
  for g, e, c in np.ndindex(2, 3, 2):
    if valid_GEC[g, e, c]:
      weight_GTE[g, token_GEC[g, e, c], e] = weight_GEC[g, e, c]
  wanted = np.where(weight_GTE.any(-1), weight_GTE.argmax(-1), -1)
  assert -1 in wanted and len(np.unique(wanted)) > 2
  choice = types.SlotChoice(
    *map(jnp.asarray, (token_GEC, weight_GEC, valid_GEC))
  )
  np.testing.assert_array_equal(pictures._best(choice, 7), wanted)
  combine_GTEC = rng.random((2, 7, 3, 2))
  choice = types.Mixture(None, jnp.asarray(combine_GTEC))
  found = pictures._best(choice, 7)
  np.testing.assert_array_equal(found, combine_GTEC.sum(-1).argmax(-1))


def test_a_task_without_pictures(tmp_path):
  hook = [
    "--config.train.hooks.a.name=pictures",
    "--config.train.hooks.a.every=2",
  ]
  with pytest.raises(ConfigError, match="next_token has no pictures"):
    main.main(["--config=configs/tiny.py", *hook, f"--workdir={tmp_path}/run"])
