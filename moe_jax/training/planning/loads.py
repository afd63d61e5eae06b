"""Loads of a real run, laid over the devices of a plan.

The lines "loads" of a run's metrics.jsonl have the assignments that every expert
got, by layer. Devices hold contiguous experts.
"""

import pathlib
from typing import NamedTuple

import numpy as np

from moe_jax.core.errors import ConfigError
from moe_jax.run import run_directory

_REMEDY = "give the metrics.jsonl of a run with train.loads_every above 0"


class Loads(NamedTuple):
  """Loads over devices, of all steps and layers that a run has kept.

  samples: steps times layers.
  slowest: (median, 99th percentile) of the largest load of a device over the
    mean load: a layer waits for this device, and it receives as many times the
    bytes of equal loads.
  nodes: groups of experts, each on one node.
  reached: nodes that a token would be sent to, if its choices were independent
    draws by these loads.
  limited: the most nodes of a token with node-limited routing; None: no limit.
  waits: the parts of a layer whose time grows with the slowest device's load.
  """

  samples: int
  slowest: tuple[float, float]
  nodes: int
  reached: float
  limited: int | None
  waits: tuple[str, ...] = ()


def read(path: str) -> np.ndarray:
  """Returns loads [N, E] of all kept steps and layers of a run.

  Args:
    path: of its metrics.jsonl, or its folder.

  Raises:
    ConfigError: there is no file, or it has no such loads.
  """
  folder = pathlib.Path(path)
  if not path or not folder.exists():
    raise ConfigError(f'--load: there is no file "{path}"; {_REMEDY}')
  folder = folder if folder.is_dir() else folder.parent
  try:
    lines = run_directory.read_metrics(folder, run_directory.LOADS)
  except FileNotFoundError:
    lines = []
  if not lines:
    raise ConfigError(f"--load: {path} has no lines with loads; {_REMEDY}")
  rows = [
    row
    for line in lines
    for name, row in line.items()
    if name not in ("step", "split")
  ]
  try:
    count_NE = np.array(rows, float)
    valid = count_NE.ndim == 2 and np.isfinite(count_NE).all()
    valid = valid and (count_NE >= 0).all() and count_NE.sum(1).all()
  except (ValueError, TypeError):
    valid = False
  if not valid:
    raise ConfigError(
      f"--load: the lines of {folder} do not have as many experts in each layer, and"
      f" at least one assignment; {_REMEDY}"
    )
  return count_NE


def over_devices(
  count_NE: np.ndarray,
  devices: int,
  top_k: int,
  nodes: int,
  limited: int | None,
) -> Loads:
  """Returns the loads of devices, which hold the experts in order.

  Args:
    count_NE: from `read`.
    devices: along the mesh axis expert.
    top_k: K.
    nodes, limited: see `Loads`; of node-limited routing (2412.19437, 2.1.2).

  Raises:
    ConfigError: E does not divide over devices or nodes.
  """
  num_experts = count_NE.shape[1]
  for name, number in (("mesh axis expert", devices), ("nodes", nodes)):
    if num_experts % number:
      raise ConfigError(
        f"--load: the run's {num_experts} experts do not divide over {name} ="
        f" {number}; give a run with the experts of this config"
      )
  share_NE = count_NE / count_NE.sum(1, keepdims=True)

  def parts(number):
    return share_NE.reshape(len(share_NE), number, -1).sum(2)

  slowest_N = parts(devices).max(1) * devices
  half, late = np.percentile(slowest_N, (50, 99)).tolist()
  reached = (1 - (1 - parts(nodes)) ** top_k).sum(1).mean()
  return Loads(len(share_NE), (half, late), nodes, float(reached), limited)


def of_model(count_NE: np.ndarray, model, mesh) -> Loads:
  """Returns the loads of a run on the devices that hold a model.

  Args:
    count_NE: from `read`.
    model: whose MoE layers have as many experts, and one recipe.
    mesh: that it lies on.

  Raises:
    ConfigError: it has other experts, unlike layers, or none.
  """
  recipes = [each.recipe for each in model.sublayers.values()]
  numbers = sorted({recipe.num_experts for recipe in recipes})
  if numbers != [count_NE.shape[1]]:
    has = ", ".join(map(str, numbers)) or "no"
    raise ConfigError(
      f"--load: the layers of the run have {count_NE.shape[1]} experts, and those of"
      f" this config have {has}; give a run of this config"
    )
  if len({_settings(recipe) for recipe in recipes}) > 1:
    raise ConfigError(
      "--load is for models whose MoE layers have one router and one exchange;"
      " leave it out"
    )
  devices = mesh.shape["expert"]
  top_k, groups, limited, waits = _settings(recipes[0])
  nodes = groups if groups > 1 else devices
  found = over_devices(count_NE, devices, top_k, nodes, limited)
  return found._replace(waits=waits)


def _settings(recipe):
  """(K, groups of experts, limit on a token's groups, parts that wait)."""
  options = recipe.router.spec.options
  groups = options.get("num_expert_groups", 1)
  limited = options.get("top_expert_groups") if groups > 1 else None
  waits = ("experts",) if recipe.dispatcher.ragged else ()
  if waits and recipe.exchange == "all_to_all":
    waits += ("exchange",)
  top_k = recipe.router.top_k or recipe.num_experts
  return top_k, groups, limited, waits


def text(loads: Loads) -> str:
  """Returns the loads for people."""
  half, late = loads.slowest
  if loads.waits:
    waits = f"its {' and its '.join(loads.waits)} take as many times longer"
  else:
    waits = "its time is the same, as it computes all slots whatever they hold"
  lines = [
    f"loads of the run, {loads.samples} steps and layers: the slowest device has"
    f" {half:.2f} times the mean load (median), {late:.2f} (99th percentile); {waits}"
  ]
  if loads.nodes > 1:
    lines.append(
      f"a token would be sent to {loads.reached:.2f} of {loads.nodes} nodes, if its"
      " choices were independent"
    )
  if loads.limited and loads.limited < loads.reached:
    saved = 1 - loads.limited / loads.reached
    lines.append(
      f"routing limited to {loads.limited} nodes saves at least {saved:.0%} of"
      " what one copy a node would send"
    )
  return "\n".join(lines)
