"""The arms: a decoder of codes of images and of text, and the same with experts.

`shared` has 8 experts, of which any token takes two. `split` has four for tokens of
images and four for text, and a token takes two of those of its modality (MoMa,
2407.21770, where experts choose tokens). `one_each` has a network for each modality
that is as wide as the dense one (as in Mixture-of-Transformers, 2411.04996, which has
attention of each modality too). All have equal FLOPs.
"""

from experiments import small, sweeps, tuning

FIRST = 128  # The first token of an image; its end is that of a document.
RANGES = {"text": (0, FIRST), "image": (FIRST, 256)}


def demo() -> sweeps.Sweep:
  """Minutes on two CPU cores: dense, shared and split, two seeds."""
  c = _config(small.demo_config(), d_ff=128)
  c.data.update(seq_len=256, batch_size=8)
  c.train.num_steps = 150
  arms = {name: _arms(c.model)[name] for name in ("dense", "shared", "split")}
  return sweeps.Sweep(c, arms, seeds=2)


def cpu() -> sweeps.Sweep:
  """The committed scale: about an hour on two CPU cores, a run on each.

  The learning rate is tuned for the dense model and for shared experts.
  """
  c = _config(small.cpu_config(), d_ff=128)
  c.data.update(seq_len=256, batch_size=16)
  c.train.num_steps = 500
  c.eval.update(every=100, batch_size=16, batches_per_domain=16)
  keys = dict.fromkeys(("dense", "shared"), "optim.learning_rate")
  like = {"split": "shared", "one_each": "dense"}
  rates = tuning.Stage(keys, (3e-3, 1e-2, 3e-2), metric="loss", like=like)
  return sweeps.Sweep(c, _arms(c.model), seeds=5, stages=(rates,))


def gpu() -> sweeps.Sweep:
  """A decoder of 116 million active parameters on a corpus of your own, 3 seeds.

  Its tokenizer has to have the codes of images behind the tokens of text, from 32,768
  on, as a VQ-VAE with 8,192 codes makes them.
  """
  c = _config(small.cpu_config(), d_ff=2048)
  c.task.token_ranges = {"text": (0, 32_768), "image": (32_768, 40_960)}
  c.data.update(name="images_and_text_of_your_own", seq_len=4096)
  c.data.batch_size = 256
  c.model.update(d_model=768, num_layers=12, num_heads=12, num_kv_heads=12)
  c.model.update(head_dim=64, rope_theta=10_000.0, dtype="bfloat16")
  c.optim.update(learning_rate=4e-4, warmup_steps=2000, weight_decay=0.1)
  c.train.update(num_steps=20_000, log_every=50)
  c.checkpoint.every = 1000
  c.eval.update(every=2000, batch_size=256, batches_per_domain=16)
  return sweeps.Sweep(c, _arms(c.model, first=32_768), seeds=3)


SCALES = {"demo": demo, "cpu": cpu, "gpu": gpu}


def _config(c, d_ff):
  """8 dropless experts in every layer, two of which are as wide as the dense network."""
  c.task = {"name": "next_token", "token_ranges": RANGES}
  c.data.name = "captioned_glyphs"
  c.model.update(prefix=(), pattern=("moe",), d_ff=d_ff)
  moe = c.model.moe
  moe.update(num_experts=8, top_k=2, d_expert=d_ff // 2, num_shared_experts=0)
  moe.capacity_factor = None
  moe.router = {"name": "top_k", "renormalize": True}
  moe.dispatcher = {"name": "sorted"}
  moe.balancers = {"loss": {"name": "switch", "coefficient": 1e-2}}
  return c


def _arms(m, first=FIRST) -> sweeps.Arms:
  by_modality = {
    "name": "by_feature",
    "feature": "token_id",
    "num_values": 2,
    "boundaries": (float(first),),
  }
  one_each = {
    "model.moe.router": by_modality,
    "model.moe.num_experts": 2,
    "model.moe.top_k": 1,
    "model.moe.d_expert": m.d_ff,
    "model.moe.balancers": {},
  }
  return {
    "dense": {"model.pattern": ("dense",)},
    "shared": {},
    "split": {"model.moe.router": by_modality | {"renormalize": True}},
    "one_each": one_each,
  }
