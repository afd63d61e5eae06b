"""What the report of gating shows."""

from experiments import columns
from experiments.figures import Curve, Scatter
from experiments.report import Claim, Column, Match, Plan

_KINDS = ("renorm-loss", "renorm-bias", "raw-loss", "raw-bias")

PLAN = Plan(
  columns=(
    columns.BITS_PER_BYTE,
    columns.MAX_VIO_GLOBAL,
    columns.MAX_VIO,
    columns.MAX_VIO_FLOOR,
    columns.DROPPED,
    Column(
      "router_confidence",
      meaning="summed share of the chosen experts in all scores of a token.",
    ),
    columns.TRAIN_FLOPS,
    columns.TRAIN_SECONDS,
  ),
  claims=(
    *(Claim("bits_per_byte", f"sigmoid-{k}", f"softmax-{k}") for k in _KINDS),
    *(
      Claim("bits_per_byte", f"{gate}-{form}-bias", f"{gate}-{form}-loss")
      for gate in ("softmax", "sigmoid")
      for form in ("renorm", "raw")
    ),
    *(
      Claim("bits_per_byte", f"{gate}-renorm-{b}", f"{gate}-raw-{b}")
      for gate in ("softmax", "sigmoid")
      for b in ("loss", "bias")
    ),
  ),
  matches=tuple(
    Match("max_vio_global", f"sigmoid-{k}", f"softmax-{k}") for k in _KINDS
  ),
  plots=(
    Scatter(
      "max_vio_global",
      "bits_per_byte",
      x_label="MaxVio over all validation windows (bars: 95 % interval)",
      y_label="bits per byte of the validation windows",
      log=True,
    ),
    Curve(
      "max_vio",
      label="MaxVio of a step, mean over layers",
      floor="max_vio_floor",
      floor_label="random router",
      log=True,
    ),
  ),
)
