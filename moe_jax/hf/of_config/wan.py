r"""Weights of Wan2.2's networks as their public code names them (safetensors).

  moe-jax sample --config=configs/wan2_2.py:t2v_a14b \
    --wan=HIGH_NOISE_FOLDER --wan_low=LOW_NOISE_FOLDER ...

Each folder has one network, which the config describes.
"""

import os
import pathlib
from collections.abc import Mapping

import numpy as np

from moe_jax.core.errors import ConfigError
from moe_jax.hf.of_config import by_layer

# {module there, with parameters weight and bias: matrix here}.
_OUTSIDE = {
  "patch_embedding": "patches",
  "text_embedding.0": "text_in",
  "text_embedding.2": "text_out",
  "time_embedding.0": "time_in",
  "time_embedding.2": "time_out",
  "time_projection.1": "modulate",
  "head.head": "head",
}
_LAYER = {"ffn.0": "mlp/up", "ffn.2": "mlp/down"}
_SCALES = {"norm3.weight": "cross_norm/scale", "norm3.bias": "cross_norm/bias"}
for _theirs, _ours in (("self_attn", "attention"), ("cross_attn", "cross")):
  for _short, _name in zip("qkvo", ("query", "key", "value", "out")):
    _LAYER[f"{_theirs}.{_short}"] = f"{_ours}/{_name}"
  for _short, _name in zip("qk", ("query", "key")):
    _SCALES[f"{_theirs}.norm_{_short}.weight"] = f"{_ours}/{_name}_norm/scale"


def _both(modules):
  """{name of a parameter there: path here} of matrices and their biases."""
  names = {f"{theirs}.weight": ours for theirs, ours in modules.items()}
  return names | {f"{k}.bias": f"{ours}_bias" for k, ours in modules.items()}


def files(folder: str | os.PathLike) -> list[pathlib.Path]:
  """Returns the files of a network; raises ConfigError if there are none."""
  found = sorted(pathlib.Path(folder).glob("*.safetensors"))
  if not found:
    raise ConfigError(
      f"{folder} has no *.safetensors; give the folder of one network, such as"
      " high_noise_model"
    )
  return found


def load(folder: str | os.PathLike, model) -> dict:
  """Returns the parameters of a network, nested as those of a model.

  Args:
    folder: with *.safetensors files.
    model: a `diffusion.Diffusion` of the same sizes.

  Raises:
    ConfigError: there are no such files, or parameters are missing or too many,
      or have other sizes.
  """
  arrays = _read(folder, lambda opened, name: opened.get_tensor(name))
  return to_params(arrays, model, str(folder))


def check(folder: str | os.PathLike, model) -> None:
  """Raises ConfigError as `load` does, and reads only names and sizes.

  Args:
    folder, model: as in `load`.
  """

  def nothing(opened, name):
    shape = opened.get_slice(name).get_shape()
    return np.broadcast_to(np.float32(0), shape)  # This takes no memory.

  args = _read(folder, nothing), _names(model), _here(model), model, str(folder)
  by_layer.placed(*args)


def _read(folder, one):
  """{name: one(file, name)} of all parameters in a folder."""
  try:
    from safetensors import SafetensorError, safe_open
  except ImportError:
    raise ConfigError(
      "reading safetensors needs the extra hf: pip install 'moe_jax[hf]'"
    ) from None
  arrays = {}
  for file in files(folder):
    try:
      with safe_open(file, framework="flax") as opened:
        for name in opened.keys():  # noqa: SIM118
          arrays[name] = np.asarray(one(opened, name))
    except (SafetensorError, OSError, ValueError) as e:
      raise ConfigError(
        f"{file} is no whole safetensors file ({e}); fetch it again"
      ) from e
  return arrays


def save(folder: str | os.PathLike, model, params: Mapping) -> None:
  """Writes a network with the names of Wan's code.

  Args:
    folder: to write to.
    model: a `diffusion.Diffusion`.
    params: of the model.
  """
  from safetensors.numpy import save_file

  pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
  arrays = of_params(params, model)
  arrays = {k: np.ascontiguousarray(x) for k, x in arrays.items()}
  save_file(
    arrays, pathlib.Path(folder) / "diffusion_pytorch_model.safetensors"
  )


def to_params(arrays: Mapping[str, np.ndarray], model, where: str) -> dict:
  """Returns parameters by Wan's names, nested as those of a model.

  Args:
    arrays: by Wan's names.
    model: as in `load`.
    where: they come from, for messages.
  """
  return by_layer.nested(arrays, _names(model), _here(model), model, where)


def _here(model):
  """Returns (array there, path here) -> the array in its shape here."""
  heads = _heads(model)

  def here(array, ours):
    if array.ndim == 5:  # [D, channels, frames, rows, columns] of a patch.
      return array.transpose(2, 3, 4, 1, 0).reshape(-1, len(array))
    if ours.endswith("modulation"):
      return array[0]
    array = array.T
    if ours.endswith(("/query", "/key", "/value")):
      return array.reshape(-1, *heads)
    if ours.endswith("/out"):
      return array.reshape(*heads, -1)
    if ours.endswith(("query_bias", "key_bias", "value_bias")):
      return array.reshape(heads)
    return array

  return here


def of_params(params: Mapping, model) -> dict[str, np.ndarray]:
  """Returns a model's parameters by Wan's names.

  Args:
    params, model: as in `save`.
  """
  arch, (heads, width) = model.arch, _heads(model)
  channels = arch.shape[3] + arch.more_channels

  def there(array, ours):
    if ours == "patches":
      patch = array.reshape(*arch.video.patch, channels, -1)
      return patch.transpose(4, 3, 0, 1, 2)
    if ours.endswith("modulation"):
      return array[None]
    if ours.endswith(("/query", "/key", "/value")):
      return array.reshape(-1, heads * width).T
    if ours.endswith("/out"):
      return array.reshape(heads * width, -1).T
    if ours.endswith(("query_bias", "key_bias", "value_bias")):
      return array.reshape(-1)
    return array.T

  return by_layer.flat(params, _names(model), there)


def _heads(model):
  """(H, h) of a model, which are equal in all its layers."""
  one = model.arch.each_layer[0].attention
  return one.num_heads, one.head_dim


def _names(model):
  """Yields the names of parameters, see `by_layer.names`."""
  names = {**_both(_LAYER), **_SCALES, "modulation": "modulation"}

  def of_layer(number, kind):
    del kind
    return {f"blocks.{number}.{theirs}": ours for theirs, ours in names.items()}

  outside = {**_both(_OUTSIDE), "head.modulation": "modulation"}
  return by_layer.names(model.arch.segments, outside, of_layer)
