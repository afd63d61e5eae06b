"""The arms: sizes of a model, dense and with 2 to 64 experts, one per token.

Every second layer has experts, as in Switch (2101.03961) and in the routed
language models of Clark et al. (2202.01169): a token passes one, of the width
of the dense layer, so that only the router adds to the active parameters.
"""

from experiments import small, sweeps, tuning

DENSE = "dense"


def demo() -> sweeps.Sweep:
  """Minutes on two CPU cores."""
  config = cpu_config()
  config.data.seq_len = 64
  config.train.num_steps = 150
  config.eval.every = 15
  return sweeps.Sweep(config, arms((16, 32, 64), (4, 16)), seeds=1)


def cpu() -> sweeps.Sweep:
  """The committed scale: under three hours on two CPU cores, a run on each.

  The learning rate is tuned for the dense model of each size, for 8 experts
  and for 64; other numbers of experts take that of 8. What is tried goes on
  where the best was at an end, and starts higher for the smallest size.
  """
  sizes, experts = (16, 32, 48, 64), (2, 4, 8, 16, 32, 64)
  tried = {
    DENSE: (3e-3, 6e-3, 1.2e-2, 2.4e-2),
    8: (1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2),
    64: (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2),
  }
  tuned = {name(d, e): tried[e] for d in sizes for e in tried}
  tuned |= {name(16, e): tried[e][-3:] for e in tried}
  others = {name(d, e): name(d, 8) for d in sizes for e in experts}
  rates = tuning.Stage(
    dict.fromkeys(tuned, "optim.learning_rate"),
    tuned,
    like={arm: source for arm, source in others.items() if arm not in tuned},
  )
  return sweeps.Sweep(
    cpu_config(),
    arms(sizes, experts),
    seeds=3,
    stages=(rates,),
    seeds_of={name(d, e): 5 for d in sizes for e in tried},
  )


def pod() -> sweeps.Sweep:
  """The width of T5-Base and Switch-Base, 768, and one on each side of it.

  One decoder of 12 layers, where they have an encoder and a decoder of 12, and
  dropless. For 64 accelerators or more, and text of your own in place of C4:

    python -m experiments.launch scaling --scale=pod --arm=768-64 \
      --config.data.name=NAME --config.data.dir=DIR \
      --config.data.tokenizer=tokenizer.json --config.mesh='(1,8,8,1)'

  on every host.
  """
  c = cpu_config()
  c.data.update(name="text_of_your_own", seq_len=512, batch_size=2048)
  c.model.update(num_layers=12, activation="relu", rope_theta=10_000.0)
  c.model.dtype = "bfloat16"
  c.model.moe.update(activation="relu", init_scale=0.1, tokens_per_group=4096)
  c.optim.optimizer = {"name": "adafactor"}
  c.optim.update(warmup_steps=10_000, learning_rate=1e-2)
  c.train.update(num_steps=100_000, log_every=100)
  c.checkpoint.every = 1000
  c.eval.update(every=1000, batch_size=2048)
  return sweeps.Sweep(
    c, arms((512, 768, 1024), (8, 16, 32, 64, 128), head_dim=64), seeds=1
  )


SCALES = {"demo": demo, "cpu": cpu, "pod": pod}


def name(d_model: int, experts: int | str) -> str:
  """Name of an arm: its width, and the number of experts or "dense"."""
  return f"{d_model}-{experts}"


def arms(sizes, experts, head_dim=16) -> sweeps.Arms:
  """Each width dense and with each number of experts."""
  widths = {
    str(d): {
      "model.d_model": d,
      "model.num_heads": d // head_dim,
      "model.num_kv_heads": d // head_dim,
      "model.head_dim": head_dim,
      "model.d_ff": 4 * d,
      "model.moe.d_expert": 4 * d,
    }
    for d in sizes
  }
  kinds = {DENSE: {"model.pattern": (DENSE, DENSE)}}
  kinds |= {str(e): {"model.moe.num_experts": e} for e in experts}
  return sweeps.product(widths, kinds)


def cpu_config():
  """Two layers, top-1, dropless, with the loss of Switch."""
  c = small.cpu_config()
  c.model.update(num_layers=2, prefix=(), pattern=(DENSE, "moe"))
  c.model.moe.update(top_k=1, num_shared_experts=0)
  c.model.moe.tokens_per_group = "sequence"
  c.model.moe.capacity_factor = None  # Dropless.
  c.model.moe.router = {"name": "top_k"}
  c.model.moe.dispatcher = {"name": "sorted"}
  c.model.moe.balancers = {"loss": {"name": "switch", "coefficient": 1e-2}}
  # The rate after the warm-up does not depend on the run's length, so that the
  # step at which a loss is reached means something.
  c.optim.schedule = "constant"
  c.train.num_steps = 2000
  c.eval.update(every=100, batches_per_domain=8)
  return c
