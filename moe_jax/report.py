"""Tables, JSON and figures of the specialisation of experts, from router traces.

python -m moe_jax.report TRACE --out=DIR
python -m moe_jax.report EARLY TRACE --out=DIR

A trace is a file of `python -m moe_jax.evaluate --trace=FILE` or of the hook trace.
With an earlier one of the same text, saturation says how many of a token's experts
were the same then. Definitions are those of OLMoE (2409.02060, 5), see `traces`.
"""

import argparse
import pathlib

import numpy as np

from moe_jax.core.errors import ConfigError
from moe_jax.run import command


def main(argv=None) -> int:
  """The command."""
  parser = argparse.ArgumentParser(
    description=__doc__,
    prog="python -m moe_jax.report",
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add(
    "traces",
    nargs="+",
    metavar="TRACE",
    help="one, or an earlier one before it",
  )
  add("--out", default="report", metavar="DIR", help="folder to write into")
  args = parser.parse_args(argv)

  from moe_jax.training import traces

  if len(args.traces) > 2:
    raise ConfigError(f"give one trace or two, not {len(args.traces)}")
  *early, late = map(traces.load, args.traces)
  out = pathlib.Path(args.out)
  out.mkdir(parents=True, exist_ok=True)
  facts = traces.analysis(late, *early)
  command.write_json(out / "traces.json", facts)
  print(table(facts))
  draw(facts, out)
  print(f"\nData and figures: {out}")
  return 0


def table(facts: dict) -> str:
  """One line a layer: the numbers that a reader looks at first."""
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
  """Writes coactivation.png and domains.png, a panel for each layer."""
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
