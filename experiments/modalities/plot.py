"""The report of modalities."""

from experiments import columns, figures
from experiments.report import Claim, Column, Report

_PAIRS = (
  *(("shared", "dense"), ("split", "dense"), ("one_each", "dense")),
  *(("split", "shared"), ("split", "one_each")),
)
_LOSSES = ("loss_text", "loss_image")


REPORT = Report(
  columns=(
    Column(
      "loss_text",
      "text",
      meaning="validation cross-entropy of the tokens of captions, in nats per token"
      " (lower is better).",
      best=min,
    ),
    Column(
      "loss_image",
      "image",
      meaning="the same of the codes of pixels.",
      best=min,
    ),
    columns.MAX_VIO_GLOBAL,
    columns.TOTAL_PARAMETERS,
    columns.TRAIN_FLOPS,
    columns.TRAIN_SECONDS,
  ),
  claims=tuple(Claim(loss, *pair) for loss in _LOSSES for pair in _PAIRS),
  plots=tuple(
    figures.Curve(f"validation/{loss}", f"validation nats per {loss[5:]} token")
    for loss in _LOSSES
  ),
)
