"""Wan2.2-A14B (2503.20314): two diffusion transformers, each for a range of noise.

The first network denoises while the noise is at least the boundary, 0.875 of the whole
in text-to-video and 0.9 in image-to-video, and the second one from there on. Each has
14.3 billion parameters, and only the one in use has to be in memory. In training each
sees its own timesteps: `task.expert` says which network a run is of.

A video is given as latents, which the VAE of Wan2.1 makes (16 channels; a fourth of the
frames, an eighth of rows and columns), and a text as the 512 vectors of umT5-XXL; neither is
built here. The shape below is that of 81 frames of 480 x 832 pixels. In image-to-video the
network reads 20 channels more: a mask, and the latents of the first frame.

How these networks were trained is not published beyond flow matching; optimizer and
batch are those of `published.py`. The shift of the noise is that of sampling.

  python -m moe_jax.params --config=configs/wan2_2.py:t2v_a14b
  python -m moe_jax.main --config=configs/wan2_2.py:tiny --workdir=runs/high
  python -m moe_jax.main --config=configs/wan2_2.py:tiny --workdir=runs/low \
    --config.task.expert=low
  python -m moe_jax.sample --checkpoint=runs/high --low=runs/low --out=samples
"""

from configs import published


def get_config(variant: str = "t2v_a14b"):
  return published.one_of({"t2v_a14b": _t2v, "i2v_a14b": _i2v}, variant)


def _t2v():
  c = published.decoder()
  c.task = {
    "name": "denoise",
    "shape": (21, 60, 104, 16),
    "text": (512, 4096),
    "shift": 12.0,
    "boundary": 0.875,
    "expert": "high",
    "guidance": (4.0, 3.0),
  }
  m = c.model
  m.update(name="diffusion", d_model=5120, d_ff=13_824, num_layers=40)
  m.update(num_heads=40, num_kv_heads=40, head_dim=128)
  m.update(norm="layer_bias", norm_eps=1e-6, use_bias=True, activation="gelu")
  m.pattern, m.video = ("dense",), {"patch": (1, 2, 2)}
  m.attention = {
    "bias": "all",
    "qk_norm": "projection",
    "rope": "interleaved",
    "rope_axes": 3,
  }
  c.data.update(name="latents", batch_size=64)
  c.optim.update(weight_decay=0.0, learning_rate=1e-4, schedule="constant")
  c.eval.batch_size = 8
  c.train.num_steps = 100_000
  return c


def _i2v():
  c = _t2v()
  c.task.update(shift=5.0, boundary=0.9, guidance=(3.5, 3.5))
  c.task.more_channels = 20
  return c
