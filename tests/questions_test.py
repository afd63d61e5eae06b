"""The committed questions, whole and of their rows; and one's own."""

import re
import sys

import pytest
from PIL import Image

import experiments
from experiments import columns, launch, questions, runs, sweeps
from moe_jax import models
from moe_jax.core.errors import ConfigError
from moe_jax.models import counts
from tests.house import ROOT

# Beside them may be questions that somebody works on.
COMMITTED = re.findall(
  r"\]\(\.\./experiments/(\w+)/README\.md\)",
  (ROOT / "docs" / "results.md").read_text(),
)
TABLES = [
  (name, scale)
  for name in COMMITTED
  for scale in questions.load(name).scales
  if (ROOT / "experiments" / name / "figures" / f"{scale}.md").exists()
]


@pytest.mark.parametrize("name", COMMITTED)
def test_a_committed_question_is_whole(name):
  question = questions.load(name)
  assert (question.folder / "README.md").exists()
  pairs = set()
  for scale in question.scales:
    arms = question.scales[scale]().configs()
    assert len({sweeps.digest(c) for c in arms.values()}) == len(arms)
    pairs |= {(arm, baseline) for arm in arms for baseline in arms}
  if question.report.derive:  # It may make rows of several runs.
    rows, curves = (
      runs.read_csv(question.folder / f"{table}.csv")
      for table in ("results", "curves")
    )
    missing = {arm for arm, _ in pairs} - {r["arm"] for r in rows}
    rows += [rows[0] | {"arm": arm} for arm in missing if rows]
    made = {r["arm"] for r in question.report.derive(rows, curves)}
    pairs |= {(arm, baseline) for arm in made for baseline in made}
  for claim in question.report.claims:
    assert (claim.arm, claim.baseline) in pairs


@pytest.mark.parametrize("name, scale", TABLES)
def test_a_committed_table_is_of_the_committed_rows(
  name, scale, tmp_path, capsys
):
  """Made again without any run, and what the question's README shows."""
  question = questions.load(name)
  flags = [f"--scale={scale}", f"--workdir={tmp_path}", "--report"]
  assert launch.main([name, *flags]) == 0
  assert "Not finished" not in capsys.readouterr().out
  made, kept = tmp_path / "report", question.folder / "figures"
  table = (made / "table.md").read_text()
  assert table == (kept / f"{scale}.md").read_text()
  shown = table.split("\n\n", 1)[1]  # All but the title.
  assert shown in (question.folder / "README.md").read_text()
  drawn, committed = (
    {path.name.removeprefix(f"{scale}_"): _size(path) for path in paths}
    for paths in (made.glob("*.png"), kept.glob(f"{scale}_*.png"))
  )
  assert drawn == committed


def _size(path):
  """Pixels of a picture."""
  with Image.open(path) as image:
    return image.size


def counted(config, vocab_size=257):
  model = models.build(config.model, vocab_size=vocab_size)
  return counts.count(model, models.variables(model)), model


def test_the_dense_arm_has_as_many_active_parameters():
  arms = questions.load("load_balancing").scales["cpu"]().configs()
  (sparse, one), (dense, other) = (counted(arms[a]) for a in ("bias", "dense"))
  assert sparse["active"] == dense["active"] == dense["total"]
  flops = [
    counts.train_flops_per_token(model, sizes, {"inputs": 128})
    for model, sizes in ((one, sparse), (other, dense))
  ]
  # Six for every weight but the norms', and 12 L times heads' widths a layer.
  weights = dense["active"] - dense["norm"]
  assert flops == [6 * weights + 12 * 128 * 4 * 64] * 2


@pytest.mark.parametrize(
  "arm, billions", [("1b-bias", 1.05), ("3b-bias", 2.56)]
)
def test_the_sizes_of_the_paper(arm, billions):
  """2408.15664, table 5: they say 1B and 3B."""
  configs = questions.load("load_balancing").scales["pod"]().configs()
  config = configs[arm]
  found, _ = counted(config, vocab_size=32_064)
  assert round(found["total"] / 1e9, 2) == billions
  dense, _ = counted(configs[arm.replace("bias", "dense")], vocab_size=32_064)
  assert dense["total"] == pytest.approx(found["active"], rel=1e-3)
  tokens = config.data.batch_size * config.data.seq_len * config.train.num_steps
  assert round(tokens / 1e9, -1) in (90, 200)


