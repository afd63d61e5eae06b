"""Makes a page of runs, or tables and figures of router traces.

moe-jax report WORKDIR ... [--open] [--follow]
moe-jax report TRACE --out=DIR
moe-jax report EARLY TRACE --out=DIR

A folder is the work directory of a run. Its files become one HTML page that loads
nothing else: a description of the run, its curves, the loads of its experts,
its pictures and its config. Several runs are laid over each other.

A file is a trace of `moe-jax evaluate --trace=FILE` or of the hook trace.
With an earlier trace of the same text, saturation tells how many of a token's
experts were the same then. Definitions are those of OLMoE (2409.02060, 5), see
`traces`.
"""

import pathlib
import sys
import time

import numpy as np

from moe_jax.core import files
from moe_jax.core.errors import ConfigError
from moe_jax.run import command
from moe_jax.run import config as config_lib

_SECONDS = 10  # Time between two drawings of a page.


def main(argv=None) -> int:
  """Runs the command; raises ConfigError for paths that do not fit."""
  args = _parser().parse_args(argv)
  paths = [pathlib.Path(path) for path in args.paths]
  for path in paths:
    if not path.exists() and args.follow is None:
      raise ConfigError(f"{path} is not there; give a run's folder, or a trace")
  # A run that --follow names may begin later.
  folders = [path.is_dir() or not path.exists() for path in paths]
  if all(folders):
    return _page(args, paths)
  if any(folders) or args.follow is not None or args.open:
    raise ConfigError(
      f"{paths[folders.index(False)]} is no folder; give work directories of runs,"
      " or traces alone without --open and --follow"
    )
  return _traces(args, paths)


def _parser():
  parser = config_lib.Parser(__doc__)
  add = parser.add_argument
  words = "work directories of runs; or a trace, or an earlier one before it"
  add("paths", nargs="+", metavar="PATH", help=words)
  words = (
    "page to write (default: report.html in the work directory, or here for"
  )
  words += " several); or folder of what is made of traces (default: report)"
  add("--out", metavar="PATH", help=words)
  add("--open", action="store_true", help="show the page in the browser")
  add(
    "--follow",
    nargs="?",
    type=int,
    const=_SECONDS,
    metavar="SECONDS",
    help="wait for runs to begin, and draw the page again while they go on; a"
    " browser that shows it loads it again (default: every %(const)s seconds)",
  )
  return parser


def _page(args, paths):
  """Writes the page of runs, until all of them are finished with --follow."""
  from moe_jax.run.pages import page, read

  if args.follow is not None and args.follow < 1:
    raise ConfigError(f"--follow={args.follow} is no time; give 1 or more")
  paths = paths if args.follow else _without_refused(paths)
  out = paths[0] if len(paths) == 1 else pathlib.Path()
  out = pathlib.Path(args.out or out / "report.html")
  if out.is_dir():
    raise ConfigError(
      f"--out={out} is a folder; give a file, {out}/report.html"
    )
  if out.suffix.lower() not in (".html", ".htm"):
    raise ConfigError(
      f"--out={out} would be a page in HTML; give a name that ends in .html"
    )
  if args.follow is not None:
    _wait(paths, args.follow)
  named, drawn = list(zip(paths, read.labels(paths))), None
  while True:
    began = time.monotonic()
    runs = [read.run(*each) for each in named]
    going_on = any(run.state in ("running", "not begun") for run in runs)
    refresh = args.follow if going_on else None
    if runs != drawn:
      files.write_text(out, page.make(runs, refresh))
    if drawn is None:
      _tell(out, runs, args.open)
    else:
      _tell_changes(out, drawn, runs)
    drawn = runs
    if not refresh:
      return 0
    # The run itself needs the processor more.
    time.sleep(max(refresh, 4 * (time.monotonic() - began)))


