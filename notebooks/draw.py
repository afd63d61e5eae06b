"""The pictures that several notebooks draw: matrices, loads, texts with experts."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import pyplot as plt

_ROOM = 1.6  # Keeps colours so light that black numbers can be read on them.


def matrix(
  value, rows, columns, title, *, digits=2, white=0.0, y="", x="", axes=None
):
  """Shows a matrix with its numbers: red above a number, blue below it.

  Args:
    value: [len(rows), len(columns)]; NaN stays empty.
    rows, columns: names.
    title: of the picture.
    digits: of the numbers after the point.
    white: the number that is white.
    y, x: what rows and columns are.
    axes: to draw on; None: a figure of its own, which is shown.
  """
  value, own = np.asarray(value, float), axes is None
  if own:
    size = 1.6 + 0.55 * len(columns), 1.0 + 0.27 * len(rows)
    _, axes = plt.subplots(figsize=size, layout="constrained")
  most = _ROOM * max(np.nanmax(np.abs(value - white)), 1e-9)
  limits = {"vmin": white - most, "vmax": white + most}
  axes.imshow(value, cmap="RdBu_r", aspect="auto", **limits)
  place = {"ha": "center", "va": "center", "fontsize": 8}
  for (row, column), number in np.ndenumerate(value):
    if np.isfinite(number):
      shown = round(float(number), digits) + 0.0  # No -0.
      axes.text(column, row, f"{shown:.{digits}f}", **place)
  axes.set_xticks(range(len(columns)), columns)
  axes.set_yticks(range(len(rows)), rows)
  axes.set(title=title, xlabel=x, ylabel=y)
  if own:
    plt.show()


def loads(steps: Sequence[int], panels: Mapping[str, Sequence]) -> None:
  """Shows how the loads of experts move: white is the mean load of a layer.

  Args:
    steps: of the loads, at equal distances.
    panels: {title: loads [steps, E]}.
  """
  figure, all_axes = plt.subplots(
    len(panels),
    figsize=(8, 0.8 + 1.8 * len(panels)),
    layout="constrained",
    sharex=True,
    squeeze=False,
  )
  for axes, (title, load_SE) in zip(all_axes[:, 0], panels.items()):
    share_SE = np.array(load_SE) / np.mean(load_SE, axis=1, keepdims=True)
    half = steps[0] / 2
    image = axes.imshow(
      share_SE.T,
      cmap="RdBu_r",
      vmin=0,
      vmax=2,
      aspect="auto",
      origin="lower",
      interpolation="nearest",
      extent=(half, steps[-1] + half, -0.5, share_SE.shape[1] - 0.5),
    )
    axes.set(title=title, ylabel="expert")
  axes.set_xlabel("training step")
  label = "load ÷ mean load of the layer"
  figure.colorbar(image, ax=all_axes, label=label, extend="max")
  plt.show()


def text(pieces: Sequence[str], expert, num_experts: int, title: str, width=66):
  """Shows a text, each of its pieces on the colour of an expert.

  Args:
    pieces: of the text, a letter each.
    expert: [len(pieces)], the expert of each piece.
    num_experts: at most 12.
    title: of the picture.
    width: pieces in a line.
  """
  rows = -(-len(pieces) // width)
  page = np.full(rows * width, np.nan)
  page[: len(pieces)] = expert
  figure, axes = plt.subplots(
    figsize=(0.135 * width + 0.6, 0.24 * rows + 0.6), layout="constrained"
  )
  # A palette of twelve colours: expert e has the colour number e.
  colours = {"cmap": "Set3", "vmin": -0.5, "vmax": 11.5}
  image = axes.imshow(page.reshape(rows, width), aspect="auto", **colours)
  place = {"ha": "center", "va": "center", "family": "monospace", "fontsize": 8}
  for number, piece in enumerate(pieces):
    shown = "↵" if piece == "\n" else piece if piece.isprintable() else "·"
    x, y = number % width, number // width
    axes.text(x, y, shown, parse_math=False, **place)
  axes.set_axis_off()
  axes.set_title(title, fontsize=10)
  edges, ticks = np.arange(num_experts + 1) - 0.5, range(num_experts)
  figure.colorbar(image, boundaries=edges, ticks=ticks, label="expert")
  plt.show()
