"""Weights of V-MoE and Soft MoE as their public code names and stores them.

  moe-jax train --config=configs/vmoe.py:s_32 --config.init_from=PREFIX
  ...

A checkpoint is the files PREFIX.index and PREFIX.data-00000-of-00001, ... Only
parameters are read; no file describes the model, which the config does.
"""

from collections.abc import Mapping

import numpy as np

from moe_jax.core.errors import ConfigError
from moe_jax.hf.of_config import by_layer, vmoe_files
from moe_jax.moe.types import Mixture

_SCALE = "router/scale"  # A number there, and a vector of length 1 here.

# Names of a parameter there and here; in a layer, "L/" stands for the layer's path.
_OUTSIDE = {
  "embedding/kernel": "patches",
  "embedding/bias": "patches_bias",
  "cls": "class_token",
  "Encoder/posembed_input/pos_embedding": "positions",
  "Encoder/encoder_norm/scale": "final_norm/scale",
  "Encoder/encoder_norm/bias": "final_norm/bias",
  "pre_logits/kernel": "before_head",
  "pre_logits/bias": "before_head_bias",
  "head/kernel": "head",
  "head/bias": "head_bias",
}
_LAYER = {
  "SelfAttention/query_ln/scale": "attention/query_norm/scale",
  "SelfAttention/key_ln/scale": "attention/key_norm/scale",
  "Moe/Router/scale": "moe/router/scale",
}
for _theirs, _ours in (("LayerNorm_0", "attention"), ("LayerNorm_1", "ffn")):
  for _kind in ("scale", "bias"):
    _LAYER[f"{_theirs}/{_kind}"] = f"{_ours}_norm/{_kind}"
for _name in ("query", "key", "value", "out"):
  _LAYER[f"SelfAttention/{_name}/kernel"] = f"attention/{_name}"
  _LAYER[f"SelfAttention/{_name}/bias"] = f"attention/{_name}_bias"
for _place, _network in (("Mlp", "mlp"), ("Moe/Mlp", "moe/experts")):
  for _dense, _name in (("Dense_0", "up"), ("Dense_1", "down")):
    _LAYER[f"{_place}/{_dense}/kernel"] = f"{_network}/{_name}"
    _LAYER[f"{_place}/{_dense}/bias"] = f"{_network}/{_name}_bias"


def load(prefix: str, model, fits: bool = True) -> dict:
  """Returns the parameters of a checkpoint, nested as those of a model.

  Args:
    prefix: of its files, without ".index".
    model: a `vision.Vision`, which has the same layers.
    fits: its places and classes have to be the model's too; otherwise the
      caller has them adapted, see `Vision.adapted`.

  Raises:
    ConfigError: the files are damaged, or parameters are missing or too many.
  """
  arrays = vmoe_files.read(prefix)
  if not hasattr(getattr(model, "arch", None), "image"):
    raise ConfigError(
      f"{prefix} is a checkpoint of V-MoE, for model.name = vision alone; change one"
    )
  params = [name for name in arrays if name.startswith("params/")]
  if params:  # The file has a train state; else the parameters alone.
    arrays = {name.removeprefix("params/"): arrays[name] for name in params}
  return to_params(arrays, model, prefix, fits)


def save(prefix: str, model, params: Mapping) -> None:
  """Writes parameters in the files of V-MoE's code.

  Args:
    prefix: of the files to write.
    model: a `vision.Vision`.
    params: of the model.
  """
  arrays = of_params(params, model)
  vmoe_files.write(prefix, {f"params/{k}": x for k, x in arrays.items()})


def to_params(
  arrays: Mapping[str, np.ndarray], model, where: str, fits: bool = True
) -> dict:
  """Returns parameters by V-MoE's names, nested as those of a model.

  Args:
    arrays: by V-MoE's names.
    model, fits: as in `load`.
    where: they come from, for messages.
  """
  free = () if fits else ("positions", "head", "head_bias")
  return by_layer.nested(arrays, _names(model), _here, model, where, free)


def of_params(params: Mapping, model) -> dict[str, np.ndarray]:
  """Returns a model's parameters by V-MoE's names.

  Args:
    params, model: as in `save`.
  """
  arch = model.arch
  patch = arch.image.patch, arch.image.patch, arch.shape[2], arch.d_model

  def there(array, ours):
    shape = patch if ours == "patches" else array.shape
    return array.reshape(() if ours.endswith(_SCALE) else shape)

  return by_layer.flat(params, _names(model), there)


def _here(array, ours):
  """An array in its shape here."""
  if ours == "patches":
    return array.reshape(-1, array.shape[-1])
  return array.reshape(1) if ours.endswith(_SCALE) else array


def _names(model):
  """Yields the names of parameters, see `by_layer.names`."""

  def of_layer(number, kind):
    recipe = model.arch.layer(kind).recipe
    soft = recipe is not None and recipe.router.form is Mixture
    kernel = "mu" if soft else "dense/kernel"
    names = {f"Moe/Router/{kernel}": "moe/router/kernel", **_LAYER}
    block = f"Encoder/encoderblock_{number}"
    return {f"{block}/{theirs}": ours for theirs, ours in names.items()}

  return by_layer.names(model.arch.segments, _OUTSIDE, of_layer)
