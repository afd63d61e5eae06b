"""What the report of gating shows."""

from experiments import columns
from experiments.figures import Curve, Scatter
from experiments.report import Claim, Column, Match, Plan

_GATES, _FORMS, _BALANCERS = (
  ("sigmoid", "softmax"),
  ("renorm", "raw"),
  ("bias", "loss"),
)
# Arms that differ in one thing; and of each gate the best.
_PAIRS = (
  *(
    (f"sigmoid-{f}-{b}", f"softmax-{f}-{b}") for f in _FORMS for b in _BALANCERS
  ),
  *((f"{g}-{f}-bias", f"{g}-{f}-loss") for g in _GATES for f in _FORMS),
  *((f"{g}-renorm-{b}", f"{g}-raw-{b}") for g in _GATES for b in _BALANCERS),
  ("sigmoid-raw-bias", "softmax-renorm-loss"),
)

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
  claims=tuple(Claim("bits_per_byte", *pair) for pair in _PAIRS),
  matches=tuple(Match("max_vio_global", *pair) for pair in _PAIRS),
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
