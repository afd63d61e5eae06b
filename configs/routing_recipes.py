"""The routing of models whose other parts are not here, on the decoder of base.py.

  longcat_flash  512 networks and 256 copies, of which a token takes twelve, eight of
                 them networks on average; softmax scores times 6, not renormalised; a
                 bias whose target is that number (LongCat-Flash, 2509.01322, 2.1). Its
                 blocks have two attentions and a dense network beside the experts. Its
                 copies have no bias, and a loss over devices takes them for a group of
                 their own; here copies get equal shares by a bias, without that loss.
  deepseek_v4    hash routing in the first three layers, then sqrt-softplus scores over
                 their sum, times 1.5; six of 256 experts and a shared one; a bias, and
                 a loss of 1e-4 over sequences (DeepSeek-V4, 2606.19348). Its attention
                 is compressed and sparse, and its residual stream is widened.

  python -m moe_jax.main --config=configs/routing_recipes.py:longcat_flash \
    --workdir=runs/longcat
"""

from configs import base
from moe_jax.core.errors import ConfigError, did_you_mean


def get_config(variant: str = "longcat_flash"):
  variants = {"longcat_flash": _longcat_flash, "deepseek_v4": _deepseek_v4}
  if variant not in variants:
    raise ConfigError(
      f'there is no variant "{variant}"' + did_you_mean(variant, variants)
    )
  c = base.get_config()
  c.model.moe.capacity_factor = None
  c.model.moe.dispatcher = {"name": "sorted"}
  c.model.moe.d_expert = 32
  variants[variant](c)
  return c


def _longcat_flash(c):
  c.model.moe.update(num_experts=512, num_copy_experts=256, top_k=12)
  c.model.moe.real_experts = 8.0
  c.model.moe.router = {"name": "top_k", "scale": 6.0}
  bias = {"name": "bias", "rule": "proportional", "rate": 1e-3}
  bias["targets"] = ((512, 8 / 12), (256, 4 / 12))
  c.model.moe.balancers = {"bias": bias}


def _deepseek_v4(c):
  scores = {"score": "sqrt_softplus", "renormalize": True, "scale": 1.5}
  c.model.moe.update(num_experts=256, top_k=6, num_shared_experts=1)
  c.model.moe.router = {"name": "top_k", **scores}
  c.model.moe.balancers = {
    "bias": {"name": "bias", "rate": 1e-3},
    "load": {"name": "switch", "coefficient": 1e-4, "scope": "sequence"},
  }
  table = {"name": "hash", "vocab_size": 257, **scores}
  c.model.variants = {"hash": {"moe": {"router": table, "balancers": {}}}}
  c.model.num_layers = 6
  c.model.prefix = ("moe@hash",) * 3
