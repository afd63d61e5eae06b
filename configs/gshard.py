"""GShard (2006.16668): translation from 100 languages by up to 600B parameters.

Every second layer of encoder and decoder has experts. A token goes to two of
them, whose weights add up to 1, and to the second one with a probability of twice
its weight only. The balance loss counts first choices. An expert has slots for
the balanced load of a group, and all first choices take theirs before second ones,
in the decoder too, whose training therefore looks ahead. A group is the 2048 tokens
that each of 2048 devices has of a batch of 4 million. Everything is in float32.

The variants are those of the paper's table 1; "600b" has 2048 experts and 36
layers, 18 on each side. Source and target have vocabularies of their own in the
paper (64,000 and 32,000 tokens); here they share the data's tokenizer, and the
encoder an embedding of its own if the task says so. The paper does not tell its
positions, which are T5's here, nor the coefficient of its loss, which is Switch's.

  python -m moe_jax.params --config=configs/gshard.py:600b
  python -m moe_jax.main --config=configs/gshard.py:tiny --workdir=runs/gshard
"""

import functools

from configs import published


def get_config(variant: str = "600b"):
  sizes = {"600b": (2048, 36), "200b": (2048, 12), "150b": (512, 36)}
  sizes |= {"50b": (512, 12), "37b": (128, 36), "12b": (128, 12)}
  made = {k: functools.partial(_moe, *v) for k, v in sizes.items()}
  return published.one_of(made, variant)


def _moe(num_experts, layers):
  c = published.encoder_decoder()
  c.task = {"name": "translation", "label_smoothing": 0.1}
  c.data.update(name="python_functions", separate_documents=True)
  c.data.update(seq_len=1024, batch_size=4096)
  c.model.update(vocab_size=32_000, source_vocab_size=64_000)
  c.model.update(d_model=1024, num_layers=layers // 2, d_ff=8192)
  c.model.update(num_heads=16, num_kv_heads=16, head_dim=128)
  c.model.update(dropout=0.1, dtype="float32", init_scale=1.0)
  c.model.allow_noncausal = True
  moe = c.model.moe
  moe.update(num_experts=num_experts, top_k=2, d_expert=8192, init_scale=1.0)
  moe.update(capacity_factor=1.0, eval_capacity_factor=None, min_capacity=0)
  moe.dispatcher = {"name": "gather", "order": "choice"}
  moe.router = {
    "name": "top_k",
    "renormalize": True,
    "second_expert": "random",
  }
  load = {"name": "switch", "coefficient": 0.01, "scope": "group"}
  moe.balancers = {"load": {**load, "count": "first"}}
  c.optim.optimizer = {"name": "adafactor", "most": 0.99}
  published.groups_of(c.model, 2048, 2048)
  return c
