"""The report of balancers."""

from experiments import columns, figures
from experiments.balancers import sweep
from experiments.report import Claim, Column, Report

_HEADLINE = [
  *((arm, "micro_batch_1e-2") for arm in ("quantile", "sign", "sign_sequence")),
  *((arm, "global_batch_1e-2") for arm in ("quantile", "sign")),
  *(("quantile", "sign"), ("sign_sequence", "sign")),
  ("global_batch_1e-2", "micro_batch_1e-2"),
  *((arm, "none") for arm in sweep.HEADLINE[1:]),
]
# A z-loss beside each of them.
_Z_LOSS = [
  ("z_loss_alone", "none"),
  *(("z_loss", "micro_batch_1e-2"), ("sign_z_loss", "sign")),
  *(("quantile_z_loss", "quantile"), ("quantile_z_loss", "sign_z_loss")),
  *((arm, "z_loss") for arm in ("sign", "quantile")),
  *((arm, "z_loss") for arm in ("sign_z_loss", "quantile_z_loss")),
]
# From the smallest scope to the largest, and one thing beside another.
_OTHERS = [
  *(
    (f"{wide}_{c}", f"{narrow}_{c}")
    for narrow, wide in zip(sweep.SCOPES, sweep.SCOPES[1:])
    for c in ("1e-2", "1e-3")
  ),
  *((arm, "sign") for arm in ("proportional", "multiplicative", "pid")),
  *((arm, "micro_batch_1e-2") for arm in ("importance", "adaptive")),
  *((arm, "micro_batch_1e-3") for arm in ("sign", "quantile")),
  *((arm, "quantile") for arm in ("quantile_ema", "bip")),
  *((f"simbal_{c}", "none") for c in ("1e-1", "1e-2")),
]


def _arms(*names):
  """rows -> the arms of these names, in every layout and size."""

  def shown(rows):
    arms = dict.fromkeys(r["arm"] for r in rows)
    return [arm for arm in arms if {arm, arm.split("-", 1)[-1]} & {*names}]

  return shown


# More arms than these cannot be told apart. The curves of the headline's other arms
# lie on those of `micro_batch_1e-2` and of `sign`.
_CURVES = _arms(
  *("none", "micro_batch_1e-2", "z_loss"), *("sign", "sign_z_loss", "quantile")
)
_ENDS = _arms(*sweep.HEADLINE, *sweep.Z_LOSS)

REPORT = Report(
  columns=(
    columns.BITS_PER_BYTE,
    columns.MAX_VIO_GLOBAL,
    Column(
      "max_vio_domains",
      "domain MaxVio",
      digits=2,
      meaning="MaxVio of the loads on one domain of the validation windows, mean"
      " over domains: high where experts specialise.",
    ),
    Column(
      "train/max_vio",
      "step MaxVio / floor",
      digits=2,
      over="train/max_vio_floor",
      meaning="MaxVio of a training step over that of a uniform random router, mean"
      " over the last quarter of the steps.",
      best=min,
    ),
    Column(
      "whole/max_vio",
      "from the first step",
      digits=2,
      over="train/max_vio_floor",
      meaning="the same, mean over all steps.",
      best=min,
    ),
    Column(
      "beyond_capacity/1.0",
      "beyond 1.0",
      meaning="share of the validation assignments that a capacity of the mean load"
      " would drop, by groups.",
    ),
    Column(
      "beyond_capacity/1.25",
      "beyond 1.25",
      meaning="the same at 1.25 times the mean load.",
    ),
    Column(
      "dead_experts",
      "dead experts",
      digits=2,
      meaning="experts of a layer without a token on the validation windows.",
    ),
    columns.TRAIN_FLOPS,
    columns.TRAIN_SECONDS,
  ),
  claims=tuple(
    Claim(metric, *pair)
    for metric in ("bits_per_byte", "whole/max_vio")
    for pair in (*_HEADLINE, *_Z_LOSS, *_OTHERS)
  ),
  plots=(
    figures.MAX_VIO._replace(arms=_CURVES),
    figures.BITS_OVER_MAX_VIO._replace(arms=_ENDS),
  ),
)
