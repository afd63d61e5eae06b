"""Published weights in and out: folders of config.json and safetensors.

  from moe_jax import hf

  model, variables = hf.load("path/to/mixtral")
  hf.save("path/to/copy", model, variables)

`families` has a table for each family; `rows` and `tensors` explain its rows.
Needs the extra `hf`.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import traverse_util

from moe_jax import models
from moe_jax.core import files
from moe_jax.core.errors import ConfigError
from moe_jax.hf import (
  architecture,
  config,
  families,
  fields,
  tensors,
  weights,
)


def load(
  path: str | os.PathLike,
  mesh: jax.sharding.Mesh | None = None,
  *,
  dtype: str = "float32",
) -> tuple[nn.Module, dict]:
  """Returns a published model, and its weights.

  Decoders are dropless. An encoder-decoder keeps the slots that its config.json
  gives an expert, in training and outside of it, because dropped tokens are a
  part of the function that it computes.

  Nothing is loaded unless every tensor is there, with the right shape and a
  dtype that can be read. Each device then reads its own part, an expert or a
  layer's matrix at a time.

  Args:
    path: folder of config.json and model.safetensors, or of an index and the
      files that it names.
    mesh: from `parallel.make_mesh`; None: one device.
    dtype: of parameters and activations, "float32" or "bfloat16".

  Returns:
    (model, {"params": ..., "balance": ...}) for `model.apply`. balance is there
    if the model has selection biases. `model.arch.source` has the other fields
    of the folder: see `config.Source`.

  Raises:
    ConfigError: an unknown model_type or field, missing, unknown or damaged
      files and tensors; names the first of them.
  """
  path = pathlib.Path(path)
  where = str(path / "config.json")
  values, generation = config.load(path)
  store = weights.Files(path)
  family, ours, source = config.read(values, where, generation, store.room())
  model = architecture.build(ours, where, mesh, dtype)
  shapes = nn.unbox(models.variables(model))
  family = families.as_named(family, store.files)
  wanted = tensors.layout(family, model.arch.stacks, shapes)
  weights.check(wanted, store, ours.get("left_out", ()), family.copies)
  shardings = {} if mesh is None else models.shardings(model)
  arch = dataclasses.replace(model.arch, source=source)
  return model.clone(arch=arch), weights.read(wanted, store, dtype, shardings)


def section(path: str | os.PathLike) -> dict[str, Any]:
  """Returns the section `config.model` of a published model, without a dtype.

  Raises:
    ConfigError: as in `load`, for config.json.
  """
  values, _ = config.load(path := pathlib.Path(path))
  return architecture.section(config.read(values, str(path / "config.json"))[1])


def save(
  path: str | os.PathLike,
  model: nn.Module,
  variables: Mapping[str, Any],
  *,
  model_type: str | None = None,
  max_shard_bytes: int = 5_000_000_000,
  extra: Mapping[str, Any] | None = None,
) -> None:
  """Writes a model in the format that the reference implementation reads.

  A model that `load` made keeps the special tokens, the longest context and all
  other fields of its folder that change nothing in what it computes.

  Args:
    path: folder to make; not there yet, or empty.
    model, variables: as `load` returns them, or `trained.of_run` of a run of
      ours.
    model_type: of config.json; None: the first that has such models.
    max_shard_bytes: the largest size of a file, unless it holds a single
      tensor.
    extra: fields of config.json that change nothing in what a model computes,
      such as {"eos_token_id": tokenizer.end, "max_position_embeddings": 256}.
      Special tokens that are not given are null.

  Raises:
    ConfigError: no family has such a model, or `extra` has an unknown field, or
      the folder is not empty.
  """
  path, extra = pathlib.Path(path), dict(extra or {})
  files.check_empty(path)
  family, values = config.write(model.arch, model_type)
  for name in extra:
    if not fields.ignored(name) or name in values:
      raise ConfigError(
        f'extra has "{name}", which is no field that changes nothing in what a'
        " model computes; leave it out"
      )
  wanted = tensors.layout(family, model.arch.stacks, variables)
  if not model.arch.tie_embeddings:
    for copy, name in family.copies.items():
      wanted[copy] = wanted[name]._replace(name=copy)
  dtype = variables["params"]["embedding"].dtype.name
  source = model.arch.source or config.Source()
  values = config.kept(family, source) | {"dtype": dtype, **extra} | values
  texts = {"config.json": traverse_util.unflatten_dict(values, sep=".")}
  if source.generation:
    special = {k: x for k, x in extra.items() if k in source.generation}
    texts["generation_config.json"] = {**source.generation, **special}
  with files.whole_folder(path) as whole:
    texts |= weights.write(wanted, whole, max_shard_bytes)
    for name, value in texts.items():
      text = json.dumps(value, indent=2, sort_keys=True)
      (whole / name).write_text(f"{text}\n")
