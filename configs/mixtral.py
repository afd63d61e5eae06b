"""Mixtral 8x7B and 8x22B (2401.04088).

Every layer has 8 experts, of which a token takes two: softmax over the two best
logits, which is softmax over all, over the sum of the two. Dropless. How its
pretraining was balanced is not published, so there is no balancer here; add one
to train.

  python -m moe_jax.params --config=configs/mixtral.py:8x7b
  python -m moe_jax.main --config=configs/mixtral.py:tiny --workdir=runs/mixtral
"""

from configs import published


def get_config(variant: str = "8x7b"):
  return published.one_of({"8x7b": _8x7b, "8x22b": _8x22b}, variant)


def _8x7b():
  c = published.decoder()
  c.model.vocab_size = 32_000
  c.model.d_model = 4096
  c.model.num_layers = 32
  c.model.num_heads = 32
  c.model.num_kv_heads = 8
  c.model.head_dim = 128
  c.model.rope_theta = 1e6
  c.model.moe.num_experts = 8
  c.model.moe.top_k = 2
  c.model.moe.d_expert = 14_336
  c.model.moe.router = {"name": "top_k", "score_before_top_k": False}
  return c


def _8x22b():
  c = _8x7b()
  c.model.d_model = 6144
  c.model.num_layers = 56
  c.model.num_heads = 48
  c.model.moe.d_expert = 16_384
  return c
