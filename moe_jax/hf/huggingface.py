"""Published weights in and out: folders of config.json and safetensors.

  model, variables = huggingface.load("path/to/mixtral")
  huggingface.save("path/to/copy", model, variables)

Which tensor is which parameter is in `families`. Needs the extra `hf`.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from moe_jax import models
from moe_jax.core import parallel, registry
from moe_jax.core.errors import ConfigError, did_you_mean, first_line
from moe_jax.hf import families

_FLOATS = ("F64", "F32", "F16", "BF16")
_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
# What a config of ours needs beside what a family says.
_SECTION = {
  "name": "transformer",
  "prefix": (),
  "pattern": ("moe",),
  "d_ff": 1,  # Of dense layers, where there are any.
  "activation": "swiglu",
  "attention": {},
  "variants": {},
  "norm": "rms",
  "scale_embedding": False,
  "remat": "none",
  "allow_noncausal": False,
}
_MOE = {
  "num_shared_experts": 0,
  "shared_gate": False,
  "activation": "swiglu",
  "use_bias": False,
  "init_scale": 1.0,
  "grouped_matmul": None,
  "balancers": {},
  **models.DROPLESS,
}


def load(
  path: str | os.PathLike,
  mesh: jax.sharding.Mesh | None = None,
  *,
  dtype: str = "float32",
) -> tuple[nn.Module, dict]:
  """A published model, dropless, and its weights.

  Nothing is loaded unless every tensor is there, with the right shape and a
  dtype that can be read. Each device then reads what it holds, an expert or a
  layer's matrix at a time.

  Args:
    path: folder of config.json and model.safetensors, or of an index and the
      files that it names.
    mesh: from `parallel.make_mesh`; None: one device.
    dtype: of parameters and activations, "float32" or "bfloat16".

  Returns:
    (model, {"params": ..., "balance": ...}) for `model.apply`. balance is there
    if the model has selection biases.

  Raises:
    ConfigError: an unknown model_type or field, missing, unknown or damaged
      files and tensors; names the first of them.
  """
  path = pathlib.Path(path)
  config = read_config(path)
  family = _family(config, path)
  model = build(config, path / "config.json", mesh, dtype)
  layout = _Layout(family, model)
  with contextlib.closing(_Tensors(path)) as tensors:
    layout.check(tensors, family.left_out(config))
    return model, layout.read(tensors, dtype)


def read_config(path: pathlib.Path) -> dict:
  """The config.json of a folder.

  Raises:
    ConfigError: there is none.
  """
  try:
    config = json.loads((path / "config.json").read_text())
    if not isinstance(config, dict):
      raise ValueError("it is no object")
  except OSError as e:
    raise ConfigError(
      f"{path} has no config.json ({e.strerror}); give the folder of a model"
      " with its config.json and safetensors files"
    ) from None
  except ValueError as e:
    raise ConfigError(
      f"{path / 'config.json'} is not JSON ({first_line(e)}); get it anew"
    ) from None
  return config


def _family(config, path):
  known = families.FAMILIES
  name = config.get("model_type")
  if name not in known:
    raise ConfigError(
      f"{path / 'config.json'} has model_type = {name!r}, which is not supported"
      + did_you_mean(str(name), known)
    )
  if config.get("quantization_config"):
    method = dict(config["quantization_config"]).get("quant_method")
    raise ConfigError(
      f"{path / 'config.json'} has quantization_config ({method}): quantized"
      " weights are not read; convert them to bfloat16 first"
    )
  return known[name]


def build(
  config: Mapping[str, Any],
  where: os.PathLike | str,
  mesh: jax.sharding.Mesh | None = None,
  dtype: str = "float32",
) -> nn.Module:
  """The model that a config.json means.

  Args:
    config: its fields.
    where: its path, for errors.
    mesh, dtype: as in `load`.
  """
  fields = families.Fields(config, str(where))
  section = families.FAMILIES[config["model_type"]].section(fields)
  fields.finish()
  section = {**_SECTION, **section, "dtype": dtype}
  section["moe"] = {**_MOE, **section["moe"]}
  section["attention"] = {
    k: v for k, v in section["attention"].items() if v is not None
  }
  try:
    return models.build(
      section,
      vocab_size=section["vocab_size"],
      seq_len=1,
      batch_sizes=(parallel.token_shards(mesh),),
      mesh=mesh,
    )
  except ConfigError as e:
    raise ConfigError(f"{where}: {e}") from None


def save(
  path: str | os.PathLike,
  model: nn.Module,
  variables: Mapping[str, Any],
  *,
  model_type: str | None = None,
  max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes a model as the reference implementation reads it.

  Args:
    path: folder to make; not there yet, or empty.
    model, variables: as `load` returns them, or of a run of ours.
    model_type: of config.json; None: the first that has such models.
    max_shard_bytes: files are as large, or hold a single tensor.

  Raises:
    ConfigError: no family has such a model, or the folder is not empty.
  """
  path = pathlib.Path(path)
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise ConfigError(f"{path} is not an empty folder; save to another")
  name, config = _describe(model, variables, model_type)
  layout = _Layout(families.FAMILIES[name], model)
  path.parent.mkdir(parents=True, exist_ok=True)
  # Under another name until it is whole.
  with tempfile.TemporaryDirectory(
    dir=path.parent, prefix=f".{path.name}-"
  ) as work:
    whole = pathlib.Path(work) / "whole"
    whole.mkdir()
    layout.write(whole, variables, max_shard_bytes)
    text = json.dumps(config, indent=2, sort_keys=True)
    (whole / "config.json").write_text(f"{text}\n")
    if path.exists():
      path.rmdir()
    shutil.move(whole, path)


