"""Soft MoE (2308.00951): every slot of an expert is a weighted mean of all patches.

The second half of the layers has 128 experts with one slot each, for the 196 patches
of an image. There is no class token: the classes are told from the mean of the last
vectors. Queries and keys are normalised. `dense_*` are the transformers beside, and
`choice_*` have routers in which experts choose tokens (2202.09368), with as many slots
as tokens.

The configs follow vmoe/projects/soft_moe/configs/pretrain_jft4b.py of the public code
(google-research/vmoe), but for these differences:

  learning rate  Here it has no final fall to 0 in 50,000 steps.
  weight decay   In the router of Soft MoE, the directions of the slots decay here, and
                 their common scale decays there.
  noise          In training, the logits of `choice_*` get noise with a standard
                 deviation of 1/128 there (noise_std = 1.0). Our router `expert_choice`
                 has no noise.

  python -m moe_jax.params --config=configs/soft_moe.py:s_16
  python -m moe_jax.main --config=configs/soft_moe.py:tiny --workdir=runs/soft_moe
"""

import functools
import math

from configs import published

CLASSES = 29_593  # Of JFT-4B.
# Width, d_ff, layers and heads.
SIZES = {
  "s": (384, 1536, 12, 6),
  "b": (768, 3072, 12, 12),
  "l": (1024, 4096, 24, 16),
}


def get_config(variant: str = "s_16"):
  makers = {"": _soft, "dense_": _dense, "choice_": _choice}
  return published.one_of(
    {
      f"{prefix}{name}_16": functools.partial(make, name)
      for prefix, make in makers.items()
      for name in SIZES
    },
    variant,
  )


def _dense(name):
  augment = {"area": (0.05, 1.0), "flip": True}
  c = published.vision(
    *SIZES[name],
    task={"num_classes": CLASSES, "loss": "sigmoid", "augment": augment},
    image={"patch": 16, "pooling": "mean", "head_bias": -math.log(CLASSES)},
    attention={"qk_norm": "head_layer"},
  )
  c.optim.update(learning_rate=1e-3, schedule="rsqrt", decay_steps=10_000)
  c.optim.update(weight_decay=0.03, clip_norm=1.0)
  c.optim.weight_decay_factors = {"head": 100.0, "rest": 1.0}
  c.train.num_steps = 4_000_000
  return c


def _sparse(name):
  """Experts in the second half of the layers, which begin equal."""
  c = _dense(name)
  m = c.model
  m.prefix, m.pattern = ("dense",) * (m.num_layers // 2), ("moe",)
  m.moe.update(num_experts=128, d_expert=m.d_ff, equal_experts=True)
  m.moe.tokens_per_group = "sequence"
  return c


def _soft(name):
  c = _sparse(name)
  c.model.moe.top_k = 1  # Slots of an expert.
  slots = 128 / (224 // 16) ** 2  # For each patch.
  c.model.moe.router = {"name": "soft", "normalize": True, "average": slots}
  return c


def _choice(name):
  c = _sparse(name)
  c.model.moe.top_k = 1
  c.model.moe.router = {"name": "expert_choice", "rounding": "round"}
  return c
