"""The report's arithmetic against numbers made by hand, and its files."""

import csv
import json
import math

import pytest

from experiments import figures, intervals, report, runs


def rows(**arms):
  """Rows of bits_per_byte by arm, seeds 0, 1, ..."""
  return [
    {
      "scale": "demo",
      "arm": arm,
      "seed": seed,
      "config_digest": "0" * 12,
      "bits_per_byte": value,
    }
    for arm, values in arms.items()
    for seed, value in enumerate(values)
  ]


REPORT = report.Report(
  columns=(report.Column("bits_per_byte", digits=2, meaning="of text."),),
  claims=(report.Claim("bits_per_byte", "b", "a"),),
)


def test_t_interval():
  # s = 1, t(2) at 97.5 % = 4.30265 from any table.
  mean, half, values = intervals.of([1.0, 2.0, 3.0])
  assert (mean, values) == (2.0, (1.0, 2.0, 3.0))
  assert half == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
  # n = 2: t(1) = 12.7062, s = |a - b| / sqrt(2), so half = t |a - b| / 2.
  assert intervals.of([0.0, 0.2]).half == pytest.approx(1.27062, rel=1e-5)
  assert intervals.of([5.0]) == (5.0, None, (5.0,))


def test_few_values_are_shown_by_their_ends():
  """The interval of three values says little, and may leave what is possible."""
  few = intervals.of([0.1, 0.2, 0.9])
  assert few.ends == (0.1, 0.9) and few.mean - few.half < 0
  many = intervals.of([0.1, 0.2, 0.2, 0.9])
  assert many.ends == (many.mean - many.half, many.mean + many.half)


