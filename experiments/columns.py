"""Columns that the tables of several questions have."""

from experiments.report import Column, Report

BITS_PER_BYTE = Column(
  "bits_per_byte",
  "bits per byte",
  meaning="validation bits per byte (lower is better).",
  best=min,
)
MAX_VIO_GLOBAL = Column(
  "max_vio_global",
  "MaxVio",
  meaning="MaxVio of the loads on all validation windows, mean over MoE layers"
  " (0: equal loads).",
  best=min,
)
# A metric of training is its mean over the last quarter of the steps.
MAX_VIO = Column(
  "train/max_vio",
  "step MaxVio",
  meaning="MaxVio of a training step, mean over MoE layers and the last quarter"
  " of the steps.",
  best=min,
)
MAX_VIO_FLOOR = Column(
  "train/max_vio_floor",
  "step floor",
  meaning="MaxVio of a uniform random router on as many tokens as a step has.",
)
DROPPED = Column(
  "dropped",
  meaning="share of the validation assignments that found no free slot.",
)
NO_SLOT = Column(
  "train/dropped/capacity",
  "no slot",
  meaning="share of the assignments of the last training steps that found no free"
  " slot.",
)
TOTAL_PARAMETERS = Column(
  "total_parameters",
  "M total",
  digits=2,
  factor=1e-6,
  meaning="10^6 parameters.",
)
TRAIN_FLOPS = Column(
  "train_flops",
  "TFLOP",
  digits=1,
  factor=1e-12,
  meaning="10^12 operations of training, counted from the active parameters.",
)
TRAIN_SECONDS = Column(
  "train_seconds",
  "seconds",
  digits=0,
  meaning="training time: steps times the seconds of a step in times.csv.",
  optional=True,
)

REPORT = Report((BITS_PER_BYTE, MAX_VIO_GLOBAL))
"""The report of a question that has no plot.py."""