def _describe(model, variables, model_type):
  """(model_type, config.json) that mean this very model."""
  arch = model.arch
  known = families.FAMILIES
  if model_type is not None and model_type not in known:
    raise ConfigError(
      f'there is no model_type "{model_type}"' + did_you_mean(model_type, known)
    )
  reasons = []
  for name in known if model_type is None else (model_type,):
    try:
      config = known[name].describe(arch, _widths(variables["params"]))
      config |= {
        "model_type": name,
        "dtype": arch.dtype,
        "transformers_version": "5.0.0",
      }
      again = build(config, f"a config.json of {name}", arch.mesh, arch.dtype)
      difference = _difference(again.arch, arch)
    except (ConfigError, KeyError, AttributeError, TypeError) as e:
      difference = f"{type(e).__name__}: {first_line(e)}"
    if difference is None:
      return name, config
    reasons.append(f"{name}: {difference}")
  raise ConfigError(
    "this model is none that can be saved for others to read: "
    + "; ".join(reasons)
  )


def _widths(params):
  """F of the routed experts, and of the shared ones."""
  found = {"experts": 0, "shared": 0}
  for key, leaf in traverse_util.flatten_dict(params).items():
    if key[-1] == "up" and key[-2] in found:
      found[key[-2]] = leaf.shape[-1]
  return families.Widths(found["experts"], found["shared"])


_OF_A_RUN = (
  *("mesh", "remat", "dtype", "end_of_document", "allow_noncausal"),
  *("grouping", "recipe", "prefix", "pattern", "variants", "attention", "d_ff"),
)


def _difference(one, other) -> str | None:
  """What of two architectures is not the same function of a token."""
  for field in dataclasses.fields(one):
    if field.name not in _OF_A_RUN:
      a, b = getattr(one, field.name), getattr(other, field.name)
      if a != b:
        return f"{field.name} is {b}, and would be {a}"
  for a, b in zip(one.layers, other.layers, strict=True):
    for x, y, what in (
      (a.partition("@")[0], b.partition("@")[0], "kind of a layer"),
      (one.attention_of(a), other.attention_of(b), "attention"),
    ):
      if x != y:
        return f"the {what} is {y}, and would be {x}"
  if "dense" in "".join(one.layers) and one.d_ff != other.d_ff:
    return f"d_ff is {other.d_ff}, and would be {one.d_ff}"
  return _difference_of_layers(one.recipe, other.recipe)


