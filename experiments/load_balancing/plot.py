"""The report of load balancing."""

from experiments import columns, figures
from experiments.report import Claim, Column, Report

_OTHERS = ("none", "loss_1e-2", "loss_1e-3")
_PAIRS = (*(("bias", arm) for arm in _OTHERS), ("bias_1e-3", "loss_1e-3"))
_ALL_PAIRS = (
  *_PAIRS,
  ("bias", "bias_1e-3"),
  *((loss, "none") for loss in _OTHERS[1:]),
)
_DENSE_PAIRS = (
  *((arm, "dense") for arm in ("bias", *_OTHERS[1:], "bias_1e-3")),
  ("bias", "dense_longer"),
  ("none", "dense"),
)

REPORT = Report(
  columns=(
    columns.BITS_PER_BYTE,
    columns.MAX_VIO_GLOBAL,
    Column(
      "max_vio_floor",
      "floor",
      meaning="MaxVio of a uniform random router on as many tokens.",
    ),
    columns.MAX_VIO,
    columns.MAX_VIO_FLOOR,
    Column(
      "train/max_vio",
      "step MaxVio / floor",
      digits=2,
      over="train/max_vio_floor",
      meaning="step MaxVio over step floor, run by run (1: a random router).",
    ),
    columns.DROPPED,
    Column(
      "dead_experts",
      "dead experts",
      digits=2,
      meaning="experts of a layer without a token on the validation windows.",
    ),
    columns.TRAIN_FLOPS,
    columns.TRAIN_SECONDS,
  ),
  claims=(
    *(Claim("train/max_vio", *pair) for pair in _PAIRS),
    *(
      Claim(metric, *pair)
      for metric in ("max_vio_global", "bits_per_byte")
      for pair in _ALL_PAIRS
    ),
    *(Claim("bits_per_byte", *pair) for pair in _DENSE_PAIRS),
    *(
      Claim(metric, f"{size}-bias", f"{size}-{baseline}")
      for size in ("1b", "3b")
      for metric in ("max_vio_global", "bits_per_byte")
      for baseline in ("loss_1e-3", "none")
    ),
    Claim("bits_per_byte", "1b-bias", "1b-dense"),
    Claim("bits_per_byte", "3b-bias", "3b-dense"),
  ),
  plots=(figures.MAX_VIO, figures.BITS_OVER_MAX_VIO),
)
