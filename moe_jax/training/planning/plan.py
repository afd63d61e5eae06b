"""A plan: a config's program compiled for a topology, and its costs.

This file is long because plans of training and of decoding share their code.
"""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import models
from moe_jax.core import parallel
from moe_jax.core.errors import ConfigError
from moe_jax.models import counts
from moe_jax.models.generation import decoding
from moe_jax.training import program, train_step
from moe_jax.training.planning import (
  chips,
  compiled,
  costs,
  products,
  topologies,
)


class Cost(NamedTuple):
  """A stage, and the least seconds of its operations.

  compute: of its FLOPs.
  memory: of reading and writing memory.
  links: of receiving over all links.
  spill: of scores of attention to memory, which a kernel may spare.
  along: of receiving over one dimension of the torus instead of all links.
  """

  stage: costs.Stage
  compute: float = 0.0
  memory: float = 0.0
  links: float = 0.0
  spill: float = 0.0
  along: float = 0.0


def seconds(parts: list[Cost]) -> tuple[float, float]:
  """Returns the least seconds of stages: with full overlap, and without any."""
  sums = zip(*((part.compute, part.memory, part.links) for part in parts))
  low = max(map(sum, sums), default=0.0)
  high = (
    part.compute + part.memory + part.spill + part.along for part in parts
  )
  return low, sum(high)


class Plan(NamedTuple):
  """The plan of a step of a program, on each device of a topology.

  program: "training step" or "decoding step"; topology: its name.
  mesh: {axis: length}.
  memory: {kind: bytes}.
  limit: bytes that there are.
  even: {kind: bytes} of the state on a device, if all devices shared it evenly.
  fits: whether memory is within the limit.
  flops: see `products.count`.
  moved: see `hlo.by_axes`.
  stages: in closed form.
  tokens: of a step, of all devices.
  compile_seconds: 0 if nothing was compiled.
  params: shapes and shardings of the parameters.
  config, chip, model, step: the parts that it was made of.
  """

  program: str
  topology: str
  mesh: dict[str, int]
  memory: dict[str, int]
  limit: int | None
  even: dict[str, float]
  fits: bool
  flops: dict[str, float]
  moved: dict | None
  stages: list[Cost]
  tokens: int
  compile_seconds: float
  params: dict
  config: object
  chip: chips.Chip
  model: object
  step: costs.Step


def build(config, chip, devices) -> tuple:
  """Returns (mesh, task, model) of a config on devices that are not there.

  Args:
    config, chip, devices: as in `of_train_step`.

  Raises:
    ConfigError: impossible values, a model that is no decoder, or a backend of
      grouped products that this chip does not have.
  """
  sections = [config.model, *config.model.variants.values()]
  for moe in (section.get("moe") or {} for section in sections):
    wanted = moe.get("grouped_matmul")
    if wanted and wanted.partition(":")[0] != chip.platform:
      raise ConfigError(
        f'grouped_matmul = "{wanted}" is not of {chip.name}; a plan is of the'
        " platform's own, so set it to None"
      )
  if chip.platform == "gpu":  # Other backends compile on a GPU only.
    config = config.copy_and_resolve_references()
    config.model.moe.grouped_matmul = "gpu:xla"
  costs.check(config)
  return program.build(config, devices, prepare=False)


def of_train_step(config, chip, devices, topology: str) -> Plan:
  """Returns the plan of the training step of a config.

  Args:
    config: its mesh is of the topology.
    chip: of the topology.
    devices: of the topology.
    topology: its name.

  Raises:
    ConfigError: impossible values, or the compiler refuses the program.
  """
  mesh, task, model = build(config, chip, devices)
  numbers = train_step.numbers(config, model)
  made = program.functions(config, mesh, task, model, numbers)
  state, batch = made.train_step.arguments[:2]
  trees = {
    "parameters": state.params,
    "moving average": state.ema,
    "optimizer": state.opt_state,
    "balancers": state.balance,
    "batch": batch,
  }
  per_token = counts.train_flops_per_token(model, made.sizes, task.lengths)
  return _plan(
    "training step",
    made.train_step,
    trees,
    step=costs.of_train_step(config, task, mesh),
    boxed=parameters(task, model),
    flops_per_token=per_token,
    config=config,
    chip=chip,
    mesh=mesh,
    model=model,
    topology=topology,
  )


def of_decoding(config, chip, devices, topology: str) -> Plan:
  """Returns the plan of a step that makes one token for each of many sequences.

  There are `eval.batch_size` sequences, with a cache of `data.seq_len` tokens,
  weights and cache in `model.dtype`, and without capacities.

  Args:
    config, chip, devices, topology: as in `of_train_step`.

  Raises:
    ConfigError: as in `of_train_step`.
  """
  config = config.copy_and_resolve_references()
  config.model = models.dropless(config.model.to_dict())
  mesh, task, model = build(config, chip, devices)
  batch, length = config.eval.batch_size, config.data.seq_len
  call = _one_token(model, mesh, batch, length)
  weights, cache, *tokens = call.arguments
  trees = {"parameters": weights, "cache": cache, "batch": tokens}
  variables = models.variables(model)
  sizes = counts.count(model, variables)
  return _plan(
    "decoding step",
    call,
    trees,
    step=costs.of_decoding(config, mesh),
    boxed=variables["params"],
    flops_per_token=counts.flops_per_token(model, sizes, {"inputs": length}),
    config=config,
    chip=chip,
    mesh=mesh,
    model=model,
    topology=topology,
  )


