"""V-MoE (2106.05974): a vision transformer with experts in some layers.

Every second layer has 32 experts, or only the last of those do. A token goes to two of
them, whose probabilities among all experts are its weights; in training noise of 1/32
is added to the logits. Experts have slots for 1.05 times their share of a group of 8
images, rounded up to a multiple of 4, and for 4 times as many in evaluation. All
first choices take slots before the second ones. Two losses of 0.005 keep the
importance and the load of experts even, and all experts of a layer begin equal.

At evaluation batch priority routing gives the slots to the tokens with the highest
weights, so that fewer slots are enough (Batch Prioritized Routing, 3.2). It takes
other options than the run had:

  python -m moe_jax.evaluate --checkpoint=RUN \
    --config.model.moe.router.priority=score \
    --config.model.moe.eval_capacity_factor=0.5

The optimizer is that of the published configs for ImageNet-21k, whose RandAugment is
left out. The classes are the 18,291 of JFT-300M, as in the paper's counts. Images of
JFT cannot be had; any TFDS dataset takes their place, as in

  python -m moe_jax.params --config=configs/vmoe.py:b_16
  python -m moe_jax.main --config=configs/vmoe.py:s_32 --workdir=runs/s_32 \
    --config.data.name=imagenet2012 --config.task.num_classes=1000 \
    --config.model.image.head_bias=-6.9
  python -m moe_jax.main --config=configs/vmoe.py:tiny --workdir=runs/vmoe
"""

import functools
import math

from configs import published

CLASSES = 18_291
# Width, d_ff, layers, heads, and peak of the learning rate by size of a patch.
SIZES = {
  "s": (512, 2048, 8, 8, {32: 1e-3}),
  "b": (768, 3072, 12, 12, {32: 8e-4, 16: 8e-4}),
  "l": (1024, 4096, 24, 16, {32: 6e-4, 16: 4e-4}),
  "h": (1280, 5120, 32, 16, {14: 3e-4}),
}


def get_config(variant: str = "b_16"):
  sparse = functools.partial
  sizes = {"s_32": sparse(_sparse, "s", 32), "b_32": sparse(_sparse, "b", 32)}
  sizes |= {"b_16": sparse(_sparse, "b", 16), "l_16": sparse(_sparse, "l", 16)}
  sizes["l_32"] = sparse(_sparse, "l", 32, 2)
  sizes["h_14_last5"] = sparse(_sparse, "h", 14, 5)
  sizes["h_14_every2"] = sparse(_sparse, "h", 14)
  for name, patch in (("s", 32), ("b", 16), ("l", 32), ("l", 16), ("h", 14)):
    sizes[f"dense_{name}_{patch}"] = sparse(_dense, name, patch)
  return published.one_of(sizes, variant)


def _dense(name, patch):
  augment = {"area": (0.05, 1.0), "flip": True, "mixup": 0.5}
  c = published.vision(
    *SIZES[name][:4],
    task={"num_classes": CLASSES, "loss": "sigmoid", "augment": augment},
    image={
      "patch": patch,
      "d_head": SIZES[name][0],
      "head_bias": -math.log(CLASSES),
    },
  )
  c.optim.learning_rate = SIZES[name][4][patch]
  c.optim.weight_decay = 0.1
  if name == "h":
    c.optim.clip_norm = 10.0
  return c


def _sparse(name, patch, last=None):
  """Experts in every second layer, or in the last so many of those."""
  c = _dense(name, patch)
  m, moe = c.model, c.model.moe
  m.pattern = ("dense", "moe")
  if last is not None:
    m.prefix = ("dense",) * (m.num_layers - 2 * last)
  moe.update(num_experts=32, top_k=2, d_expert=m.d_ff, equal_experts=True)
  moe.tokens_per_group = "8 sequences"
  moe.update(capacity_factor=1.05, eval_capacity_factor=4.0)
  moe.update(capacity_rounding="ceil", capacity_multiple=4)
  moe.dispatcher = {"name": "gather", "order": "choice"}
  moe.router = {"name": "top_k", "noise": 1 / 32}
  both = {"name": "cv_squared", "coefficient": 0.005, "scope": "group"}
  moe.balancers = {
    "importance": {**both, "of": "importance"},
    "load": {**both, "of": "load"},
  }
  return c
