"""What the report of load balancing shows."""

from experiments.figures import Curve
from experiments.report import Claim, Column, Plan

PLAN = Plan(
  columns=(
    Column("bits_per_byte", meaning="of the validation windows that are read."),
    Column(
      "max_vio_global",
      meaning="MaxVio of the loads on all validation windows that are read, mean"
      " over layers.",
    ),
    Column(
      "max_vio_floor",
      "its floor",
      meaning="MaxVio of a random router on as many tokens.",
    ),
    Column(
      "train/max_vio",
      "max_vio",
      meaning="MaxVio of a training step, mean over layers and the last quarter"
      " of the steps.",
    ),
    Column(
      "train/max_vio_floor",
      "floor of a step",
      meaning="MaxVio of a random router on as many tokens.",
    ),
    Column(
      "train/max_vio",
      "max_vio / floor",
      digits=2,
      over="train/max_vio_floor",
    ),
    Column(
      "dropped",
      meaning="share of the validation windows' assignments without a slot.",
    ),
    Column(
      "dead_experts",
      digits=2,
      meaning="experts of a layer without a token on the validation windows.",
    ),
  ),
  claims=(
    Claim("train/max_vio", "bias", "none"),
    Claim("train/max_vio", "bias", "loss_1e-2"),
    Claim("train/max_vio", "bias", "loss_1e-3"),
    Claim("max_vio_global", "bias", "loss_1e-2"),
    Claim("max_vio_global", "bias", "loss_1e-3"),
    Claim("bits_per_byte", "bias", "none"),
    Claim("bits_per_byte", "bias", "loss_1e-2"),
    Claim("bits_per_byte", "bias", "loss_1e-3"),
  ),
  curves=(
    Curve(
      "max_vio",
      label="MaxVio of a step, mean over layers",
      floor="max_vio_floor",
      floor_label="floor of a random router",
      log=True,
    ),
  ),
)