def test_paired_difference():
  # 0.1, 0.2, 0.3: mean 0.2, s = 0.1, though each arm spreads by far more.
  ones, others = {0: 1.1, 1: 5.2, 2: 9.3}, {0: 1.0, 1: 5.0, 2: 9.0, 3: 77.0}
  found = intervals.paired(ones, others)
  assert len(found.values) == 3
  assert found.mean == pytest.approx(0.2)
  assert found.half == pytest.approx(4.30265 * 0.1 / math.sqrt(3), rel=1e-5)
  assert not found.decides
  assert intervals.paired({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(
  "a, b, words",
  [
    (
      [1.0, 5.0, 9.0],
      [1.20, 5.21, 9.19],
      "+0.20 ± 0.02 (3 pairs): b is higher",
    ),
    ([1.2, 5.2, 9.2], [1.00, 5.01, 8.99], "-0.20 ± 0.02 (3 pairs): b is lower"),
    (
      [1.0, 5.0, 9.0],
      [1.1, 5.2, 9.3],
      "+0.20 ± 0.25 (3 pairs): no significant difference (95 % interval",
    ),
    ([1.0], [2.0], "+1.00 (1 pair): a single pair of seeds gives no interval"),
    ([1.0], [], "no seed has both"),
  ],
)
def test_claims_say_whether_they_are_decided(a, b, words):
  assert words in report.claim(REPORT.claims[0], REPORT, rows(a=a, b=b))


def test_the_table(tmp_path):
  some = rows(a_1=[1.0, 2.0, 3.0, 4.0])
  text = report.write(tmp_path, "Why?", REPORT, some, [])
  # s = 1.29099, t(3) = 3.18245, half = t s / 2.
  assert "| a_1 | 2.50 ± 2.05   |" in text
  assert (
    "seeds 0, 1, 2, 3. Mean ± half the 95 % t-interval over seeds.\n" in text
  )
  assert "- bits_per_byte (`bits_per_byte`): of text." in text
  assert (tmp_path / "table.md").read_text() == text + "\n"


def test_two_or_three_seeds_are_shown_by_their_ends(tmp_path):
  some = rows(a=[0.1, 0.2, 0.9], b=[0.1, 0.2], c=[0.3], d=[0.4, 0.4])
  text = report.write(tmp_path, "Why?", REPORT, some, [])
  for line in ("a   | 0.40 [0.10, 0.90]", "b   | 0.15 [0.10, 0.20]"):
    assert f"| {line} |" in text
  assert "| c   | 0.30 " in text and "| d   | 0.40 " in text
  assert "With two or three seeds: mean [lowest, highest]." in text
  assert "t-interval" not in text


def test_the_latex_table(tmp_path):
  """booktabs, a caption to copy, titles as they are read, and what is best."""
  plan = report.Report(
    (
      report.Column("bits_per_byte", "bits & bytes", 2, best=min),
      report.Column("x", "50 %_{x}", 2, best=max),
    )
  )
  some = rows(a_1=[1.0, 1.1, 1.2, 1.3], b=[2.0, 2.1, 2.2, 2.4])
  for row in some:  # Zero is in this interval.
    row["x"] = row["bits_per_byte"] * (-1) ** row["seed"]
  report.write(tmp_path, "Why?", plan, some, [])
  lines = (tmp_path / "table.tex").read_text().splitlines()
  assert lines[0] == r"% Needs \usepackage{booktabs}. Caption:"
  assert lines[1].startswith(
    "% Why? Scale demo, 8 runs, seeds 0, 1, 2, 3. Mean"
  )
  assert r" $\pm$ half the 95 \% t-interval" in lines[1]
  assert lines[2:] == [
    r"\begin{tabular}{lrr}",
    r"\toprule",
    r"arm & bits \& bytes & 50 \%\_\{x\} \\",
    r"\midrule",
    r"a\_1 & \textbf{1.15 $\pm$ 0.21} & -0.05 $\pm$ 2.12 \\",
    r"b & 2.17 $\pm$ 0.27 & -0.07 $\pm$ 4.00 \\",
    r"\bottomrule",
    r"\end{tabular}",
  ]


def test_a_ratio_is_taken_run_by_run(tmp_path):
  some = [r | {"floor": f} for r, f in zip(rows(a=[2.0, 9.0]), (1.0, 3.0))]
  column = report.Column("bits_per_byte", "ratio", digits=1, over="floor")
  text = report.write(tmp_path, "Why?", report.Report((column,)), some, [])
  assert "| a   | 2.5 [2.0, 3.0] |" in text


def test_the_table_is_made_from_the_csv(tmp_path, monkeypatch):
  def write_others(path, rows):
    write(path, [r | {"bits_per_byte": 7.0} for r in rows])

  write = runs.write_csv
  monkeypatch.setattr(runs, "write_csv", write_others)
  text = report.write(tmp_path, "Why?", REPORT, rows(a=[1.0, 2.0]), [])
  assert "| a   | 7.00" in text


def test_csv(tmp_path):
  path = tmp_path / "results.csv"
  before = rows(a=[0.1 + 0.2, 1e-17])
  before[1]["max_vio"] = 1.5
  runs.write_csv(path, before)
  assert runs.read_csv(path) == before
  with open(path) as f:
    head = next(csv.reader(f))
  assert head[:4] == ["scale", "arm", "seed", "config_digest"]
  assert runs.read_csv(tmp_path / "none.csv") == []


def test_an_arm_without_the_metric(tmp_path):
  some = rows(a=[1.0]) + [r | {"x": 2.0} for r in rows(b=[1.0])]
  plan = report.Report(columns=(report.Column("x"),))
  text = report.write(tmp_path, "Why?", plan, some, [])
  assert "| a   | –     |" in text and "| b   | 2.000 |" in text


def test_training_metrics_are_of_the_last_quarter_and_of_all_of_it():
  lines = [
    {"step": s, "split": "train", "max_vio": float(s)}
    for s in range(10, 90, 10)
  ]
  row = runs.summary(lines, {"loss": 1.0})
  means = {"train/max_vio": 75.0, "whole/max_vio": 45.0}
  assert row == {"loss": 1.0} | means
  lines[-1].pop("max_vio")  # All of its steps were skipped.
  row = runs.summary(lines, {"loss": 1.0})
  means = {"train/max_vio": 70.0, "whole/max_vio": 40.0}
  assert row == {"loss": 1.0} | means


def test_bands_and_figures(tmp_path):
  points = [
    {"arm": "a", "seed": s, "step": t, "x": float(s + t), "floor": 0.5}
    for s in (0, 2)
    for t in (10, 20)
  ]
  assert figures.band(points, "a", "x") == (
    [10, 20],
    [11, 21],
    [10, 20],
    [12, 22],
  )
  curve = figures.Curve("x", "x", floor="floor", floor_label="floor", log=True)
  curve.draw([{"arm": "a"}], points, tmp_path)
  ends = [{"arm": "a", "x": 1.0, "y/z": 2.0}, {"arm": "b", "x": 1.0}]
  figures.Scatter("x", "y/z", "x", "y", log=True).draw(ends, points, tmp_path)
  for name in ("x", "y_z_over_x"):
    for kind, magic in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
      assert (tmp_path / f"{name}.{kind}").read_bytes().startswith(magic)


def test_a_curve_of_differences_is_paired_by_seed(tmp_path):
  points = [
    {"arm": arm, "seed": seed, "step": step, "x": value + step}
    for arm, seed, value in (
      *(("a", 0, 1.0), ("a", 1, 5.0), ("b", 0, 3.0), ("b", 1, 6.0)),
      ("b", 2, 9.0),  # Without a partner.
    )
    for step in (10, 20)
  ]
  found = figures.differences(points, "x", "a")
  assert figures.band(found, "b", "x") == (
    [10, 20],
    [1.5] * 2,
    [1] * 2,
    [2] * 2,
  )
  assert figures.band(found, "a", "x")[1] == [0, 0]
  curve = figures.Curve("x", "x", arms=lambda _: ["b"], minus="a", name="less")
  curve.draw([{"arm": "a"}, {"arm": "b"}], points, tmp_path)
  assert (tmp_path / "less.png").exists()


def test_matches_are_of_the_means():
  def words(b):
    pair = report.Claim("loss", "b", "a", alike="bits_per_byte")
    return report.match(pair, REPORT, rows(a=[1.0, 3.0], b=b))

  assert words([2.0, 2.7]).endswith("b over a: 1.18, within 20 %.")
  assert words([1.0, 2.3]).endswith("b over a: 0.82, not within 20 %.")
  assert words([]).endswith("b over a: not both have it.")


def test_a_claim_says_that_arms_are_not_alike():
  claim = REPORT.claims[0]._replace(alike="max_vio")

  def words(max_vio_b):
    some = rows(a=[1.0, 1.1, 0.9], b=[3.0, 3.2, 2.8])
    for row in some:
      row["max_vio"] = {"a": 1.0, "b": max_vio_b}[row["arm"]]
    return report.claim(claim, REPORT, some)

  assert words(1.1).endswith("b is higher.")
  assert words(2.0).endswith(
    "b is higher. Note that their max_vio is not alike."
  )


def test_a_run_that_diverged_is_named_and_counts_nowhere(tmp_path):
  some = rows(a=[1.0, 3.0, 5.0])
  some[1].pop("bits_per_byte")
  some[1]["diverged"] = 1.0
  text = report.write(tmp_path, "Why?", REPORT, some, [])
  assert "Diverged, so not in the numbers: a seed 1." in text
  assert "| a   | 3.00 [1.00, 5.00] |" in text


def test_curves_hold_evaluations_and_only_what_is_drawn(tmp_path):
  run = runs.Run("demo", "a", 0, "0" * 12, tmp_path / "run")
  run.folder.mkdir()
  lines = [
    {"step": 10, "split": "train", "loss": 3.0},
    {"step": 20, "split": "train", "loss": 2.0},
    {"step": 20, "split": "validation", "loss": 2.5},
  ]
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (run.folder / "metrics.jsonl").write_text(text)
  train, validation = {"loss": 2.0}, {"validation/loss": 2.5}
  assert run.curve()[1:] == [
    run.key | {"step": 20} | x for x in (train, validation)
  ]
  plan = REPORT._replace(plots=(figures.Curve("validation/loss", "loss"),))
  report.write(tmp_path, "It?", plan, rows(a=[1.0]), run.curve())
  kept = runs.read_csv(tmp_path / "curves.csv")
  assert kept == [run.key | {"step": 20} | validation]
  assert (tmp_path / "validation_loss.png").exists()


def test_arms_with_other_seeds_are_told_apart():
  found = rows(many=[1.0, 2.0, 3.0, 4.0], few=[1.0], less=[1.0])
  words = "seeds 0 of few, less; seeds 0, 1, 2, 3 of many. Mean ±"
  assert words in report._about(found)
