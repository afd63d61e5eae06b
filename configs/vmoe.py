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

The model and the optimizer follow vmoe/configs/vmoe_paper/common.py of the public code
(google-research/vmoe), and the batch size and the mixup follow pretrain_imagenet21k.py
in the same folder. The differences are:

  learning rate  It falls to 0 here, and to 1e-5 in both public files.
  weight decay   Only kernels decay here and in pretrain_imagenet21k.py; all parameters
                 decay in common.py.
  clipping       The gradient of H/14 alone is clipped, at a norm of 10, here and in
                 common.py; pretrain_imagenet21k.py clips it at 1 for all sizes.
  length         A run has 300,000 steps here, and 300 epochs in the public configs.
  images         RandAugment is left out here.
  model          pretrain_imagenet21k.py has 8 experts, no layer before the output, and
                 an initial bias of -10.

The classes are the 18,291 of JFT-300M, as in the paper's counts. Images of JFT cannot
be had; any TFDS dataset takes their place, as in

  python -m moe_jax.params --config=configs/vmoe.py:b_16
  python -m moe_jax.main --config=configs/vmoe.py:s_32 --workdir=runs/s_32 \
    --config.data.name=imagenet2012 --config.task.num_classes=1000 \
    --config.model.image.head_bias=-6.9
  python -m moe_jax.main --config=configs/vmoe.py:tiny --workdir=runs/vmoe

The checkpoints that were released have 8 experts, and are of these variants:

  imagenet_s_32      vmoe_s32_last2_ilsvrc2012_randaug_light1, trained on ILSVRC2012
  imagenet21k_b_16   vmoe_b16_imagenet21k_randaug_strong
  imagenet_b_16_384  vmoe_b16_imagenet21k_randaug_strong_ft_ilsvrc2012, on images of
                     384 pixels
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
  sizes["imagenet_s_32"] = _imagenet_s_32
  sizes["imagenet21k_b_16"] = _imagenet21k_b_16
  sizes["imagenet_b_16_384"] = _imagenet_b_16_384
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


def _imagenet_s_32():
  """S/32 from scratch on ILSVRC2012, but for its RandAugment."""
  c = _sparse("s", 32, last=2, experts=8)
  c.task.num_classes = 1000
  c.model.image.head_bias = -math.log(1000)
  c.model.moe.expert_dropout = 0.2
  c.data.batch_size = 8192
  c.optim.update(learning_rate=3e-3, clip_norm=1.0)
  return c


def _imagenet21k_b_16():
  """B/16 on ImageNet-21k, but for its RandAugment."""
  c = _sparse("b", 16, experts=8)
  c.task.num_classes = 21_843
  c.model.image.update(d_head=None, head_bias=-10.0)
  c.optim.clip_norm = 1.0
  return c


def _imagenet_b_16_384():
  """The same, fine-tuned on ILSVRC2012, but for its optimizer: SGD with momentum."""
  c = _imagenet21k_b_16()
  c.task.update(num_classes=1000, size=384, loss="softmax", crop=None)
  c.task.augment = {"area": (0.05, 1.0), "flip": True}
  c.model.image.head_bias = -math.log(1000)
  c.model.moe.capacity_factor = 1.5
  c.data.batch_size = 1024
  return c


def _sparse(name, patch, last=None, experts=32):
  """Experts in every second layer, or in the last so many of those."""
  c = _dense(name, patch)
  m, moe = c.model, c.model.moe
  m.pattern = ("dense", "moe")
  if last is not None:
    m.prefix = ("dense",) * (m.num_layers - 2 * last)
  moe.update(num_experts=experts, top_k=2, d_expert=m.d_ff, equal_experts=True)
  moe.tokens_per_group = "8 sequences"
  moe.update(capacity_factor=1.05, eval_capacity_factor=4.0)
  moe.update(capacity_rounding="ceil", capacity_multiple=4)
  moe.dispatcher = {"name": "gather", "order": "choice"}
  moe.router = {"name": "top_k", "noise": 1 / experts}
  both = {"name": "cv_squared", "coefficient": 0.005, "scope": "group"}
  moe.balancers = {
    "importance": {**both, "of": "importance"},
    "load": {**both, "of": "load"},
  }
  return c