def _difference_of_layers(one, other):
  if other is None:
    return "it has no MoE layers"
  a, b = (_router(x) for x in (one, other))
  for name in sorted({*a, *b}):
    if a.get(name) != b.get(name):
      return (
        f"the router has {name} = {b.get(name)}, and would have {a.get(name)}"
      )
  for part in ("experts", "shared"):
    x, y = getattr(one, part), getattr(other, part)
    if (x is None) != (y is None):
      return f"{part} experts are there in one only"
    if x is not None and (x.activation, x.axes) != (y.activation, y.axes):
      return f"{part} experts are of another kind"
  selects = [_biases(x) for x in (one, other)]
  if selects[0] != selects[1]:
    return f"it has selection biases {selects[1]}, not {selects[0]}"
  return None


def _router(recipe):
  """Its options, those of training left out, in one of equal ways to say it."""
  _, options = registry.made_of(recipe.router)
  options = dict(options)
  for name in ("jitter", "noise", "init_scale", "precision", "second_expert"):
    options.pop(name, None)
  if (options.get("score"), options.get("score_before_top_k")) == (
    *("softmax", False),
  ):
    # Softmax over the chosen is softmax over all, over the sum of the chosen.
    options |= {"score_before_top_k": True, "renormalize": True}
  return options


def _biases(recipe):
  """Labels of the balancers with a state, which are those that select."""
  shapes = {
    label: jax.eval_shape(lambda b=b: b.init(recipe.num_experts))
    for label, b in recipe.balancers
  }
  return sorted(label for label, shape in shapes.items() if shape)


