"""Shows the loads of a step's MoE layers as a map of layers and experts.

Rows are layers, from the first one on, and columns are experts. White is the
mean load of a layer, blue is a smaller load, and red a larger one, at its
darkest from twice the mean on. Black is where a layer has no expert. The
pictures are WORKDIR/pictures/loads/STEP.png, and TensorBoard and W&B get them
where they are among the writers.
"""

from collections.abc import Sequence

import numpy as np

from moe_jax.training import hooks

_SIDE = 12  # Pixels of an expert.


def build(run: hooks.Run) -> hooks.Hook:
  """Returns a hook that shows the loads; without MoE layers it does nothing."""

  def show(state, step, metrics):
    del state
    if metrics["tokens_per_expert"]:
      loads = [*metrics["tokens_per_expert"].values()]
      run.show(step, "loads", load_map(loads))

  return show


def load_map(loads: Sequence[np.ndarray]) -> np.ndarray:
  """Returns the picture of loads, bytes [height, width, 3].

  Args:
    loads: [E] of each layer.
  """
  import matplotlib

  shares = np.full((len(loads), max(map(len, loads))), np.nan)
  for row, load_E in zip(shares, loads):
    row[: len(load_E)] = load_E / np.maximum(np.mean(load_E), 1e-9)
  colours = matplotlib.colormaps["coolwarm"](shares / 2, bytes=True)[..., :3]
  return colours.repeat(_SIDE, axis=0).repeat(_SIDE, axis=1)
