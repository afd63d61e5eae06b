"""Tiny random weights with the outputs of Wan2.2's public model code.

  WAN=CHECKOUT python -m tests.wan_parity

writes tests/images/wan_*.npz anew. It needs torch, and a checkout of Wan-Video/Wan2.2, of
which it reads wan/modules/model.py alone; the tests need only the files. The
attention kernels of that code need a GPU, and torch's attention takes their place.
"""

import argparse
import importlib.util
import os
import pathlib
import sys
import types

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "images"
# (frames, rows, columns) of latents, M vectors of text, their width, and options.
CASES = {
  "wan_a": ((3, 4, 6), 5, 7, dict(in_dim=3, out_dim=3, dim=48, num_heads=4)),
  "wan_b": ((1, 6, 2), 4, 5, dict(in_dim=6, out_dim=2, dim=20, num_heads=2)),
}
CASES["wan_a"][3].update(ffn_dim=40, freq_dim=16, num_layers=2)
CASES["wan_b"][3].update(ffn_dim=24, freq_dim=8, num_layers=3, model_type="i2v")
BATCH = 2


def _attention(q, k, v, k_lens=None, window_size=(-1, -1)):
  import torch

  del k_lens, window_size  # All of the tiny videos are of full length.
  swapped = (x.transpose(1, 2).float() for x in (q, k, v))
  y = torch.nn.functional.scaled_dot_product_attention(*swapped)
  return y.transpose(1, 2)


def _model_class():
  """The class of the public code, without the libraries around it."""
  import torch

  names = "diffusers", "diffusers.configuration_utils", "diffusers.models"
  names += ("diffusers.models.modeling_utils", "wan_code", "wan_code.attention")
  made = {name: types.ModuleType(name) for name in names}
  made[names[1]].ConfigMixin = object
  made[names[1]].register_to_config = lambda init: init
  made[names[3]].ModelMixin = torch.nn.Module
  made["wan_code.attention"].flash_attention = _attention
  made["wan_code"].__path__ = []
  sys.modules.update(made)
  file = pathlib.Path(os.environ["WAN"]) / "wan/modules/model.py"
  spec = importlib.util.spec_from_file_location("wan_code.model", file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.WanModel


def _make(name, seed):
  import torch

  grid, length, width, options = CASES[name]
  torch.manual_seed(seed)
  model = _model_class()(text_len=length, text_dim=width, **options).eval()
  state = {
    k: x + 0.1 * torch.randn_like(x) for k, x in model.state_dict().items()
  }
  model.load_state_dict(state)
  channels = options["out_dim"]
  video = torch.randn(BATCH, channels, *grid)
  more = torch.randn(BATCH, options["in_dim"] - channels, *grid)
  text, time = torch.randn(BATCH, length, width), torch.tensor([0.93, 0.2])
  size = grid[0] * grid[1] * grid[2] // 4
  with torch.no_grad():
    y = [
      model(
        [video[i]],
        1000 * time[i : i + 1].expand(1),
        [text[i]],
        size,
        [more[i]] if more.shape[1] else None,
      )[0]
      for i in range(BATCH)
    ]
  last = lambda x: np.moveaxis(x.numpy(), 1, -1)  # noqa: E731
  arrays = {f"params/{k}": x.numpy() for k, x in state.items()}
  np.savez_compressed(
    FOLDER / f"{name}.npz",
    video=last(torch.cat([video, more], dim=1)),
    time=time.numpy(),
    text=text.numpy(),
    predicted=last(torch.stack(y)),
    **arrays,
  )
  print(
    name,
    sum(x.size for x in arrays.values()),
    float(torch.stack(y).abs().max()),
  )


def main(argv=None) -> int:
  argparse.ArgumentParser(
    prog="python -m tests.wan_parity",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  ).parse_args(argv)
  for seed, name in enumerate(CASES):
    _make(name, seed)
  return 0


if __name__ == "__main__":
  sys.exit(main())
