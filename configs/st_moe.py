"""ST-MoE-32B (2202.08906): an encoder-decoder that trains in a stable way.

In every fourth layer a token goes to two of 64 experts, and then passes another
dense network. In training the second expert is used with a probability of its share
over 0.2. A loss on the router's logits (z-loss) of 0.001 stands beside the balance
loss of 0.01. Experts have slots for 1.25 times the tokens of a group in
training and for 2.0 in evaluation: the paper does not multiply by the two choices,
so that the factors here are half of these. All first choices take their slots
before second ones, in the decoder too, whose training therefore looks ahead;
--config.model.moe.dispatcher.order=token and allow_noncausal=False would not. A group
has 4096 tokens, as in the published config; in the decoder it has 32 whole rows of 114
tokens.

Fine-tuning (4.2, 4.3) has a constant learning rate and dropout, and moves all
parameters or some of them, those of dense networks alone, for instance:

  --config.optim.schedule=constant --config.optim.learning_rate=1e-3 \
  --config.model.dropout=0.1 \
  --config.optim.learning_rate_factors="{'dense': 1.0, 'rest': 0.0}"

  python -m moe_jax.params --config=configs/st_moe.py:32b
  python -m moe_jax.main --config=configs/st_moe.py:tiny --workdir=runs/st_moe
"""

from configs import published


def get_config(variant: str = "32b"):
  return published.one_of({"32b": _32b}, variant)


def _32b():
  c = published.encoder_decoder()
  c.model.update(d_model=5120, num_layers=24, d_ff=20_480, activation="geglu")
  c.model.update(num_heads=64, num_kv_heads=64, head_dim=128)
  c.model.update(tie_embeddings=False, scale_output=False)
  c.model.pattern = ("dense", "dense", "dense", "moe+dense")
  moe = c.model.moe
  moe.update(num_experts=64, top_k=2, d_expert=20_480, activation="geglu")
  moe.update(capacity_factor=0.625, eval_capacity_factor=1.0)
  c.model.allow_noncausal = True
  moe.dispatcher = {"name": "gather", "order": "choice"}
  moe.router = {
    "name": "top_k",
    "renormalize": True,
    "second_expert": "random",
    "second_threshold": 0.2,
    "init_scale": 0.1,
  }
  load = {"name": "switch", "coefficient": 0.01, "scope": "group"}
  moe.balancers = {
    "load": {**load, "count": "first"},
    "z": {"name": "z_loss", "coefficient": 0.001},
  }
  published.groups_of(c.model, 4096, 32 * 114)
  return c
