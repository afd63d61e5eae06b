"""Plans a run on devices that are not there.

moe-jax plan --config=configs/tiny.py --topology=v5p:2x2x1 \\
  --mesh=fsdp:2,expert:2

Compiles the run's own training step (or a step of decoding) for a TPU or GPU
topology, and says what each device holds, computes and sends, whether that fits,
and how long a step takes at least. It needs neither the devices nor the data.
"""

from moe_jax.core.errors import ConfigError
from moe_jax.run import command

_MOST_RANKED = 100  # Candidates of a search that --json has.


def main(argv=None) -> int:
  """Runs the command: a page on stdout, JSON to a file.

  Raises ConfigError for flags that do not fit, or a step that does not.
  """
  from moe_jax.run import config as config_lib
  from moe_jax.training.planning import topologies

  args, config = config_lib.parse(_parser(config_lib), argv)
  if args.json is not None:
    command.check_writable(args.json)  # Tells now, not after minutes.
  chip, shape = topologies.parse(args.topology)
  topologies.prepare(chip, shape)

  from moe_jax.core import parallel
  from moe_jax.training.planning import loads, page, plan, search

  count_NE = None if args.load is None else loads.read(args.load)
  devices = topologies.devices(chip, shape)
  given = chip, devices, args.topology
  if args.mesh is not None:
    config.mesh = topologies.sizes(args.mesh, parallel.AXES, len(devices))
  if args.search:
    return _search(args, config, *given)
  if args.load is not None:
    mesh, _, model = plan.build(config, chip, devices)
    found = loads.of_model(count_NE, model, mesh)
  make = plan.of_decoding if args.decode else plan.of_train_step
  made = make(config, *given)
  values = page.values(made)
  print(page.text(made))
  if args.parameters:
    print(page.parameters(made))
  if args.load is not None:
    print(loads.text(found))
    values["load"] = found._asdict()
  if args.json is not None:
    command.write_json(args.json, values)
  if not made.fits:
    raise ConfigError(search.remedy(made, config, devices))
  return 0


def _search(args, config, chip, devices, topology):
  """Plans the best candidates, and prints how near the closed form was."""
  from moe_jax.training.planning import page, search, topologies

  others = args.decode, args.parameters, args.load, args.mesh
  if any(each not in (False, None) for each in others):
    raise ConfigError(
      "--search ranks meshes and ways to train; leave out --mesh, --decode,"
      " --parameters and --load"
    )
  if not chip.flops:
    raise ConfigError(
      f"--search needs a chip whose rates are known, which {chip.name} is not;"
      " give a topology of TPUs or GPUs"
    )
  found = search.ranked(config, chip, devices, topologies.ring(topology))
  if not found:
    raise ConfigError(
      "--search: a run would accept no mesh of these devices; make"
      " data.batch_size and eval.batch_size multiples of their number"
    )
  print(page.candidates(found, chip))
  rows, made = [], None
  for one in found[: 3 * args.compile]:
    if sum(row.get("fits", False) for row in rows) == args.compile:
      break
    row = {"candidate": one._asdict()}
    try:
      made = search.compiled(one, config, chip, devices, topology)
    except ConfigError as e:  # A fault of the compiler; others may pass.
      print(f"not compiled {one.flags}: {e}", flush=True)
      rows.append(row | {"error": str(e)})
      continue
    print(page.compared(one, made), flush=True)
    rows.append(row | page.values(made))
  if args.json is not None:
    ranked = [one._asdict() for one in found[:_MOST_RANKED]]
    values = {"compiled": rows, "candidates": len(found), "ranked": ranked}
    command.write_json(args.json, values)
  if not any(row.get("fits") for row in rows):
    why = search.remedy(made, made.config, devices) if made else "none compiles"
    raise ConfigError(f"--search: none of {len(rows)} candidates fits: {why}")
  return 0


def _parser(config_lib):
  parser = config_lib.parser("Plans a run on devices that are not there.")
  add = parser.add_argument
  add(
    "--topology",
    required=True,
    metavar="CHIP:SHAPE",
    help="such as v5p:8x8x8, v6e:16x16 or h100:4x8",
  )
  words = "such as data:1,fsdp:8,expert:64; default: the mesh of the config"
  add("--mesh", metavar="AXIS:LENGTH,...", help=words)
  words = "plan a step that makes one token, not a training step"
  add("--decode", action="store_true", help=words)
  words = "print every parameter and how it lies on the mesh"
  add("--parameters", action="store_true", help=words)
  words = "rank meshes, remat and micro-batches, and compile the best"
  add("--search", action="store_true", help=words)
  words = "how many of the best (default: %(default)s)"
  add(
    "--compile", type=config_lib.at_least_1, default=3, metavar="N", help=words
  )
  words = "the loads in the metrics of a run"
  add("--load", metavar="METRICS.JSONL", help=words)
  add("--json", metavar="PATH", help="also write JSON there")
  return parser


if __name__ == "__main__":
  command.run(main)
