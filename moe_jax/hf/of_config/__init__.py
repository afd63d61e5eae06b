"""Published weights without a description of their model, which a config has instead.

They are the checkpoints of V-MoE's public code, files of one prefix, and folders of one
network of Wan2.2.
"""

import pathlib

from moe_jax.hf.of_config import vmoe, vmoe_files, wan


def exists(path: str) -> bool:
  """Whether a path is the prefix of a checkpoint, which is no folder."""
  return vmoe_files.exists(path)


def load(path: str, model, fits: bool = True) -> dict | None:
  """The parameters, nested as those of the model of a config; None: others are there.

  Args:
    path: the prefix or the folder.
    model: of the config.
    fits: whether all shapes have to be the model's, also where it can adapt them.

  Raises:
    ConfigError: a damaged file; parameters that the model does not have, or lacking or
      of another size.
  """
  if vmoe_files.exists(path):
    return vmoe.load(path, model, fits)
  is_of_videos = hasattr(getattr(model, "arch", None), "video")
  if is_of_videos and any(pathlib.Path(path).glob("*.safetensors")):
    return wan.load(path, model)
  return None
