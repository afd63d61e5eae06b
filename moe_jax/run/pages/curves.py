"""Figures as SVG to be put into a page, whose style gives them their colours.

Text stays text and is drawn in the page's own font. Colours are names of the style,
so that a figure can be read on a light and on a dark page. Equal figures are equal
texts.
"""

import contextlib
import io
import re
import warnings
from collections.abc import Sequence

import numpy as np

from moe_jax.run.pages.plots import COLORS, LINES, Plot

_SIZE = 4.4, 2.6  # Inches.
_SHORT = 3  # Names of at most this many letters are not turned.
_NUMBER = re.compile(r"(\d\.\d\d)\d+")
_FEW = 2  # Points that no line connects.
MOST = 400  # Points of a line; if it has more, neighbours are averaged.
# Colours of the drawing, which become names of the page's style.
_NAMED = {f"c{i}": f"#0a00{i:02x}" for i in range(COLORS)}
_NAMED |= {"neutral": "#0b0001", "grid": "#0b0002", "text": "#0b0003"}
_DASHES = {"dashes": (0, (5, 2)), "points": (0, (1.5, 1.5)), "mixed": "-."}
_DASHES |= {"floor": (0, (4, 3))}


def svg(plot: Plot) -> str:
  """Returns a figure of lines as SVG."""
  room = max(map(len, plot.names), default=0) > _SHORT
  with figure(plot.title, (4.4, 3.6) if room else _SIZE) as (made, axes):
    for trace in plot.traces:
      color = _NAMED.get(trace.color, trace.color)
      x, y, low, high = _thin(trace.x, trace.y)
      few = len(x) <= _FEW and (len(x) == 1 or trace.style != "floor")
      if len(plot.traces) <= COLORS:
        axes.fill_between(x, low, high, color=color, alpha=0.25, lw=0)
      axes.plot(
        *(x, y),
        color=color,
        ls="" if few else _DASHES.get(trace.style, "-"),
        lw=1.2 if trace.style == "floor" else trace.width,
        marker="o" if trace.dots or plot.names or few else "",
        ms=2.7 * trace.width,
        zorder=_height(trace.style),
      )
    _scale(axes, plot)
    axes.set_xlabel(plain(plot.x_label))
    scale = " (log)" * (axes.get_yscale() == "log")
    axes.set_ylabel(plain(plot.y_label) + scale)
    return text(made)


@contextlib.contextmanager
def figure(key: str, size: tuple[float, float] = _SIZE):
  """Yields (figure, axes) in the page's style.

  Args:
    key: a word that no other figure of the page has; ids are made of it.
    size: width and height, in inches.
  """
  import matplotlib
  from matplotlib.backends import backend_svg
  from matplotlib.figure import Figure

  color = _NAMED["text"]
  edges = ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
  with matplotlib.rc_context(), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Letters that matplotlib's font lacks.
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(
      {
        **dict.fromkeys(("text.color", *edges), color),
        **{f"axes.spines.{side}": False for side in ("top", "right")},
        "svg.fonttype": "none",
        "svg.hashsalt": key,
        "text.parse_math": False,
        "grid.color": _NAMED["grid"],
        "axes.unicode_minus": True,
        "axes.grid": True,
      }
    )
    made = Figure(size, layout="constrained")
    backend_svg.FigureCanvasSVG(made)
    axes = made.add_subplot()
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    yield made, axes


def text(made) -> str:
  """Returns the SVG element of a figure, without the head of a file."""
  out = io.StringIO()
  made.savefig(
    out, format="svg", transparent=True, dpi=144, metadata={"Date": None}
  )
  element = out.getvalue()
  element = element[element.index("<svg") :]
  for block in ("metadata", "style"):
    element = re.sub(rf"\s*<{block}.*?</{block}>", "", element, flags=re.S)
  # Places to a hundredth of a point, and no numbered names of groups.
  element = re.sub(r"<[^>]+>", lambda tag: _NUMBER.sub(r"\1", tag[0]), element)
  element = re.sub(r' id="[a-zA-Z][\w.]*_\d+"', "", element)
  element = re.sub(r"\n\s*", "\n", element)
  for name, color in _NAMED.items():
    element = element.replace(color, f"var(--{name})")
  return element


def plain(label: str, most: int = 40) -> str:
  """Returns a text of a file as a label: printable, on one line, and short.

  Args:
    label: the text.
    most: letters of the label.
  """
  label = "".join(c if c.isprintable() else "?" for c in str(label))
  return label if len(label) <= most else f"{label[: most - 1]}…"


def ticks(axis, values: Sequence[float]) -> None:
  """Sets few ticks of an axis, with words such as 20k for large numbers.

  Args:
    axis: of matplotlib.
    values: that are drawn along it.
  """
  from matplotlib import ticker

  axis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
  if max(map(abs, values), default=0) >= 10_000:
    axis.set_major_formatter(ticker.EngFormatter(sep=""))


def _scale(axes, plot):
  """Sets the ticks of both axes."""
  from matplotlib import ticker

  x = [x for t in plot.traces for x in t.x]
  y = [y for t in plot.traces for y in t.y if y == y]
  if plot.log and min(y, default=0) > 0 and max(y) > 5 * min(y):
    axes.set_yscale("log")
    subs = (1, 2, 5) if max(y) < 300 * min(y) else (1,)
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
  else:
    ticks(axes.yaxis, y)
  if not plot.names:
    ticks(axes.xaxis, x)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return
  every = -(-len(plot.names) // 12)
  shown = range(0, len(plot.names), every)
  names = [plain(plot.names[i], 18) for i in shown]
  long = max(map(len, names)) > _SHORT
  axes.set_xticks(shown, names, rotation=90 if long else 0)


def _height(style):
  """The zorder of a line: those with gaps are above the others."""
  return 1.5 if style == "floor" else 2 + LINES.index(style) / 10


def _thin(x, y):
  """(x, mean, lowest, highest) of equal parts of a line with many points."""
  x, y = np.array(x, float), np.array(y, float)
  size = -(-len(x) // MOST)
  rest = len(x) % size
  # The first part is the shorter one, so that the last point is not alone.
  parts = np.split(np.arange(len(x)), np.arange(rest or size, len(x), size))
  shown = [
    np.array([f(v[part]) for part in parts])
    for v, f in ((x, np.mean), (y, np.nanmean), (y, np.nanmin), (y, np.nanmax))
  ]
  return shown
