"""The report of gating."""

from experiments import columns, figures
from experiments.report import Claim, Column, Report

_GATES, _FORMS = ("sigmoid", "softmax"), ("renorm", "raw")
_BALANCERS = ("bias", "loss")
# Arms that differ in one thing; and of each gate the best.
_PAIRS = (
  *(
    (f"sigmoid-{f}-{b}", f"softmax-{f}-{b}") for f in _FORMS for b in _BALANCERS
  ),
  *((f"{g}-{f}-bias", f"{g}-{f}-loss") for g in _GATES for f in _FORMS),
  *((f"{g}-renorm-{b}", f"{g}-raw-{b}") for g in _GATES for b in _BALANCERS),
  ("sigmoid-raw-bias", "softmax-renorm-loss"),
)


def _max_vio(balancer):
  """MaxVio of the arms with this balancer."""
  arms = [f"{gate}-{form}-{balancer}" for gate in _GATES for form in _FORMS]
  return figures.MAX_VIO._replace(
    arms=lambda _: arms, name=f"max_vio_{balancer}"
  )


REPORT = Report(
  columns=(
    columns.BITS_PER_BYTE,
    columns.MAX_VIO_GLOBAL,
    columns.MAX_VIO,
    columns.MAX_VIO_FLOOR,
    columns.DROPPED,
    Column(
      "router_confidence",
      "router confidence",
      meaning="the chosen experts' share of a token's scores.",
    ),
    columns.TRAIN_FLOPS,
    columns.TRAIN_SECONDS,
  ),
  claims=tuple(
    Claim("bits_per_byte", *pair, alike="max_vio_global") for pair in _PAIRS
  ),
  plots=(*map(_max_vio, _BALANCERS), figures.BITS_OVER_MAX_VIO),
)