def test_the_scale_of_one_gpu():
  """About ten million active parameters, and thirty million tokens a run."""
  arms = questions.load("balancers").scales["gpu"]().configs()
  for arm in ("dropless-sign", "capacity-sign"):
    found, _ = counted(arms[arm])
    assert 9.5e6 < found["active"] < 10.5e6
    c = arms[arm]
    assert c.data.batch_size * c.data.seq_len * c.train.num_steps >= 3e7
    assert c.model.dtype == "bfloat16"
    assert (c.model.moe.capacity_factor is None) == ("dropless" in arm)


SWEEP = """
from configs import tiny
from experiments import sweeps

def demo():
  arms = sweeps.over("model.moe.top_k", {"k1": 1, "k2": 2})
  return sweeps.Sweep(tiny.get_config(), arms, seeds=2)

SCALES = {"demo": demo}
"""


NAME = "question_of_a_test"


@pytest.fixture
def mine(tmp_path, monkeypatch):
  """The folder of a question, as small as one may be."""
  folder = tmp_path / "of_mine" / NAME
  folder.mkdir(parents=True)
  (folder / "__init__.py").write_text('"""Is it mine?"""\n')
  (folder / "sweep.py").write_text(SWEEP)
  monkeypatch.setattr(experiments, "__path__", list(experiments.__path__))
  yield folder
  for name in [m for m in sys.modules if m.startswith(f"experiments.{NAME}")]:
    del sys.modules[name]


def test_a_question_may_lie_anywhere(mine, tmp_path, capsys):
  """Help and --list name it beside the others, and it needs no plot.py."""
  flag = f"--questions={mine.parent}"
  with pytest.raises(SystemExit) as stopped:
    launch.main([flag, "--help"])
  assert stopped.value.code == 0
  words = " ".join(capsys.readouterr().out.split())
  known = questions.names()
  assert {NAME, *COMMITTED} <= {*known} and ", ".join(known) in words
  assert launch.main([flag, "--list"]) == 0
  listed = capsys.readouterr().out.splitlines()
  assert f"{NAME}      Is it mine?" in listed
  assert [line.split()[0] for line in listed] == known
  work = f"--workdir={tmp_path / 'work'}"
  assert launch.main([flag, NAME, "--list", work]) == 0
  assert (
    "k1                      0 of 2 seeds finished" in capsys.readouterr().out
  )
  question = questions.load(NAME)
  assert question.folder == mine and question.report is columns.REPORT


@pytest.mark.parametrize(
  "names, file, text, words",
  [
    ("nowhere", "sweep.py", SWEEP, "nowhere holds no question; a question is"),
    (f"of_mine/{NAME}", "sweep.py", SWEEP, f"{NAME} holds no question; a"),
    ("of_mine", "sweep.py", None, "sweep.py has to define SCALES; see docs"),
    ("of_mine", "sweep.py", "", "sweep.py has to define SCALES; see docs"),
    ("of_mine", "plot.py", "", "plot.py has to define REPORT; see docs"),
  ],
)
def test_a_question_that_is_not_whole(mine, names, file, text, words):
  path = mine / file
  path.unlink() if text is None else path.write_text(text)
  flag = f"--questions={mine.parents[1] / names}"
  with pytest.raises(ConfigError, match=words):
    launch.main([flag, NAME, "--list"])


@pytest.mark.parametrize("name", ["gating", "report"])
def test_a_question_takes_no_name_of_another_module(mine, name):
  mine.rename(mine.with_name(name))
  with pytest.raises(ConfigError, match=f'"{name}" in .* rename its folder'):
    launch.main([f"--questions={mine.parent}", name, "--list"])


def test_a_launch_without_a_question_names_them(capsys):
  known = ", ".join(questions.names())
  with pytest.raises(ConfigError, match=f"give a QUESTION; known: {known}"):
    launch.main([])
