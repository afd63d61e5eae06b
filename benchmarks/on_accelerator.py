"""Checks, tunes and times the accelerator of this machine, in one command.

  python -m benchmarks.on_accelerator --minutes=8 --json=on_accelerator.json

In this order, each part until its share of the minutes is over, when the task
that runs is ended (a compiler that runs is waited for):

1. Is it right? Products, their gradients and the whole layer by every kernel
   for this device, against float64 on the host.
2. Tiles: times every kernel with several tiles on the products of the shapes
   below. What is found holds for the parts that follow. With --json the whole
   table is written beside it, as NAME.tiles.json: copy it to
   moe_jax/moe/kernels/gpu/tiles.json to keep it.
3. The layer in bfloat16, router, choice, sort and all, forward alone and with
   all gradients, divided by the dense layer of the same active FLOPs: dropless
   with each kernel, with slots for 1.25 times the balanced load, and the products
   of the experts alone with equal loads, in turn.
4. The training step of a decoder with experts, in turn with its dense twin.

The JSON is written after every task; what there was no time or memory for, and
what failed, is named in it and at the end. The exit code is 1 if something was
wrong or failed. On a CPU it runs at toy sizes, to try it out.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from benchmarks import accelerator_tables, shapes, timing
from moe_jax.run import command

_CASES = 8  # Products that are checked: each dtype with each width.
table = accelerator_tables.table  # See `benchmarks.tables`.
_PACKAGES = ("jaxlib", "tokamax", "jax-triton", "triton", "libtpu")
# The share of all minutes at which a part ends, and the seconds that its first
# task may take; later ones are expected to take as long as the longest before.
_PARTS = {
  "right": (0.2, 30),
  "tiles": (0.45, 20),
  "layer": (0.8, 45),
  "step": (1.0, 75),
}


class Task(NamedTuple):
  """A part of the measurement: run() gives rows of the result."""

  part: str
  what: str
  run: Callable[[], list[dict]]


def main(argv=None) -> int:
  """The command."""
  started = time.monotonic()
  args = _arguments(argv)
  import jax

  measurement = Measurement(jax.devices()[0])
  rows = []
  for task in measurement.tasks():
    rows += within(task, started, 60 * args.minutes, measurement)
    passed = time.monotonic() - started
    print(f"{passed:.0f} s: {_told(rows, task)}", file=sys.stderr, flush=True)
    write(args.json, rows, measurement.device.device_kind)
  print(table(rows))
  return 0 if all(row.get("passed", True) for row in rows) else 1


def within(task: Task, started, seconds, measurement) -> list[dict]:
  """The rows of a task, or that there was no time or no memory for it."""
  share, first = _PARTS[task.part]
  if measurement.toy:  # There all parts are short.
    share, first = 1.0, 0.1 * first
  expected = measurement.longest.get(task.part, first)
  now, end = time.monotonic(), started + share * seconds
  if now + expected > end:
    return [_left_out(task.what, "no time")]
  try:
    with _until(end - now):
      rows = task.run()
  except _OutOfTime:
    rows = [_left_out(task.what, "no time")]
  except Exception as e:  # One kernel that fails must not end all the rest.
    if task.part == "right":
      measurement.wrong.add(task.what.partition(",")[0])
    rows = [_left_out(task.what, _reason(e)) | {"passed": _is_full(e)}]
  took = time.monotonic() - now
  longest = measurement.longest.get(task.part, 0)
  measurement.longest[task.part] = max(took, longest)
  return rows


class _OutOfTime(BaseException):
  """A task takes longer than its part may; nothing on the way catches this."""


@contextlib.contextmanager
def _until(seconds):
  """Ends what runs inside after so many seconds, when no compiler runs."""

  def stop(number, frame):
    raise _OutOfTime

  before = signal.signal(signal.SIGALRM, stop)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def _is_full(error):
  """Whether it says that the memory is full, which is no mistake."""
  return "RESOURCE_EXHAUSTED" in str(error)


def _reason(error):
  if _is_full(error):
    return "not enough memory"
  first = (str(error).splitlines() or [""])[0]
  return f"{type(error).__name__}: {first[:200]}"


class Measurement:
  """The measurements of a device, and their results so far.

  device: of jax; toy: whether it is a CPU; wrong: backends of which a result was
  wrong, or which refused all, so that they are not timed; longest: seconds of the
  longest task of each part.
  """

  def __init__(self, device):
    self.device, self.toy = device, device.platform == "cpu"
    self.shapes = shapes.TOY if self.toy else shapes.ACCELERATOR
    self.wrong, self.longest = set(), {}

  def tasks(self) -> Iterator[Task]:
    """All of them, the most important ones first."""
    from benchmarks import right, tuning

    best, *others = self.backends()
    yield Task("right", best, functools.partial(self._products, best))
    for dispatcher, on_mesh in right.PLACES[:: 3 if self.toy else 1]:
      run = functools.partial(self._layer, best, dispatcher, on_mesh)
      yield Task("right", f"{best}, layer", run)
    for backend in others:
      yield Task("right", backend, functools.partial(self._products, backend))
    if self.device.platform in ("cpu", "gpu"):
      for name, shape in self.shapes.items():
        for product in tuning.products(shape):
          run = functools.partial(self._tiles, product)
          yield Task("tiles", f"tiles, {name}, {product.kind}", run)
    for name, shape in self.shapes.items():
      run = functools.partial(self._times, name, shape)
      yield Task("layer", f"layer, {name}", run)
    yield Task("step", "training step", functools.partial(self._step, best))

  def backends(self) -> list[str]:
    """The grouped_matmul that this platform chooses first."""
    from moe_jax.moe import kernels

    platform = self.device.platform
    own = [b for b in kernels.BACKENDS if b.split(":")[0] == platform]
    if self.toy:  # The loops of the backend cpu compile slowly.
      return ["gpu"]
    return [b for b in own if b != "gpu:xla"]

  def _products(self, backend):
    from benchmarks import right

    rows = right.products(backend, 2 if self.toy else _CASES)
    self._note(backend, rows)
    refused = [row for row in rows if row["stage"] == "left out"]
    if len(refused) == len(rows):
      self.wrong.add(backend)
      return [_left_out(backend, refused[0]["why"])]
    return [row for row in rows if row not in refused]

  def _layer(self, backend, dispatcher, on_mesh):
    from benchmarks import right

    rows = [right.whole_layer(backend, dispatcher, on_mesh)]
    self._note(backend, rows)
    return rows

  def _note(self, backend, rows):
    if not all(row.get("passed", True) for row in rows):
      self.wrong.add(backend)
      from moe_jax.moe.kernels import gpu

      name, _, candidate = backend.partition(":")
      if name == "gpu" and candidate:
        gpu.leave_out(candidate)

  def _tiles(self, product):
    from benchmarks import tuning
    from moe_jax.moe.kernels import gpu

    wrong = [b.partition(":")[2] for b in self.wrong]
    found = tuning.entries(product, wrong)
    gpu.learn(self.device.device_kind, found)
    return [{"stage": "tiles", **entry} for entry in found]

  def _step(self, best):
    from benchmarks import whole_model

    if best in self.wrong:
      return [_left_out("training step", f"{best} is wrong")]
    return whole_model.measure(self.toy)

  def _times(self, name, shape):
    return times(
      name, shape, [b for b in self.backends() if b not in self.wrong]
    )


def times(name: str, shape: shapes.Shape, backends, rounds: int = 5):
  """A row of the result for each way of computing the layer.

  Args:
    name, shape: of the layer.
    backends: of grouped_matmul.
    rounds: in each, everything has its turn.
  """
  import jax
  import jax.numpy as jnp

  from benchmarks import layers, tuning

  named = layers.implementations(shape, backends=backends, dtype=jnp.bfloat16)
  wanted = [
    "dense",
    *(f"sorted/{b}" for b in backends),
    "gather, capacity 1.25",
    *shapes.NOT_ROUTED,
  ]
  jobs = {}
  for implementation in wanted:
    f, params, x_TD = named[implementation]
    dy_TD = jax.random.normal(jax.random.key(9), x_TD.shape, x_TD.dtype)
    both = functools.partial(layers.forward_backward, f)
    jobs[implementation, "forward"] = f, (params, x_TD)
    jobs[implementation, "forward_backward"] = both, (params, x_TD, dy_TD)
  seconds = tuning.interleaved(tuning.compiled(jobs), rounds)
  return [_row(name, shape, i, seconds) for i in wanted]


def _row(name, shape, implementation, seconds):
  row = {"stage": "layer", "shape": name, "implementation": implementation}
  for direction in shapes.DIRECTIONS:
    one = seconds.get((implementation, direction))
    dense = seconds.get(("dense", direction))
    if not one or not dense:
      continue
    ratios = [a / b for a, b in zip(one, dense)]
    row |= timing.summary(f"{direction}_ratio", ratios)
    row[f"{direction}_seconds"] = statistics.median(one)
  if "forward_seconds" in row:
    row["forward_flops_per_second"] = shape.flops / row["forward_seconds"]
  return row


def write(path, rows: list[dict], kind: str) -> None:
  """The JSON, and beside it the table of tiles if new ones were found."""
  from benchmarks import tuning

  if not path:
    return
  installed = {d.name: d.version for d in importlib.metadata.distributions()}
  packages = {k: installed[k] for k in _PACKAGES if k in installed}
  timing.write(path, rows, packages=packages)
  tiles = [row for row in rows if row["stage"] == "tiles"]
  if tiles:
    found = [{k: v for k, v in t.items() if k != "stage"} for t in tiles]
    path.with_suffix(".tiles.json").write_text(tuning.merged(kind, found))


def _left_out(what, why):
  return {"stage": "left out", "what": what, "why": why}


def _told(rows, task):
  left = rows and rows[-1]["stage"] == "left out"
  return f"{task.what}: {rows[-1]['why'] if left else 'done'}"


def _arguments(argv):
  parser = timing.parser("on_accelerator", __doc__)
  parser.add_argument(
    "--minutes", type=_minutes, default=8, help="default: %(default)s"
  )
  return parser.parse_args(argv)


def _minutes(text):
  try:
    minutes = float(text)
  except ValueError:
    minutes = 0.0
  if not 0 < minutes < 1e6:
    raise argparse.ArgumentTypeError(f"{text} is no number of minutes above 0")
  return minutes


if __name__ == "__main__":
  command.run(lambda: main(sys.argv[1:]))
