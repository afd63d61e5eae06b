"""A description of a run in few words, from its config.json and run.json."""

import statistics
from collections.abc import Sequence

from moe_jax.run import config as config_lib
from moe_jax.run.pages import curves, html, plots, words
from moe_jax.run.pages.read import Run, at

# Facts of run.json in which two runs of the same config may differ.
_ORIGIN = ("code", "git", "data", "devices", "mesh", "platform", "processes")
_ORIGIN += ("python", "versions", "xla_flags")


def number(value: float) -> str:
  """Returns a number with four digits, or all digits of a whole number."""
  if value != value:
    return "nan"
  if abs(value) >= 10_000 or (isinstance(value, int) and abs(value) < 1e15):
    return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.3e}"
  return f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2e}"


def large(value) -> str:
  """Returns a count such as 477,824 or 12.3 billion; "" for anything else."""
  if type(value) is not int or not 0 <= value < 10**18:
    return ""
  for size, word in (
    (10**12, "trillion"),
    (10**9, "billion"),
    (10**6, "million"),
  ):
    if value >= size:
      return f"{value / size:.4g} {word}"
  return f"{value:,}"


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
  if run.state != "running" or not large(tokens) or speed <= 0 or steps <= 0:
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
  tokens, git = at(run.facts, "tokens_per_step"), at(run.facts, "git")
  resumed = at(run.facts, "continued")
  sparse = at(run.facts, "recipe") != {}
  times = len(resumed) if isinstance(resumed, list) else 0
  found = {
    "Task": _task(run.config),
    "Model": _model(run.config),
    "Experts": _experts(run.config) if sparse else "none",
    "Balancers": _balancers(run.config) if sparse else "",
    "Parameters": parameters(run),
    "Batch": f"{large(tokens)} tokens in a step" if large(tokens) else "",
    "Devices": devices(run),
    "Speed": f"{speed:,.0f} tokens per second" if speed else "",
    "Versions": ", ".join(shown),
    "Code": f"git {_short(git)}" if isinstance(git, str) and git else "",
    "Started": when(run),
    "Resumed": f"{times} times" if times > 1 else "once" * times,
    "Last line written": run.written,
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
  for name in (*words.LEARNING.metrics, "max_vio", "dropped", "grad_norm"):
    for split, line in last.items():
      if name in line:
        note, floor = split, words.FLOORS.get(name)
        if floor in line:
          note += f", floor {number(line[floor])}"
        shown = number(line[name]), html.tag("small", note)
        found[words.metric(name).title] = html.joined(shown)
        break
  return found


def parameters(run: Run) -> str:
  """Returns the parameters of the model, in all and for a token."""
  total, active = (
    large(at(run.facts, f"parameters.{name}")) for name in ("total", "active")
  )
  both = active and active != total
  return f"{total}, of which {active} active" if both else total


def devices(run: Run) -> str:
  """Returns the devices, and the mesh where there are several."""
  found, mesh = at(run.facts, "devices"), at(run.facts, "mesh")
  if not isinstance(found, list):
    return ""
  kinds = dict.fromkeys(map(str, found))
  words = ", ".join(f"{list(map(str, found)).count(k)} × {k}" for k in kinds)
  axes = mesh.items() if isinstance(mesh, dict) else ()
  split = ", ".join(f"{axis} {size}" for axis, size in axes if size != 1)
  return f"{words}; mesh {split}" if split else words


def _task(config):
  name, mixture = at(config, "task.name"), at(config, "data.mixture")
  data = mixture if isinstance(mixture, dict) and mixture else None
  data = ", ".join(map(str, data)) if data else at(config, "data.name")
  where = at(config, "data.dir")
  data = data if where is None else where
  return f"{name} on {data}" if name else ""


def _model(config):
  name, layers = at(config, "model.name"), at(config, "model.num_layers")
  width = at(config, "model.d_model")
  return f"{name}, {layers} layers, width {width}" if name else ""


def _experts(config):
  moe = at(config, "model.moe")
  if at(moe, "num_experts") is None:
    return ""
  words = f"{moe['num_experts']}, router {at(moe, 'router.name')}"
  words += f", K = {at(moe, 'top_k')}" if at(moe, "top_k") else ""
  if slots := at(moe, "capacity"):
    return f"{words}, {slots} slots in an expert"
  factor = at(moe, "capacity_factor")
  bound = (
    "no token is dropped" if factor is None else f"capacity factor {factor}"
  )
  return f"{words}, {bound}"


def _balancers(config):
  balancers = at(config, "model.moe.balancers")
  if not isinstance(balancers, dict):
    return ""
  names = (f"{at(v, 'name')}" for v in balancers.values())
  return ", ".join(names) or "none"


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
  keys = sorted(keys, key=lambda key: (key.startswith("run.json: "), key))
  rows = [[k, *(value(f[k]) if k in f else "–" for f in flats)] for k in keys]
  return [row for row in rows if len({*row[1:]}) > 1]


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
