"""NLLB-MoE-54B (2207.04672): translation between 200 languages.

Every fourth layer of encoder and decoder has 128 experts, of which a token takes
two. The weights of those that have a slot for it add up to 1. In training an expert has
slots for the balanced load, in evaluation for all tokens. Networks, projections and
norms have biases; positions are sinusoids. The tokens of a row share slots here; the
paper does not say how many do. In training a whole output of the experts
is 0 with a chance of 0.2 (expert output masking).

  python -m moe_jax.params --config=configs/nllb_moe.py:54b
  python -m moe_jax.main --config=configs/nllb_moe.py:tiny --workdir=runs/nllb
"""

from configs import published


def get_config(variant: str = "54b"):
  return published.one_of({"54b": _54b}, variant)


def _54b():
  c = published.encoder_decoder()
  c.task = {"name": "translation", "label_smoothing": 0.1}
  c.data.update(name="python_functions", separate_documents=True)
  c.data.update(seq_len=512, batch_size=2048)
  m, moe = c.model, c.model.moe
  m.update(vocab_size=256_206, scale_embedding=True, scale_output=False)
  m.update(d_model=2048, num_layers=24, d_ff=8192, use_bias=True)
  m.update(num_heads=16, num_kv_heads=16, head_dim=128)
  m.update(norm="layer_bias", norm_eps=1e-5, positions="sinusoidal")
  m.update(dropout=0.3, attention_dropout=0.1, hidden_dropout=0.0)
  m.update(embedding_variance=None, init_scale=1.0, allow_noncausal=True)
  m.pattern = ("dense", "dense", "dense", "moe")
  m.attention = {"rope": "none", "bias": "all"}
  moe.update(num_experts=128, top_k=2, d_expert=8192, use_bias=True)
  moe.update(capacity_factor=1.0, eval_capacity_factor=64.0)
  moe.update(capacity_rounding="ceil", min_capacity=0, init_scale=1.0)
  moe.dispatcher = {"name": "gather", "order": "choice", "renormalize": True}
  moe.router = {"name": "top_k", "renormalize": True, "output_masking": 0.2}
  load = {"name": "switch", "coefficient": 0.01, "scope": "micro_batch"}
  moe.balancers = {"load": {**load, "count": "first"}}
  c.optim.update(learning_rate=2e-3, warmup_steps=8000, decay_steps=8000)
  c.optim.optimizer = {"name": "adamw", "b2": 0.98, "eps": 1e-6}
  c.train.num_steps = 300_000
  return c
