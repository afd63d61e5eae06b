"""Switch Transformer (2101.03961): T5 with experts in every second layer.

A token goes to one expert, whose output is multiplied by the probability that
the router gave it. In training the router sees its input times U[0.99, 1.01],
and an expert has slots for 1.25 times its share of a group, in evaluation for
2.0. The router is in float32, the rest in bfloat16; weights begin with a tenth
of the usual variance. Base and Large are the checkpoints that were released,
with ReLU networks; XXL has GEGLU and an output layer of its own, and so has C,
where every layer has experts. C has the 32 heads of the paper; its published config
has 30.

The groups are 8192 tokens (Base), 4096 (Large, XXL) or 2048 (C) as in the
published configs; those of the targets are the whole rows of 114 tokens below.
The dense model beside Base is `t5_base`.

Fine-tuning has a constant learning rate, a dropout of 0.1, and 0.4 inside of experts:

  --config.optim.schedule=constant --config.optim.learning_rate=1e-3 \
  --config.model.dropout=0.1 --config.model.moe.expert_dropout=0.4

  python -m moe_jax.params --config=configs/switch.py:base_128
  python -m moe_jax.main --config=configs/switch.py:tiny --workdir=runs/switch
"""

import functools

from configs import published


def get_config(variant: str = "base_8"):
  experts = (8, 16, 32, 64, 128, 256)
  sizes = {f"base_{e}": functools.partial(_base, e) for e in experts}
  sizes |= {"large_128": _large, "xxl_128": _xxl, "c_2048": _c}
  return published.one_of(sizes | {"t5_base": _t5}, variant)


def _base(num_experts):
  c = published.encoder_decoder()
  c.model.update(d_model=768, num_layers=12, d_ff=3072)
  c.model.update(num_heads=12, num_kv_heads=12, head_dim=64)
  c.model.moe.update(num_experts=num_experts, top_k=1, d_expert=3072)
  c.model.moe.router = {"name": "top_k", "jitter": 0.01, "init_scale": 0.1}
  c.model.moe.balancers = {
    "load": {"name": "switch", "coefficient": 0.01, "scope": "group"}
  }
  published.groups_of(c.model, 8192, 64 * 114)
  return c


def _t5():
  c = _base(8)
  c.model.pattern = ("dense",)
  return c


def _large():
  c = _base(128)
  c.model.update(d_model=1024, num_layers=24, d_ff=4096)
  c.model.update(num_heads=16, num_kv_heads=16)
  c.model.moe.d_expert = 4096
  published.groups_of(c.model, 4096, 32 * 114)
  return c


def _xxl():
  c = _large()
  c.model.update(d_model=4096, num_heads=64, num_kv_heads=64)
  c.model.update(d_ff=10_240, activation="geglu")
  c.model.update(tie_embeddings=False, scale_output=False)
  c.model.moe.update(d_expert=10_240, activation="geglu")
  c.model.moe.update(min_capacity=2, eval_capacity_factor=4.0)
  return c


def _c():
  c = _base(2048)
  c.model.update(d_model=2080, num_layers=15, pattern=("moe",), d_ff=6144)
  c.model.update(num_heads=32, num_kv_heads=32)
  c.model.update(tie_embeddings=False, scale_output=False)
  c.model.moe.update(d_expert=6144, min_capacity=2, capacity_factor=1.0)
  published.groups_of(c.model, 2048, 16 * 114)
  return c
