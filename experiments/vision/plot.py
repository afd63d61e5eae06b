"""The report of vision."""

from experiments import columns, figures
from experiments.report import Claim, Column, Report
from experiments.vision import sweep

ACCURACY = "validation/accuracy"
_TIGHT = [f"{order}_{sweep.TIGHT}" for order in ("plain", "priority")]
_PAIRS = (
  *((arm, "dense") for arm in ("dense_wide", "sparse", "soft", "choice")),
  *((arm, "sparse") for arm in ("soft", *sweep.LIKE_SPARSE)),
  *(("soft", "choice"), ("experts_32", "experts_4"), (_TIGHT[1], _TIGHT[0])),
  *((arm, "soft") for arm in sweep.LIKE_SOFT),
)


def _curve(name, arms):
  label = "validation accuracy"
  return figures.Curve(ACCURACY, label, arms=lambda _: arms, name=name)


REPORT = Report(
  columns=(
    Column(
      "accuracy",
      "accuracy, %",
      digits=1,
      factor=100.0,
      meaning="share of the validation images whose class has the highest logit"
      " (higher is better).",
      best=max,
    ),
    Column(
      "loss",
      meaning="validation cross-entropy in nats (lower is better).",
      best=min,
    ),
    columns.DROPPED,
    columns.NO_SLOT,
    columns.MAX_VIO_GLOBAL,
    columns.TOTAL_PARAMETERS,
    columns.TRAIN_FLOPS,
    columns.TRAIN_SECONDS,
  ),
  claims=tuple(Claim("accuracy", *pair) for pair in _PAIRS),
  plots=(
    _curve("accuracy", ("dense", "dense_wide", "sparse", "soft", "choice")),
    _curve("experts", ("dense", "experts_4", "sparse", "experts_32")),
  ),
)
