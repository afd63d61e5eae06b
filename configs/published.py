"""Shared by the configs of published models: their names, and `tiny`.

Their variants are sizes, and `tiny`: everything of the first size (attention,
layers, routing, balancing), but a few thousand parameters.
"""

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from configs import base
from moe_jax.core.errors import ConfigError, did_you_mean


def decoder() -> ConfigDict:
  """configs/base.py without the options that no published decoder has."""
  c = base.get_config()
  c.model.tie_embeddings = False
  c.model.scale_embedding = False
  c.model.norm_eps = 1e-5
  c.model.remat = "block"
  c.model.dtype = "bfloat16"
  c.model.moe.capacity_factor = None
  c.model.moe.dispatcher = {"name": "sorted"}
  c.data.seq_len = 4096
  return c


def encoder_decoder() -> ConfigDict:
  """T5 (1910.10683): its layers, span corruption, and optimizer.

  Inputs are of 512 tokens and their targets of 114. Each stack has one table of
  position biases, and scores are not scaled. Embeddings begin with a variance of 1.
  """
  c = decoder()
  c.task = {"name": "span_corruption", "z_loss": 1e-4}
  c.data.update(seq_len=512, batch_size=2048, separate_documents=False)
  c.model.update(name="encoder_decoder", vocab_size=32_128, norm_eps=1e-6)
  c.model.update(pattern=("dense", "moe"), activation="relu", init_scale=0.1)
  c.model.update(tie_embeddings=True, scale_output=True)
  c.model.embedding_variance = 1.0
  c.model.attention = {
    "rope": "none",
    "position_bias": "shared",
    "scale_scores": False,
  }
  moe = c.model.moe
  moe.update(activation="relu", init_scale=0.1, min_capacity=4)
  moe.update(capacity_factor=1.25, eval_capacity_factor=2.0)
  moe.dispatcher = {"name": "gather", "order": "token"}
  c.optim.update(learning_rate=1e-2, schedule="rsqrt", decay_steps=10_000)
  c.optim.update(warmup_steps=0, weight_decay=0.0, clip_norm=None)
  c.optim.optimizer = {"name": "adafactor"}
  c.eval.batch_size = 64  # Whole groups of every size below.
  c.train.num_steps = 550_000
  return c


def vision(
  d_model, d_ff, num_layers, num_heads, *, task, image, attention=None
) -> ConfigDict:
  """ViT (2010.11929) on images of 224 pixels, with layer norms and biases.

  They are the middle of an image, 224 of 256 pixels of its shorter side, in training
  too. The learning rate falls to 0 on a line after 10,000 steps of warm-up.
  """
  c = decoder()
  c.task = {"name": "classify_images", "size": 224, "channels": 3, **task}
  c.task.crop = 224 / 256
  c.data.update(name="imagenet2012", batch_size=4096)
  m = c.model
  m.update(name="vision", d_model=d_model, d_ff=d_ff, num_layers=num_layers)
  m.update(num_heads=num_heads, num_kv_heads=num_heads)
  m.head_dim = d_model // num_heads
  m.update(norm="layer_bias", norm_eps=1e-6, use_bias=True, activation="gelu")
  m.pattern, m.image = ("dense",), image
  m.attention = {"rope": "none", "bias": "all", **(attention or {})}
  m.moe.update(activation="gelu", use_bias=True)
  c.optim.optimizer = {"name": "adamw", "b2": 0.999}
  c.optim.update(warmup_steps=10_000, final_fraction=0.0, clip_norm=None)
  c.train.num_steps = 300_000
  c.optim.update(schedule="wsd", decay_steps=290_000)
  c.eval.batch_size = 64
  return c


def one_of(sizes: Mapping[str, Callable[[], ConfigDict]], variant: str):
  """The config of a size, or the first size shrunk.

  Raises:
    ConfigError: there is no such size.
  """
  if variant == "tiny":
    return shrunk(next(iter(sizes.values()))())
  if variant not in sizes:
    raise ConfigError(
      f'there is no variant "{variant}"'
      + did_you_mean(variant, [*sizes, "tiny"])
    )
  return sizes[variant]()


def groups_of(model: ConfigDict, inputs, targets) -> None:
  """Sets the tokens in a group of an encoder-decoder, on both sides."""
  if model.name == "encoder_decoder":
    model.moe.tokens_per_group = targets
    own = dict(model.encoder.get("moe", {})) | {"tokens_per_group": inputs}
    model.encoder.moe = own


def _of_digits(c):
  """Changes what a model of images or videos reads to images of 8 x 8 pixels."""
  c.data.name, m = "digits", c.model
  own = {"size": 8, "channels": 1, "num_classes": 10, "crop": None}
  m.update(vocab_size=None, d_model=32, head_dim=8)
  if m.name == "vision":
    own["augment"] = {"shift": 1}
    m.image.update(patch=2, head_bias=-2.0)
    if "d_head" in m.image:
      m.image.d_head = 32
  else:
    own |= {"shape": None, "text": None, "more_channels": 0, "shift": 3.0}
    m.video.num_waves = 16
  c.task = c.task.to_dict() | own
  c.optim.update(schedule="cosine", learning_rate=3e-3)


def shrunk(c: ConfigDict) -> ConfigDict:
  """The same in everything but its sizes."""
  m, moe = c.model, c.model.moe
  latent, many = "kv_lora_rank" in m.attention, m.num_kv_heads == m.num_heads
  m.update(vocab_size=288, d_model=16, num_heads=4, head_dim=4, d_ff=24)
  if m.name in ("vision", "diffusion"):
    _of_digits(c)
  m.num_kv_heads = 4 if latent or many else 2
  if m.source_vocab_size:
    m.source_vocab_size = 288
  m.prefix = m.prefix[:1]
  m.num_layers = len(m.prefix) + len(m.pattern)
  groups_of(m, "sequence", "sequence")
  m.dtype = "float32"
  moe.num_experts = 8
  moe.top_k = min(2, moe.top_k)
  # Published files of encoder-decoders have one width.
  moe.d_expert = m.d_ff if m.name == "encoder_decoder" else 8
  if "num_expert_groups" in moe.router:
    moe.router.update(num_expert_groups=4, top_expert_groups=2)
  for options in (m.attention, *m.variants.values()):
    for name, value in {
      "window": 6,
      "chunk": 6,
      "kv_lora_rank": 8,
      "q_lora_rank": 6,
      "rope_head_dim": 4,
      "v_head_dim": 4,
      "rotary_dim": 2,
    }.items():
      if options.get(name) is not None:
        options[name] = value
    if options.get("temperature"):
      scale, _, offset = options.temperature
      options.temperature = (scale, 8, offset)
    if options.get("rope_scaling"):
      options.rope_scaling.original_length = 16
  length = 128 if c.task.name == "translation" else 32
  c.data.update(seq_len=length, batch_size=8)
  c.eval.update(batch_size=8, batches_per_domain=1)
  c.optim.update(warmup_steps=1)
  c.train.num_steps = 4
  return c
