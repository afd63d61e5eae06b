"""Published weights in folders that do not describe their model: a config does.

They are the checkpoints of V-MoE's public code, files of one prefix, and
folders of one network of Wan2.2.
"""

import pathlib

from moe_jax.hf.of_config import vmoe, vmoe_files, wan


def exists(path: str) -> bool:
  """Whether a path is the prefix of a checkpoint, which is no folder."""
  return vmoe_files.exists(path)


def load(path: str, model, fits: bool = True) -> dict | None:
  """Returns the parameters for a config's model; None: there are other files.

  Args:
    path: the prefix or the folder.
    model: of the config.
    fits: whether all shapes have to be the model's, even those it can adapt.

  Returns:
    The parameters, nested as those of the model.

  Raises:
    ConfigError: a file is damaged; or parameters are missing, too many, or of
      another size.
  """
  if vmoe_files.exists(path):
    return vmoe.load(path, model, fits)
  is_of_videos = hasattr(getattr(model, "arch", None), "video")
  if is_of_videos and any(pathlib.Path(path).glob("*.safetensors")):
    return wan.load(path, model)
  return None
