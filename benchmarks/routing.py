"""Time of a dropless layer without its experts, stage by stage.

  python -m benchmarks.routing --shapes=S1,S2 --json=routing.json

Seconds of each stage alone, and of all that the output takes besides the
experts, over the forward pass of the dense layer in the same round. The latter
is two programs, up to the rows of the experts and from them on: as one, XLA
would read the tokens straight from where they came, and never make the rows.
Statistics, which training adds, are a stage of their own.
"""

import functools
import json
import statistics
import sys

from benchmarks import shapes, timing
from moe_jax.run import command

ALL = ("before the experts", "after the experts")
WITHOUT_EXPERTS = "all without the experts"


def main(argv=None) -> int:
  """The command."""
  parser = timing.parser("routing", __doc__, rounds=15)
  parser.add_argument(
    "--shapes",
    type=lambda text: text.split(","),
    default=list(shapes.SHAPES),
    help=shapes.describe(),
  )
  args = parser.parse_args(argv)
  shapes.check(args.shapes)
  if args.child:
    print(json.dumps(measure(args.shapes[0], args.rounds)))
    return 0
  rows = []
  for name in args.shapes:
    flags = ["--child", f"--shapes={name}", f"--rounds={args.rounds}"]
    runs = timing.processes("benchmarks.routing", flags, args.processes)
    found = summarize(name, runs)
    print(table(found), flush=True)
    rows += found
    if args.json:
      timing.write(args.json, rows)
  return 0


def measure(shape: str, rounds: int) -> dict[str, list[float]]:
  """{stage: seconds by round}, and of the dense layers."""
  return timing.in_turn(stages(shapes.SHAPES[shape]), rounds)


def stages(shape: shapes.Shape) -> dict:
  """{stage: a function of nothing}, compiled, dense layers first."""
  import jax
  import jax.numpy as jnp

  from benchmarks import layers
  from moe_jax.moe import layer, plans, types

  recipe = layers.recipe(shape)
  params, _, x_TD = layers.inputs(shape)
  side = types.Side(jnp.ones((1, shape.tokens), bool))
  named = layers.implementations(shape)
  ready = {
    name: layers.directions(*named[name])["forward"] for name in shapes.DENSE
  }

  def stage(name, function, *args):
    compiled = jax.jit(function)
    ready[name] = lambda: compiled(*args)
    return jax.block_until_ready(ready[name]())

  def scores(x_GTD):
    logits_GTE = jnp.dot(x_GTD, params["router"]["kernel"], precision="highest")
    return jax.nn.softmax(logits_GTE)

  def route(x_GTD):
    return layer.route(recipe, params["router"], {}, x_GTD, side, None)

  def plan(routing):
    return recipe.dispatcher.plan(routing.choice, shape.num_experts, None)

  def before(x_GTD):
    made = plan(route(x_GTD))
    return made, made.dispatch(x_GTD)

  def report(routing, plan):
    return plans.report(recipe, routing, plan, side, {})

  x_GTD = x_TD[None]
  score_GTE = stage("scores", scores, x_GTD)
  top_k = functools.partial(jax.lax.top_k, k=shape.top_k)
  stage("top-k", top_k, score_GTE)
  routing = stage("route, both of these and weights", route, x_GTD)
  made = stage("plan, with the sort", plan, routing)
  rows = stage("dispatch", lambda plan, x: plan.dispatch(x), made, x_GTD)
  stage("combine", lambda plan, rows: plan.combine(rows), made, rows)
  stage("statistics", report, routing, made)
  stage(ALL[0], before, x_GTD)
  stage(ALL[1], lambda plan, rows: plan.combine(rows), made, rows)
  return ready


def summarize(shape: str, runs: list[dict]) -> list[dict]:
  """A row per stage: medians over processes, with their interval."""
  rows = []
  for run in runs:
    run[WITHOUT_EXPERTS] = [a + b for a, b in zip(*(run[n] for n in ALL))]
  for stage in runs[0]:
    shares = []
    for run in runs:
      dense = min((run[d] for d in shapes.DENSE), key=statistics.median)
      shares.append(timing.over(run[stage], dense))
    seconds = [statistics.median(run[stage]) for run in runs]
    row = {"shape": shape, "stage": stage}
    row["seconds"] = statistics.median(seconds)
    rows.append(row | timing.summary("of_dense_forward", shares))
  return rows


def table(rows: list[dict]) -> str:
  """The rows as markdown."""
  return timing.grid(
    [row for row in rows if row["stage"] not in ALL],
    down="stage",
    across="shape",
    text=lambda row: timing.cell(row, "of_dense_forward", 100, 1),
    title="% of dense forward",
  )


if __name__ == "__main__":
  command.run(lambda: main(sys.argv[1:]))
