"""What the report of gating shows."""

from experiments.figures import Curve, Scatter
from experiments.report import Claim, Column, Match, Plan

_KINDS = ("renorm-loss", "renorm-bias", "raw-loss", "raw-bias")

PLAN = Plan(
  columns=(
    Column("bits_per_byte", meaning="of the validation windows that are read."),
    Column(
      "max_vio_global",
      meaning="MaxVio of the loads on all validation windows that are read, mean"
      " over layers.",
    ),
    Column(
      "train/max_vio",
      "max_vio",
      meaning="MaxVio of a training step, mean over layers and the last quarter"
      " of the steps.",
    ),
    Column(
      "train/max_vio_floor",
      "its floor",
      meaning="MaxVio of a random router on as many tokens.",
    ),
    Column(
      "dropped",
      meaning="share of the validation windows' assignments without a slot.",
    ),
    Column(
      "router_confidence",
      meaning="summed share of the chosen experts in all scores of a token.",
    ),
    Column(
      "train_flops",
      "TFLOP",
      digits=1,
      factor=1e-12,
      meaning="1e12 operations of training that the active parameters ask for.",
    ),
    Column(
      "train_seconds",
      "seconds",
      digits=0,
      meaning="of training: steps times what one takes (times.csv).",
    ),
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