def _one_token(model, mesh, batch, length):
  """The Call that makes one token for each of `batch` sequences."""
  rows = jax.NamedSharding(mesh, jax.P(parallel.TOKENS))

  def over_rows(path, x):
    """The cache of repeated layers has an axis of them before the batch."""
    names = [key.key for key in path]
    before = (None,) * (names[1] in {name for name, *_ in model.arch.segments})
    spec = jax.P(*before, parallel.TOKENS) if x.ndim > len(before) else jax.P()
    sharding = jax.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  variables = jax.tree.map(
    lambda x, placed: jax.ShapeDtypeStruct(
      x.shape, _narrow(x, model), sharding=placed
    ),
    nn.unbox(models.variables(model)),
    models.shardings(model),
  )
  tokens_B1 = jax.ShapeDtypeStruct((batch, 1), jnp.int32, sharding=rows)
  mask_B1 = jax.ShapeDtypeStruct((batch, 1), bool, sharding=rows)
  step = functools.partial(decoding.step, model, length, False)
  cache, *_ = jax.eval_shape(step, variables, {}, tokens_B1, mask_B1)
  cache = jax.tree_util.tree_map_with_path(over_rows, cache)
  static = model, length, False
  return program.Call(
    jax.jit(lambda *args: decoding.step(*static, *args), donate_argnums=1),
    (variables, cache, tokens_B1, mask_B1),
  )


def _narrow(x, model):
  return model.arch.dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype


def state_bytes_per_parameter(config, task, model) -> float:
  """Returns bytes of parameters, average and optimizer, for each parameter.

  Args:
    config, task, model: see `configs/base.py` and `program.build`.
  """
  numbers = train_step.numbers(config, model)
  parts = train_step.parts(config, model, task)
  init = functools.partial(train_step.init_state, **parts, numbers=numbers)
  state = nn.unbox(jax.eval_shape(init, jax.random.key(0)))
  whole = _bytes((state.params, state.ema, state.opt_state))
  return whole / sum(x.size for x in jax.tree.leaves(state.params))


def parameters(task, model):
  """Returns the shapes of a model's parameters, boxed with their roles.

  Args:
    task, model: from `program.build`.
  """
  return models.variables(model)["params"]


def _plan(name, call, trees, *, step, boxed, flops_per_token, mesh, **given):
  """The Plan of a call, whose arguments are these trees."""
  model, chip = given["model"], given["chip"]
  arguments = {k: compiled.bytes_on_a_device(x) for k, x in trees.items()}
  kinds = ("parameters", "moving average", "optimizer", "cache")
  even = {k: _bytes(x) / mesh.size for k, x in trees.items() if k in kinds}
  matrices = costs.matrices(model, boxed, mesh)
  stages = costs.stages(step, model, matrices)
  found = _compile(call, arguments, step, mesh, chip)
  tokens = step.tokens * step.micro_batches * parallel.token_shards(mesh)
  ring = topologies.ring(given["topology"])
  wanted = flops_per_token * tokens / mesh.size
  return Plan(
    program=name,
    mesh=dict(mesh.shape),
    memory=found.memory,
    limit=chip.memory,
    even=even,
    fits=found.fits,
    flops=_flops(mesh, found.products, step, model, matrices, stages, wanted),
    moved=found.moved,
    stages=[bounds(stage, step, chip, ring) for stage in stages],
    tokens=tokens,
    compile_seconds=found.seconds,
    params=trees["parameters"],
    step=step,
    **given,
  )


def _flops(mesh, *args):
  with jax.set_mesh(mesh):  # Sizes of tiles depend on its chip.
    return products.count(*args)


def _compile(call, arguments, step, mesh, chip):
  """The call compiled, unless its arguments leave no room already."""
  least = dict(arguments)
  if step.backward:  # A gradient is as large as its parameter.
    least["gradients"] = arguments["parameters"]
  if chip.memory and sum(least.values()) > chip.memory:
    return compiled.Compiled(least, False, None, None, 0.0)
  with jax.set_mesh(mesh):
    lowered = call.function.lower(*call.arguments)
  return compiled.compile(lowered, arguments, mesh, chip.memory)


def _bytes(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def bounds(stage, step, chip, ring):
  """Returns the stage with the least seconds that it can take.

  Args:
    stage, step, chip: the stage, and the step and the chip that it is of.
    ring: devices along the longest dimension of the topology, or GPUs of a
      host.
  """
  if not chip.flops:
    return Cost(stage)
  return Cost(
    stage,
    compute=(stage.flops + stage.again) / chip.flops,
    memory=stage.memory / chip.memory_rate,
    links=sum(sent.wire for sent in stage.sent) / chip.links,
    spill=stage.spilled / chip.memory_rate,
    along=sum(_along_a_ring(sent, step, chip, ring) for sent in stage.sent),
  )


def _along_a_ring(sent, step, chip, ring):
  """Seconds over one dimension of a torus, or over the network of GPUs."""
  if chip.platform == "gpu" and _within_hosts(sent.axes, step.mesh, ring):
    return sent.wire / chip.links
  seconds = sent.wire / chip.axis
  if chip.platform == "tpu" and "all-to-all" in sent.kind:
    # On the way to its device a row passes a quarter of a ring.
    seconds *= max(1.0, min(ring, step.over(sent.axes)) / 4)
  return seconds


def _within_hosts(axes, mesh, each):
  """Whether devices along some axes of a mesh share a host, `each` of which."""
  host = np.arange(mesh.size).reshape(tuple(mesh.shape.values())) // each
  moved = np.moveaxis(
    host, [mesh.axis_names.index(a) for a in axes], range(len(axes))
  )
  rows = moved.reshape(-1, mesh.size // math.prod(mesh.shape[a] for a in axes))
  return bool((rows == rows[0]).all())
