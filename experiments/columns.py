"""Columns that the tables of several questions have."""

from experiments.report import Column

BITS_PER_BYTE = Column(
  "bits_per_byte", meaning="of the validation windows that are read."
)
MAX_VIO_GLOBAL = Column(
  "max_vio_global",
  meaning="MaxVio of the loads on all validation windows that are read, mean"
  " over layers.",
)
# A metric of training is its mean over the last quarter of the steps.
MAX_VIO = Column(
  "train/max_vio",
  "max_vio",
  meaning="MaxVio of a training step, mean over layers and the last quarter of"
  " the steps.",
)
MAX_VIO_FLOOR = Column(
  "train/max_vio_floor",
  "floor of a step",
  meaning="MaxVio of a random router on as many tokens.",
)
DROPPED = Column(
  "dropped",
  meaning="share of the validation windows' assignments without a slot.",
)
TRAIN_FLOPS = Column(
  "train_flops",
  "TFLOP",
  digits=1,
  factor=1e-12,
  meaning="1e12 operations of training that the active parameters ask for.",
)
TRAIN_SECONDS = Column(
  "train_seconds",
  "seconds",
  digits=0,
  meaning="of training: steps times what one takes (times.csv).",
)
