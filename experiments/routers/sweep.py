"""The arms: ways to choose experts, at equal total and active parameters.

All experts of a layer together are as wide as 8 dense layers, and a token passes as
much as one, whatever the number of experts is (DeepSeekMoE, 2401.06066, Table 1, has
16 and 2).
"""

from experiments import small, sweeps, tuning

HEADLINE = (
  *("dense", "hash", "switch", "gshard", "segmented", "deepseek", "fine"),
)
WIDTH = 128  # The hidden width of a dense layer.
_LOSS = {"name": "switch", "coefficient": 1e-2}


def demo() -> sweeps.Sweep:
  """Minutes on two CPU cores: the arms of DeepSeekMoE's table, two seeds."""
  arms = {name: _arms()[name] for name in HEADLINE}
  return sweeps.Sweep(_config(small.demo_config()), arms, seeds=2)


def cpu() -> sweeps.Sweep:
  """The committed scale: about two hours on two CPU cores, a run on each."""
  rates = tuning.Stage("optim.learning_rate", (3e-3, 1e-2, 3e-2))
  return sweeps.Sweep(
    _config(small.cpu_config()),
    _arms(),
    seeds=4,
    stages=(rates,),
    seeds_of=dict.fromkeys(HEADLINE, 8),
  )


SCALES = {"demo": demo, "cpu": cpu}


def _config(config):
  c = config
  c.model.d_ff = WIDTH
  c.model.moe.update(num_shared_experts=0, capacity_factor=None)
  c.model.moe.tokens_per_group = c.data.batch_size * c.data.seq_len
  c.model.moe.dispatcher = {"name": "sorted"}
  return c


def _moe(num_experts, top_k, router, balancers=None, **more):
  """An arm with experts of equal total and active width."""
  moe = {
    "num_experts": num_experts,
    "top_k": top_k,
    "d_expert": WIDTH * 8 // num_experts,
    "router": router,
    "balancers": {"load": _LOSS} if balancers is None else balancers,
    **more,
  }
  return {f"model.moe.{key}": value for key, value in moe.items()}


def _arms() -> sweeps.Arms:
  top_k = {"name": "top_k"}
  sigmoid = {"name": "top_k", "score": "sigmoid", "renormalize": True}
  second = {"renormalize": True, "second_expert": "random"}
  first = {"load": _LOSS | {"count": "first"}}
  threshold = {"t": {"name": "threshold", "share": 1 / 8}}
  l1 = {"l1": {"name": "l1", "experts": 4.0, "start": 1e-5}}
  copies = {"num_copy_experts": 8, "real_experts": 4.0}
  bias = {"name": "bias", "rate": 1e-2, "targets": ((32, 0.8), (8, 0.2))}
  noncausal = {"model.allow_noncausal": True}
  hashed = {"name": "hash", "vocab_size": 257, "weights": "equal"}
  return {
    "dense": {"model.pattern": ("dense",)},
    "hash": _moe(8, 1, hashed, {}),
    "switch": _moe(8, 1, top_k),
    "gshard": _moe(16, 2, top_k | second, first),
    "segmented": _moe(32, 4, top_k),
    # A shared expert is one of those of a token.
    "deepseek": _moe(31, 3, top_k) | _shared(),
    "fine": _moe(32, 4, sigmoid),
    # Weights that add up to 1 make the sum of narrow experts smaller than one wide one.
    "switch_scaled": _moe(8, 1, top_k | {"scale": 8.0}),
    "fine_scaled": _moe(32, 4, sigmoid | {"scale": 4.0}),
    "fine_bias": _moe(32, 4, sigmoid, {"bias": {"name": "bias", "rate": 1e-2}}),
    "expert_choice": _moe(32, 4, {"name": "expert_choice"}, {}) | noncausal,
    "relu": _moe(32, 12, {"name": "relu", "average": 4.0}, l1),
    "top_p": _moe(32, 8, {"name": "top_p", "threshold": 0.3, "average": 4.0}),
    "expert_threshold": _moe(
      *(32, 8, {"name": "expert_threshold", "average": 4.0}, threshold)
    ),
    "latent": _moe(32, 8, sigmoid, d_latent=32) | _narrow(),
    "copies": _moe(32, 5, sigmoid, {"bias": bias}, **copies),
    "random": _moe(32, 4, {"name": "random"}, {}),
  }


def _shared():
  return {
    "model.moe.num_shared_experts": 1,
    "model.moe.d_expert": WIDTH * 8 // 32,
  }


def _narrow():
  """Experts of half the width in and out: twice as many, twice the choices."""
  return {"model.moe.num_experts": 64, "model.moe.d_expert": WIDTH * 8 // 32}
