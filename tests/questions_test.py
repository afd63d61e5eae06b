"""The questions that are committed: whole, and of their rows."""

import pytest

from experiments import launch, questions, sweeps
from moe_jax import models
from moe_jax.models import counts


def test_every_question_is_whole():
  for name in questions.names():
    question = questions.load(name)
    assert (question.folder / "README.md").exists()
    pairs = set()
    for scale in question.scales:
      sweep = question.sweep(scale)
      arms = sweep.configs()
      assert len({sweeps.digest(c) for c in arms.values()}) == len(arms)
      pairs |= {(one, other) for one in arms for other in arms}
    for claim in (*question.plan.claims, *question.plan.matches):
      assert (claim.arm, claim.than) in pairs


COMMITTED = [
  (name, scale)
  for name in questions.names()
  for scale in questions.load(name).scales
  if (questions.load(name).folder / "figures" / f"{scale}.md").exists()
]


@pytest.mark.parametrize("name, scale", COMMITTED)
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
  lines = [line for line in table.splitlines() if line[:2] in ("| ", "- ")]
  missing = set(lines) - set(
    (question.folder / "README.md").read_text().split("\n")
  )
  assert not [line for line in missing if not line.startswith("- `")]
  for path in made.glob("*.png"):
    assert (kept / f"{scale}_{path.name}").exists()


def counted(config, vocab_size=257):
  model = models.build(
    config.model,
    vocab_size=vocab_size,
    seq_len=config.data.seq_len,
    batch_sizes=(config.data.batch_size,),
  )
  return counts.count(model, config.data.seq_len), model


def test_the_dense_arm_has_as_many_active_parameters():
  arms = questions.load("load_balancing").sweep("cpu").configs()
  (sparse, one), (dense, other) = (counted(arms[a]) for a in ("bias", "dense"))
  assert sparse["active"] == dense["active"] == dense["total"]
  flops = [counts.train_flops_per_token(m, 128) for m in (one, other)]
  # Six for every weight but the norms', and 12 L times heads' widths a layer.
  weights = dense["active"] - dense["norm"]
  assert flops == [6 * weights + 12 * 128 * 4 * 64] * 2


@pytest.mark.parametrize(
  "arm, billions", [("1b-bias", 1.05), ("3b-bias", 2.56)]
)
def test_the_sizes_of_the_paper(arm, billions):
  """2408.15664, table 5: they say 1B and 3B."""
  configs = questions.load("load_balancing").sweep("pod").configs()
  config = configs[arm]
  found, _ = counted(config, vocab_size=32_064)
  assert round(found["total"] / 1e9, 2) == billions
  dense, _ = counted(configs[arm.replace("bias", "dense")], vocab_size=32_064)
  assert dense["total"] == pytest.approx(found["active"], rel=1e-3)
  tokens = config.data.batch_size * config.data.seq_len * config.train.num_steps
  assert round(tokens / 1e9, -1) in (90, 200)