class _Layout:
  """Where each parameter of a model is among the tensors of a family."""

  def __init__(self, family: families.Family, model):
    self.family, self.model = family, model
    arch = model.arch
    shapes = nn.unbox(models.variables(model))
    self.shapes = traverse_util.flatten_dict(shapes, sep="/")
    self.shardings = None
    if arch.mesh is not None:
      self.shardings = traverse_util.flatten_dict(
        models.shardings(model), sep="/"
      )
    # Leaf -> (tensor, how to read) for those outside of layers.
    self.top = {
      "params/embedding": (family.embedding, False),
      "params/final_norm/scale": (family.final_norm, False),
    }
    if not arch.tie_embeddings:
      self.top["params/head"] = (family.head, True)
    # Leaf -> (kind of its layers, numbers of its layers), map and place in it.
    self.layers = {}
    for segment, pattern, repeats, first in arch.segments:
      for i, kind in enumerate(pattern):
        numbers = [first + i + r * len(pattern) for r in range(repeats)]
        for one in family.maps(arch, kind):
          for place, leaf in enumerate(one.leaves):
            collection = "params"
            if leaf.startswith("balance/"):
              collection, _, leaf = leaf.partition("/")
            self.layers[f"{collection}/{segment}/{i}/{leaf}"] = (
              one,
              place,
              numbers,
            )
    unmapped = set(self.shapes) ^ {*self.top, *self.layers}
    if unmapped:
      raise ConfigError(
        f"these parameters have no place in the files: {sorted(unmapped)}"
      )

  def names(self, one: families.Map, number: int) -> list[str]:
    """Tensors of a map in a layer, with a "{e}" in those of each expert."""
    prefix = self.family.layer.format(i=number)
    return [prefix + tensor for tensor in one.tensors]

  def expected(self) -> dict[str, tuple[int, ...]]:
    """{tensor: its shape} of all tensors of the model."""
    found = {}
    for leaf, (tensor, turned) in self.top.items():
      shape = self.shapes[leaf].shape
      found[tensor] = shape[::-1] if turned else shape
    num_experts = self.model.arch.recipe.num_experts
    for one, numbers, leaves in self._maps():
      tiny = [
        np.zeros(self.shapes[leaf].shape[1 + one.by_expert :], np.int8)
        for leaf in leaves
      ]
      shapes = [x.shape for x in one.write(*tiny)]
      for number in numbers:
        for tensor, shape in zip(self.names(one, number), shapes):
          if "{e}" in tensor:
            for e in range(num_experts):
              found[tensor.format(e=e)] = shape
          elif one.rows:
            found[tensor] = (num_experts * shape[0], *shape[1:])
          else:
            found[tensor] = (num_experts,) * one.by_expert + shape
    return found

  def _maps(self):
    """(map, its layers, its leaves) of every map."""
    found = {}
    for leaf, (one, place, numbers) in self.layers.items():
      key = id(one), numbers[0]
      _, _, leaves = found.setdefault(
        key, (one, numbers, [None] * len(one.leaves))
      )
      leaves[place] = leaf
    return found.values()

  def check(self, tensors: "_Tensors", left_out: tuple[str, ...]) -> None:
    """Raises ConfigError unless the files have just these tensors."""
    expected, names = self.expected(), set(tensors.files)
    extra = {n for n in names if n.startswith(left_out)} if left_out else set()
    if extra:
      logging.warning(
        "%s: %d tensors are left out, of parts that are not here: %s",
        *(tensors.path, len(extra), ", ".join(sorted(extra)[:3])),
      )
    if self.model.arch.tie_embeddings:
      extra |= {self.family.head} & names  # The embedding, once more.
    for what, kind, which in (
      ("lacks", "", expected.keys() - names),
      ("has", "unknown ", names - expected.keys() - extra),
    ):
      if which:
        raise ConfigError(
          f"{tensors.path} {what} {len(which)} {kind}tensors, such as"
          f" {', '.join(sorted(which)[:5])}; is config.json that of these files?"
        )
    for name, shape in expected.items():
      tensors.check(name, shape)

  def read(self, tensors: "_Tensors", dtype: str) -> dict:
    """All parameters, on their devices."""
    found = {}
    for leaf, shape in self.shapes.items():
      kind = jnp.dtype(dtype if leaf.startswith("params/") else "float32")
      sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
      if self.shardings is not None:
        sharding = self.shardings[leaf]

      def part(index, leaf=leaf, kind=kind):
        return np.asarray(self._part(tensors, leaf, index), kind)

      found[leaf] = jax.make_array_from_callback(shape.shape, sharding, part)
    return traverse_util.unflatten_dict(found, sep="/")

  def _part(self, tensors, leaf, index):
    """What a device holds of a parameter."""
    if leaf in self.top:
      tensor, turned = self.top[leaf]
      whole = tensors[tensor]
      return (whole.T if turned else whole)[index]
    one, place, numbers = self.layers[leaf]
    layers, *rest = index
    return np.stack(
      [
        self._layer(tensors, one, place, number, tuple(rest))
        for number in numbers[layers]
      ]
    )

  def _layer(self, tensors, one, place, number, index):
    names = self.names(one, number)
    if not one.by_expert:
      return one.read(*(tensors[name] for name in names))[place][index]
    experts, *rest = index
    num_experts = self.model.arch.recipe.num_experts
    found = []
    for e in range(num_experts)[experts]:
      parts = [tensors.of_expert(n, e, num_experts, one.rows) for n in names]
      found.append(one.read(*parts)[place][tuple(rest)])
    return np.stack(found)

  def write(self, folder: pathlib.Path, variables, max_shard_bytes: int):
    """Files of the tensors, and an index if they are several."""
    from safetensors.numpy import save_file

    leaves = traverse_util.flatten_dict(dict(variables), sep="/")
    makers = self._makers(leaves)
    size = jnp.dtype(self.model.arch.dtype).itemsize
    shards, room = [[]], max_shard_bytes
    for name, shape in self.expected().items():
      needs = size * int(np.prod(shape))
      if needs > room and shards[-1]:
        shards.append([])
        room = max_shard_bytes
      shards[-1].append(name)
      room -= needs
    names = [
      f"model-{i:05d}-of-{len(shards):05d}.safetensors"
      for i in range(1, len(shards) + 1)
    ]
    names = names if len(shards) > 1 else [_WHOLE]
    for file, tensors in zip(names, shards):
      arrays = {t: np.ascontiguousarray(makers[t]()) for t in tensors}
      save_file(arrays, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
      where = {t: f for f, tensors in zip(names, shards) for t in tensors}
      total = size * sum(int(np.prod(s)) for s in self.expected().values())
      index = {"metadata": {"total_size": total}, "weight_map": where}
      (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))

  def _makers(self, leaves):
    """{tensor: a function that makes it}."""
    found = {}
    for leaf, (tensor, turned) in self.top.items():

      def top(leaf=leaf, turned=turned):
        whole = np.asarray(leaves[leaf])
        return whole.T if turned else whole

      found[tensor] = top
    num_experts = self.model.arch.recipe.num_experts
    for one, numbers, names in self._maps():
      for r, number in enumerate(numbers):
        for place, tensor in enumerate(self.names(one, number)):

          def layer(e=None, one=one, r=r, names=names, place=place):
            index = (r,) if e is None else (r, e)
            parts = (np.asarray(leaves[name][index]) for name in names)
            return one.write(*parts)[place]

          def stacked(layer=layer, rows=one.rows):
            parts = [layer(e) for e in range(num_experts)]
            return np.concatenate(parts) if rows else np.stack(parts)

          if not one.by_expert:
            found[tensor] = layer
          elif "{e}" in tensor:
            for e in range(num_experts):
              found[tensor.format(e=e)] = lambda e=e, layer=layer: layer(e)
          else:
            found[tensor] = stacked
    return found


