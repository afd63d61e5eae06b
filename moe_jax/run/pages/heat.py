"""Maps of the load of every expert over the steps of a run."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.run.pages import curves

_MOST_LAYERS = 12
_MOST_CELLS = 200_000  # Limit on the cells of all maps of a page.
_MOST_STEPS = 160  # Columns of a map.
_SHADES = 32  # Few shades make small files.


class Map(NamedTuple):
  """A map of a layer.

  layer: its name.
  steps: the steps of the columns.
  load_ES: loads relative to their mean, experts x steps.
  """

  layer: str
  steps: np.ndarray
  load_ES: np.ndarray


def maps(loads: dict, share: float = 1.0) -> list[Map]:
  """Returns maps of at most `_MOST_LAYERS` layers of a run, first to last.

  Args:
    loads: {layer: (steps, a list of loads for each step)}.
    share: the share of a page's cells that this run may have.
  """
  layers = sorted(loads)
  if len(layers) > _MOST_LAYERS:
    places = np.linspace(0, len(layers) - 1, _MOST_LAYERS).round().astype(int)
    layers = [layers[i] for i in places]
  made = []
  for layer in layers:
    steps, load_SE = loads[layer][0], np.array(loads[layer][1], float)
    cells = share * _MOST_CELLS / len(layers)
    most = int(np.clip(cells / load_SE.shape[1], 20, _MOST_STEPS))
    kept = np.linspace(0, len(steps) - 1, min(most, len(steps)))
    kept = kept.round().astype(int)
    load_SE = load_SE[kept]
    mean = load_SE.mean(1, keepdims=True)
    relative = np.divide(
      load_SE, mean, out=np.full_like(load_SE, np.nan), where=mean > 0
    )
    made.append(Map(layer, np.array(steps)[kept], relative.T))
  return made


def largest(some: Sequence[Map]) -> float:
  """Returns the end of the colour scale: 2 to 4, above nearly all loads."""
  loads = np.concatenate([m.load_ES.ravel() for m in some] or [[1.0]])
  loads = loads[np.isfinite(loads)]
  high = np.quantile(loads, 0.99) if loads.size else 2
  return float(np.clip(np.ceil(high), 2, 4))


def svg(shown: Map, end: float, key: str) -> str:
  """Draws a map: steps across, experts down, bright where the load is high.

  Args:
    shown: the map.
    end: of the colour scale.
    key: see `curves.figure`.
  """
  from matplotlib import ticker

  experts = shown.load_ES.shape[0]
  height = 2.1 + min(experts, 64) / 64
  with curves.figure(key, (4.4, height)) as (made, axes):
    axes.grid(False)
    image = axes.pcolormesh(
      _edges(shown.steps),
      np.arange(experts + 1) - 0.5,
      shown.load_ES,
      vmin=0,
      vmax=end,
      cmap=_colors(),
      rasterized=True,
    )
    axes.invert_yaxis()
    axes.set(xlabel="step", ylabel="expert")
    curves.ticks(axes.xaxis, shown.steps)
    for axis in (axes.xaxis, axes.yaxis):
      axis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    above = np.nanmax(shown.load_ES, initial=0) > end
    bar = made.colorbar(
      image, ax=axes, extend="max" if above else "neither", aspect=14
    )
    bar.set_label("load / mean load")
    bar.set_ticks(np.arange(end + 1))
    bar.solids.set_rasterized(True)  # Without seams between its shades.
    bar.outline.set_visible(False)
    return curves.text(made)


def _colors():
  import matplotlib

  return matplotlib.colormaps["viridis"].resampled(_SHADES)


def _edges(steps):
  """The borders between steps, which need not be evenly spaced."""
  if len(steps) == 1:
    return np.array([steps[0] - 0.5, steps[0] + 0.5])
  middle = (steps[1:] + steps[:-1]) / 2
  first, last = 2 * steps[0] - middle[0], 2 * steps[-1] - middle[-1]
  return np.concatenate([[first], middle, [last]])
