"""Writes the loads of all experts: the assignments that each of them got."""

import json

from moe_jax.core import files
from moe_jax.run import processes
from moe_jax.training import hooks


def build(run: hooks.Run) -> hooks.Hook:
  """Writes WORKDIR/loads/STEP.json, {layer: tokens_per_expert} of a step."""

  def write(state, step, metrics):
    del state
    if processes.is_first():
      loads = {k: x.tolist() for k, x in metrics["tokens_per_expert"].items()}
      path = run.folder / "loads" / f"{step:08d}.json"
      path.parent.mkdir(exist_ok=True)
      files.write_text(path, json.dumps(loads) + "\n")

  return write
