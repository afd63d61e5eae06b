"""What the report of load balancing shows."""

from experiments import columns
from experiments.figures import Curve, Scatter
from experiments.report import Claim, Column, Plan

PLAN = Plan(
  columns=(
    columns.BITS_PER_BYTE,
    columns.MAX_VIO_GLOBAL,
    Column(
      "max_vio_floor",
      "its floor",
      meaning="MaxVio of a random router on as many tokens.",
    ),
    columns.MAX_VIO,
    columns.MAX_VIO_FLOOR,
    Column(
      "train/max_vio",
      "max_vio / floor",
      digits=2,
      over="train/max_vio_floor",
    ),
    columns.DROPPED,
    Column(
      "dead_experts",
      digits=2,
      meaning="experts of a layer without a token on the validation windows.",
    ),
    columns.TRAIN_FLOPS,
    columns.TRAIN_SECONDS,
  ),
  claims=(
    Claim("train/max_vio", "bias", "none"),
    Claim("train/max_vio", "bias", "loss_1e-2"),
    Claim("train/max_vio", "bias", "loss_1e-3"),
    Claim("train/max_vio", "bias_1e-3", "loss_1e-3"),
    Claim("max_vio_global", "bias", "none"),
    Claim("max_vio_global", "bias", "loss_1e-2"),
    Claim("max_vio_global", "bias", "loss_1e-3"),
    Claim("max_vio_global", "bias_1e-3", "loss_1e-3"),
    Claim("max_vio_global", "bias", "bias_1e-3"),
    Claim("max_vio_global", "loss_1e-2", "none"),
    Claim("max_vio_global", "loss_1e-3", "none"),
    Claim("bits_per_byte", "bias", "none"),
    Claim("bits_per_byte", "bias", "loss_1e-2"),
    Claim("bits_per_byte", "bias", "loss_1e-3"),
    Claim("bits_per_byte", "bias_1e-3", "loss_1e-3"),
    Claim("bits_per_byte", "bias", "bias_1e-3"),
    Claim("bits_per_byte", "loss_1e-2", "none"),
    Claim("bits_per_byte", "loss_1e-3", "none"),
    Claim("bits_per_byte", "bias", "dense"),
    Claim("bits_per_byte", "loss_1e-2", "dense"),
    Claim("bits_per_byte", "loss_1e-3", "dense"),
    Claim("bits_per_byte", "bias_1e-3", "dense"),
    Claim("bits_per_byte", "bias", "dense_longer"),
    Claim("bits_per_byte", "none", "dense"),
    *(
      Claim(metric, f"{size}-bias", f"{size}-{than}")
      for size in ("1b", "3b")
      for metric in ("max_vio_global", "bits_per_byte")
      for than in ("loss_1e-3", "none")
    ),
    Claim("bits_per_byte", "1b-bias", "1b-dense"),
    Claim("bits_per_byte", "3b-bias", "3b-dense"),
  ),
  plots=(
    Curve(
      "max_vio",
      label="MaxVio of a step, mean over layers",
      floor="max_vio_floor",
      floor_label="random router",
      log=True,
    ),
    Scatter(
      "max_vio_global",
      "bits_per_byte",
      x_label="MaxVio over all validation windows (bars: 95 % interval)",
      y_label="bits per byte of the validation windows",
      log=True,
    ),
  ),
)
