"""Counts the devices that a token is sent to, with routing by trained models.

  python -m benchmarks.traffic --workdir=runs/free --workdir=runs/limited

Every run's newest checkpoint routes its validation split; the experts that it
chooses are laid over so many devices, as the mesh axis expert would. With
device-limited routing (2405.04434, 2.2.2; options num_expert_groups and
top_expert_groups of the router top_k), a token's experts lie on few of them.
Rows sent count what leaves a device, where tokens are spread evenly: one a
choice, as this layer sends them, or one a device, which a network may share
among the experts of that device.
"""

import pathlib
import sys

import numpy as np

from benchmarks import timing
from moe_jax.core.errors import ConfigError
from moe_jax.run import command
from moe_jax.run import config as config_lib


def main(argv=None) -> int:
  """The command."""
  args = _arguments(argv)
  from moe_jax.run import run_directory

  rows = []
  for workdir in args.workdir:
    found = summarize(
      workdir.name, *trace(workdir, args.trust_plugins), args.devices
    )
    lines = run_directory.read_metrics(workdir, "validation")
    loss = lines[-1]["loss"] if lines else None
    rows += [{**row, "loss": loss} for row in found]
  print(table(rows))
  if args.json:
    timing.write(args.json, rows)
  return 0


def trace(
  workdir: pathlib.Path, trust_plugins: bool
) -> tuple[dict[str, np.ndarray], dict[str, int], dict]:
  """The choices of a run's routers on the validation split.

  Returns:
    {layer: experts of every unpadded token [N, K]}, {layer: E}, and the options
    of `model.moe.router`.

  Raises:
    ConfigError: there is no run, or none whose tokens choose experts.
  """
  import jax

  from moe_jax import models
  from moe_jax.training import program
  from moe_jax.training.checkpoint import Checkpoints

  config = config_lib.load(
    str(workdir / "config.json"), trust_plugins=trust_plugins
  )
  with config.unlocked():
    # On what is there: choices do not depend on it.
    config.mesh = (len(jax.devices()), 1, 1, 1)
  made = program.Program(config)
  sublayers = models.sublayers(made.model)
  if not sublayers:
    raise ConfigError(f"{workdir} is a run without MoE layers")
  found = Checkpoints(workdir / "checkpoints").restore(made.abstract_state)
  if found is None:
    raise ConfigError(f"{workdir} has no checkpoint yet; let it train first")
  variables = {"params": found.state.params, "balance": found.state.balance}

  @jax.jit
  def choices(variables, inputs, mask):
    _, aux = made.model.apply(variables, inputs, mask, collect="routing")
    by_path = {path: models.at(aux, path) for path in sublayers}
    if not all(hasattr(f["choice"], "expert_TK") for f in by_path.values()):
      raise ConfigError(f"{workdir} has layers whose tokens choose no experts")
    return {path: found["choice"].expert_TK for path, found in by_path.items()}

  chosen = {}
  for _, batch in made.task.validation():
    mask = batch["mask"]
    by_path = jax.device_get(choices(variables, batch["inputs"], mask))
    for path, parts in sublayers.items():
      for number, expert_GTK in zip(parts.numbers, by_path[path]):
        expert_NK = expert_GTK.reshape(-1, expert_GTK.shape[-1])[mask.ravel()]
        chosen.setdefault(f"{number:02d}", []).append(expert_NK)
  chosen = {layer: np.concatenate(chosen[layer]) for layer in sorted(chosen)}
  num_experts = {
    f"{number:02d}": parts.recipe.num_experts
    for parts in sublayers.values()
    for number in parts.numbers
  }
  return chosen, num_experts, dict(config.model.moe.router)


def summarize(
  name: str,
  chosen: dict[str, np.ndarray],
  num_experts: dict[str, int],
  router: dict,
  devices: list[int],
) -> list[dict]:
  """A row for each number of devices that divides E, the mean over layers."""
  rows = []
  for count in devices:
    if any(total % count for total in num_experts.values()):
      continue
    found = [
      spread(expert_NK, num_experts[layer], count)
      for layer, expert_NK in chosen.items()
    ]
    reached, busiest = np.mean(found, axis=0).tolist()
    top_k = np.mean([expert_NK.shape[1] for expert_NK in chosen.values()])
    rows.append(
      {
        "run": name,
        "router": {k: v for k, v in router.items() if "groups" in k},
        "devices": count,
        "devices_per_token": reached,
        "rows_by_choice": float(top_k * (1 - 1 / count)),
        "rows_by_device": reached * (1 - 1 / count),
        "busiest_over_mean": busiest,
      }
    )
  return rows


def spread(
  expert_NK: np.ndarray, num_experts: int, devices: int
) -> tuple[float, float]:
  """(mean number of devices that a token goes to, busiest over mean load).

  Args:
    expert_NK: in [0, E), different ones in a row.
    num_experts: E, equally many on each device, in order.
    devices: how many.
  """
  device_NK = np.sort(expert_NK // (num_experts // devices), axis=1)
  different = 1 + (np.diff(device_NK, axis=1) > 0).sum(1)
  load = np.bincount(device_NK.reshape(-1), minlength=devices)
  return float(different.mean()), float(load.max() / load.mean())


def table(rows: list[dict]) -> str:
  """The results as markdown."""
  lines = [
    "| run | devices | devices a token goes to | rows sent a token, one a choice"
    " | one a device | busiest device ÷ mean | validation loss |",
    "|---|---|---|---|---|---|---|",
  ]
  keys = (
    "devices_per_token",
    "rows_by_choice",
    "rows_by_device",
    "busiest_over_mean",
  )
  for row in rows:
    cells = [row["run"], str(row["devices"])]
    cells += [f"{row[key]:.2f}" for key in keys]
    loss = row.get("loss")
    cells.append("–" if loss is None else f"{loss:.3f}")
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def _arguments(argv):
  parser = timing.parser("traffic", __doc__)
  add = parser.add_argument
  add(
    "--workdir",
    type=pathlib.Path,
    action="append",
    required=True,
    metavar="DIR",
    help="of a run; repeatable",
  )
  add(
    "--devices",
    type=lambda text: [int(x) for x in text.split(",")],
    default=[2, 4, 8, 16],
    help="numbers of them, those that divide the number of experts",
  )
  config_lib.add_trust(parser)
  return parser.parse_args(argv)


if __name__ == "__main__":
  command.run(lambda: main(sys.argv[1:]))