def _without_refused(paths):
  """Several folders without those of runs that were refused before they began."""
  refused = [p for p in paths if {f.name for f in p.iterdir()} == {".lock"}]
  if len(refused) == len(paths):
    return paths
  for path in refused:
    print(f"{path} is left out: it holds only .lock", file=sys.stderr)
  return [path for path in paths if path not in refused]


def _wait(paths, seconds):
  """Waits until a run has begun in each folder, and says so once."""
  from moe_jax.run.pages import read

  told = False
  while missing := [str(path) for path in paths if not read.has_begun(path)]:
    if not told:
      print(f"waiting for a run to begin in {', '.join(missing)}", flush=True)
    told = True
    time.sleep(seconds)


def _tell_changes(out, before, runs):
  """Says which runs are finished, or have stopped, since the last drawing."""
  for old, new in zip(before, runs):
    if new.state != old.state:
      name = f"{new.path}: " * (len(runs) > 1)
      of = f" of {new.num_steps}" if new.num_steps else ""
      print(f"{name}{new.state}, step {new.step}{of}: {out}", flush=True)


def _tell(out, runs, shown):
  """Says what was drawn, and opens it with --open."""
  import webbrowser

  from moe_jax.run.pages import curves

  for run in runs:
    print(f"{run.path}: {run.state}, step {run.step}")
    for problem in run.problems:
      print(curves.plain(problem, 1000))
  print(f"Page: {out}", flush=True)
  if shown and not webbrowser.open(out.absolute().as_uri()):
    print("no browser could be opened")


def _traces(args, paths):
  from moe_jax.training import traces

  if len(paths) > 2:
    raise ConfigError(f"give one trace or two, not {len(paths)}")
  *early, late = map(traces.load, paths)
  out = pathlib.Path(args.out or "report")
  out.mkdir(parents=True, exist_ok=True)
  facts = traces.analysis(late, *early)
  command.write_json(out / "traces.json", facts)
  print(table(facts))
  draw(facts, out)
  print(f"\nData and figures: {out}")
  return 0


def table(facts: dict) -> str:
  """Returns a line for each layer, with the numbers to look at first."""
  head = [
    "layer",
    "largest co-activation",
    "vocabulary",
    "mean share of an expert",
  ]
  head += ["most of a domain"] + ["saturation"] * ("saturation" in facts)
  rows = [head, ["---"] * len(head)]
  for layer, sizes in facts["layers"].items():
    share = np.array(facts["by_domain"][layer])
    row = [
      layer,
      f"{np.max(facts['coactivation'][layer]):.3f}",
      f"{facts['vocabulary'][layer]:.3f}",
      f"{facts['experts_per_token'][layer] / sizes['num_experts']:.3f}",
      f"{share.max():.3f}",
    ]
    if "saturation" in facts:
      row.append(f"{facts['saturation'][layer]:.3f}")
    rows.append(row)
  return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(facts: dict, out: pathlib.Path) -> None:
  """Writes coactivation.png and domains.png, a panel for each layer.

  Args:
    facts: from `traces.analysis`.
    out: a folder.
  """
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  shares = {
    "coactivation": (facts["coactivation"], "its other experts", "expert"),
    "domains": (facts["by_domain"], "expert", "domain"),
  }
  for name, (by_layer, across, down) in shares.items():
    figure, panels = pyplot.subplots(
      len(by_layer),
      squeeze=False,
      figsize=(7, 2.6 * len(by_layer)),
      layout="tight",
    )
    for (layer, share), axes in zip(by_layer.items(), panels[:, 0]):
      image = axes.imshow(share, cmap="viridis", vmin=0, aspect="auto")
      figure.colorbar(image, ax=axes)
      axes.set(title=f"layer {layer}", xlabel=across, ylabel=down)
      if name == "domains" and facts["domains"]:
        axes.set_yticks(range(len(facts["domains"])), facts["domains"])
    figure.savefig(out / f"{name}.png", dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
  command.run(main)