class _Tensors:
  """The tensors of a folder, read when they are asked for."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._opened = contextlib.ExitStack()
    self._handles = {}
    index = path / _INDEX
    if index.exists():
      self.files = self._indexed(index)
    elif (path / _WHOLE).exists():
      self.files = dict.fromkeys(self._handle(path / _WHOLE).keys(), _WHOLE)
    else:
      raise ConfigError(f"{path} has neither {_WHOLE} nor {_INDEX}")

  def _indexed(self, index):
    try:
      found = json.loads(index.read_text())["weight_map"]
      for name, file in found.items():
        if not re.fullmatch(r"[\w-][\w.-]*", file):
          raise ConfigError(
            f"{index} says that {name} is in {file!r}, which is not a file of"
            " this folder"
          )
    except (ValueError, KeyError, TypeError, AttributeError) as e:
      if isinstance(e, ConfigError):
        raise
      raise ConfigError(
        f"{index} is not an index of tensors ({first_line(e)}); get it anew"
      ) from None
    for name, file in found.items():
      if name not in set(self._handle(self.path / file).keys()):
        raise ConfigError(
          f"{self.path / file} lacks {name}, which {index} names"
        )
    return found

  def _handle(self, file):
    if file not in self._handles:
      try:
        from safetensors import SafetensorError, safe_open
      except ImportError:
        raise ConfigError(
          "reading safetensors needs the extra hf: pip install 'moe_jax[hf]'"
        ) from None
      try:
        handle = safe_open(file, framework="np")
        self._handles[file] = self._opened.enter_context(handle)
      except FileNotFoundError:
        raise ConfigError(
          f"{file} is missing, which the index of {self.path} names"
        ) from None
      except (SafetensorError, OSError, ValueError) as e:
        raise ConfigError(
          f"{file} is not a whole safetensors file ({first_line(e)}); get it"
          " anew"
        ) from None
    return self._handles[file]

  def _slice(self, name):
    return self._handle(self.path / self.files[name]).get_slice(name)

  def check(self, name: str, shape: tuple[int, ...]) -> None:
    """Raises ConfigError for another shape, or a dtype that is not read."""
    found = self._slice(name)
    where = f"{self.path / self.files[name]}: {name}"
    if tuple(found.get_shape()) != tuple(shape):
      raise ConfigError(
        f"{where} has shape {found.get_shape()}, and by config.json it is"
        f" {list(shape)}"
      )
    if found.get_dtype() not in _FLOATS:
      raise ConfigError(
        f"{where} has dtype {found.get_dtype()}, which is not read; convert it"
        f" to one of {', '.join(_FLOATS)}"
      )

  def __getitem__(self, name: str) -> np.ndarray:
    return self._slice(name)[:]

  def of_expert(self, name: str, e: int, num_experts: int, rows: bool):
    """What belongs to one expert, without its axis."""
    if "{e}" in name:
      return self[name.format(e=e)]
    found = self._slice(name)
    if not rows:
      return found[e : e + 1][0]
    each = found.get_shape()[0] // num_experts
    return found[e * each : (e + 1) * each]

  def close(self) -> None:
    """No more is read."""
    self._opened.close()
