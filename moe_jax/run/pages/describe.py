"""A description of a run in few words, from its config.json and run.json."""

import contextlib
import statistics
from collections.abc import Sequence

from moe_jax.core import options, registry
from moe_jax.core.errors import ConfigError
from moe_jax.run import config as config_lib
from moe_jax.run import wording
from moe_jax.run.pages import curves, html, plots, words
from moe_jax.run.pages.read import Run
from moe_jax.run.wording import at

# Facts of run.json in which two runs of the same config may differ.
_ORIGIN = ("code", "git", "data", "devices", "mesh", "platform", "processes")
_ORIGIN += ("python", "versions", "xla_flags")
# Folders of the parts that sections of a config describe.
_KINDS = ("attention", "balancers", "dispatchers", "optimizers", "routers")
_KINDS += ("tasks",)


def number(value: float) -> str:
  """Returns a number with four digits, or all digits of a whole number."""
  if value != value:
    return "nan"
  if abs(value) >= 10_000 or (isinstance(value, int) and abs(value) < 1e15):
    return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.3e}"
  return f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2e}"


def state(run: Run) -> html.Html:
  """Returns the state of a run, and how many steps it has done."""
  of = f" of {run.num_steps:,}" if run.num_steps else ""
  words = html.tag("span", run.state, kind=f"state {run.state}")
  left = _left(run)
  return html.Html(f"{words}, step {run.step:,}{of}{html.escape(left)}")


def _left(run):
  """The time until a running run ends, by its throughput."""
  speed, tokens = _speed(run), at(run.facts, "tokens_per_step")
  steps = (run.num_steps or 0) - run.step
  tokens_known = wording.count(tokens) not in ("", "0")
  if run.state != "running" or not tokens_known or speed <= 0 or steps <= 0:
    return ""
  minutes = steps * float(tokens) / speed / 60
  words = f"{minutes / 60:,.1f} h" if minutes > 90 else f"{minutes:.0f} min"
  return f", about {words} left"


def _speed(run):
  speeds = plots.points(run.record.train, "tokens_per_second")[1]
  speeds = [x for x in speeds if x == x]
  return statistics.median(speeds) if speeds else 0.0


def facts(run: Run) -> dict[str, str]:
  """Returns {name: words} of the facts that a reader wants to know first."""
  versions = at(run.facts, "versions")
  versions = versions if isinstance(versions, dict) else {}
  shown = [f"{k} {versions[k]}" for k in ("moe_jax", "jax") if k in versions]
  python, speed = at(run.facts, "python"), _speed(run)
  shown += [f"Python {python}"] * (python is not None)
  git = at(run.facts, "git")
  batch = wording.count(at(run.facts, "tokens_per_step"))
  resumed, links = at(run.facts, "continued"), at(run.facts, "links")
  times = len(resumed) if isinstance(resumed, list) else 0
  found = {
    "Task": _task(run.config),
    "Model": _model(run.config),
    "Experts": wording.experts(run.facts),
    "Parameters": wording.parameters(run.facts),
    "Batch": f"{batch} tokens in a step" if batch else "",
    "Devices": wording.devices(run.facts),
    "Speed": f"{speed:,.0f} tokens per second" if speed else "",
    "Versions": ", ".join(shown),
    "Code": f"git {_short(git)}" if isinstance(git, str) and git else "",
    "Started": when(run),
    "Resumed": f"{times} times" if times > 1 else "once" * times,
    "Last line written": run.written,
    "Shown at": ", ".join(map(str, links)) if type(links) is list else "",
  }
  return {k: curves.plain(v, 200) for k, v in found.items()}


def when(run: Run) -> str:
  """Returns the time when the run was started, by its machine's clock."""
  started = at(run.facts, "started")
  return started.replace("T", " ")[:40] if isinstance(started, str) else ""


def latest(run: Run) -> dict[str, html.Html]:
  """Returns {title: number} of the metrics that a reader looks at first.

  Each is of the last evaluation where that has it, else of the last training line.
  """
  splits = {"validation": run.record.validation, "training": run.record.train}
  last = {split: lines[-1] for split, lines in splits.items() if lines}
  found = {}
  for name in (*words.LEARNING.metrics, "max_vio", "dropped"):
    for split, line in last.items():
      if name in line:
        note, floor = split, words.FLOORS.get(name)
        if floor in line:
          note += f", floor {number(line[floor])}"
        shown = number(line[name]), html.tag("small", note)
        found[words.metric(name).title] = html.joined(shown)
        break
  return found


def _task(config):
  name = at(config, "task.name")
  return f"{name} on {wording.data(config)}" if name else ""


def _model(config):
  name, layers = at(config, "model.name"), at(config, "model.num_layers")
  width = at(config, "model.d_model")
  return f"{name}, {layers} layers, width {width}" if name else ""


def changed(config: dict) -> list[tuple[str, str, str]]:
  """Returns (key, value, default) of the values that are no defaults.

  It is [] where the defaults cannot be read.

  Args:
    config: of the run.
  """
  defaults = config_lib.defaults()
  if not defaults or not config:
    return []
  known = dict(config_lib.flat(defaults, whole=config_lib.OPEN))
  lists = config_lib.flat(config, whole=config_lib.OPEN)
  return [
    (key, value(given), value(known[key]) if key in known else "–")
    for key, given in lists
    if key not in known or _plain(given) != _plain(known[key])
  ]


def differing(runs: Sequence[Run]) -> list[list[str]]:
  """Returns rows of a key and its value in each run, for keys that differ."""
  flats = []
  for run in runs:
    config = config_lib.complete(run.config) if run.config else {}
    flats.append({k: v for k, v in config_lib.flat(config) if v != {}})
    origin = (k for k in _ORIGIN if k in run.facts)
    flats[-1] |= {f"run.json: {k}": _short(run.facts[k]) for k in origin}
  keys = {key for flat in flats for key in flat}
  for run, flat in zip(runs, flats):
    flat |= {key: _default(run.config, key) for key in keys - flat.keys()}
  keys = sorted(keys, key=lambda key: (key.startswith("run.json: "), key))
  rows = [[k, *(value(flat[k]) for flat in flats)] for k in keys]
  return [row for row in rows if len({*row[1:]}) > 1]


def _default(config, key):
  """The default of an option of a part; "–" where that is not known."""
  place, _, option = key.rpartition(".")
  names = (k for name in place.split(".") for k in (name, f"{name}s"))
  kinds, known = [name for name in names if name in _KINDS], {}
  # The folder is not trusted, so no plugin that it names is imported.
  if kinds and not at(config, "plugins"):
    with contextlib.suppress(ConfigError):  # There is no such part.
      part = registry.find(kinds[-1], at(config, f"{place}.name"))
      known = options.defaults(part.build)
  return known.get(option, "–")


def value(given) -> str:
  """Returns a value of a config, as a table shows it."""
  return curves.plain(_plain(given), 120)


def _short(given):
  """The first digits of a digest; the "+" of an edited checkout stays."""
  digest = isinstance(given, str) and len(given) >= 40
  return given[:12] + "+" * given.endswith("+") if digest else given


def _plain(given):
  """A text that is the same for a tuple and for a list."""
  if isinstance(given, list | tuple):
    return f"({', '.join(map(_plain, given))})"
  if isinstance(given, dict):
    return f"{{{', '.join(f'{k}: {_plain(v)}' for k, v in given.items())}}}"
  return str(given)
