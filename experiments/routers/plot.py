"""The report of routers."""

from experiments import columns, figures
from experiments.report import Claim, Column, Report
from experiments.routers import sweep

_PAIRS = [
  *((arm, "dense") for arm in sweep.HEADLINE[1:]),
  ("switch", "hash"),
  ("gshard", "switch"),
  *(("segmented", "gshard"), ("deepseek", "segmented")),
  *(("deepseek", "gshard"), ("fine", "segmented")),
  *(("switch_scaled", "switch"), ("hash", "switch_scaled")),
  ("fine_scaled", "switch_scaled"),
  *(
    (arm, "fine")
    for arm in (
      "fine_scaled",
      *("fine_bias", "expert_choice", "relu", "top_p", "expert_threshold"),
      *("latent", "copies", "random"),
    )
  ),
]


def _shown(rows):
  """More curves than these cannot be told apart; `segmented` lies on `gshard`."""
  shown = {*sweep.HEADLINE, "relu"} - {"segmented"}
  return [arm for arm in dict.fromkeys(r["arm"] for r in rows) if arm in shown]


REPORT = Report(
  columns=(
    columns.BITS_PER_BYTE,
    columns.MAX_VIO_GLOBAL,
    Column(
      "experts_per_token",
      "experts",
      digits=2,
      meaning="experts of a token on the validation windows, mean over layers.",
    ),
    columns.TOTAL_PARAMETERS,
    Column(
      "active_parameters",
      "M active",
      digits=2,
      factor=1e-6,
      meaning="10^6 parameters that a token passes.",
    ),
    columns.TRAIN_FLOPS,
    columns.TRAIN_SECONDS,
  ),
  claims=tuple(Claim("bits_per_byte", *pair) for pair in _PAIRS),
  plots=(figures.MAX_VIO._replace(arms=_shown), figures.BITS_OVER_MAX_VIO),
)
