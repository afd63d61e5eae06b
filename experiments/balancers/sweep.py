"""The arms: losses of four scopes, biases of four rules, quantiles and others.

All arms have one router, sigmoid scores over their sum, and drop nothing, so that
they spend the same operations. A step has four micro-batches of two groups of two
sequences: the four scopes of a loss see 128, 256, 512 and 2048 tokens.
"""

from experiments import small, sweeps, tuning, wang

BALANCERS = "model.moe.balancers"
SCOPES = ("sequence", "group", "micro_batch", "global_batch")
# The arms whose differences are the answer.
HEADLINE = (
  *("none", "micro_batch_1e-2", "global_batch_1e-2"),
  *("sign", "sign_sequence", "quantile"),
)
# A z-loss by itself, and beside the loss, the bias and quantiles.
Z_LOSS = ("z_loss_alone", "z_loss", "sign_z_loss", "quantile_z_loss")


def demo() -> sweeps.Sweep:
  """Minutes on two CPU cores: the arms of the headline, three seeds."""
  arms = {name: _arms()[name] for name in HEADLINE}
  return sweeps.Sweep(_dropless(small.demo_config(), group=128), arms, seeds=3)


def cpu() -> sweeps.Sweep:
  """The committed scale: about four hours on two CPU cores, a run on each.

  The learning rate is tuned for one arm of each kind, then the rates of the biases,
  for the lowest MaxVio over all of training.
  """
  alike = {
    **dict.fromkeys(_losses(), "micro_batch_1e-2"),
    **dict.fromkeys(("z_loss", "importance", "adaptive"), "micro_batch_1e-2"),
    **dict.fromkeys(_RATES, "sign"),
    "sign_sequence": "sign",
    **{"z_loss_alone": "none", "sign_z_loss": "sign"},
    "quantile_z_loss": "quantile",
    "simbal_1e-2": "simbal_1e-1",
  }
  alike = {arm: like for arm, like in alike.items() if arm != like}
  learning = tuning.Stage("optim.learning_rate", (3e-3, 1e-2, 3e-2), like=alike)
  rates = tuning.Stage(
    key={arm: f"{BALANCERS}.bias.rate" for arm in _RATES},
    values=_RATES,
    metric="whole/max_vio",
    like={"sign_sequence": "sign", "sign_z_loss": "sign"},
  )
  return sweeps.Sweep(
    _dropless(small.cpu_config(), group=256),
    _arms(),
    seeds=4,
    stages=(learning, rates),
    seeds_of=dict.fromkeys((*HEADLINE, *Z_LOSS), 8),
  )


def gpu() -> sweeps.Sweep:
  """One GPU: 10 million active parameters, 33 million tokens a run, in bfloat16.

  The arms of the headline, dropless and at a capacity factor of 1.25. Prepare the text
  as docs/data.md says under `installed_sources`, on any machine; then

    python -m experiments.launch balancers --scale=gpu --tune --minutes=8 \
      --config.data.dir=DIRECTORY/installed_sources/1.0.0

  and the same without --tune, as often as a machine is there.
  """
  c = _dropless(small.cpu_config(), group=2048)
  c.data.update(name="installed_sources", seq_len=512, batch_size=64)
  c.model.update(d_model=256, num_layers=8, d_ff=1024, dtype="bfloat16")
  c.model.update(num_heads=4, num_kv_heads=4, head_dim=64, remat="none")
  c.model.rope_theta = 10_000.0
  c.model.moe.update(num_experts=64, top_k=6, num_shared_experts=2)
  c.model.moe.d_expert = 160
  c.optim.update(learning_rate=4e-3, warmup_steps=100, weight_decay=0.1)
  c.optim.optimizer.b2 = 0.95
  c.train.num_steps = 1000
  layouts = {
    "dropless": {},
    "capacity": {
      "model.moe.capacity_factor": 1.25,
      "model.moe.dispatcher": {"name": "gather", "order": "token"},
    },
  }
  arms = sweeps.product(layouts, {name: _arms()[name] for name in HEADLINE})
  tuned = ("dropless-micro_batch_1e-2", "dropless-sign")
  alike = {a: tuned["sign" in a or "quantile" in a] for a in arms}
  alike = {arm: like for arm, like in alike.items() if arm not in tuned}
  learning = tuning.Stage("optim.learning_rate", (2e-3, 4e-3, 8e-3), like=alike)
  biases = [arm for arm in arms if "sign" in arm]
  rates = tuning.Stage(
    key={arm: f"{BALANCERS}.bias.rate" for arm in biases},
    values=(1e-3, 3e-3, 1e-2),
    metric="whole/max_vio",
    like={arm: "dropless-sign" for arm in biases if arm != "dropless-sign"},
  )
  stages = learning, rates
  return sweeps.Sweep(c, arms, seeds=4, stages=stages)


def pod() -> sweeps.Sweep:
  """The arms of the headline for the models of Wang et al., see `wang.py`.

  For 64 accelerators or more, on every host:

    python -m experiments.launch balancers --scale=pod --arm=1b-quantile \
      --config.data.name=NAME --config.data.dir=DIR \
      --config.data.tokenizer=tokenizer.json --config.mesh='(1,8,8,1)'

  Three micro-batches of a step make the scopes of a loss differ. A bias moves by
  1e-3 a step, as theirs.
  """
  config, arms = wang.config(), {name: _arms()[name] for name in HEADLINE}
  config.train.accumulation = 3
  for arm in arms.values():
    if "bias" in arm[BALANCERS]:
      bias = arm[BALANCERS]["bias"] | {"rate": 1e-3}
      arm[BALANCERS] = arm[BALANCERS] | {"bias": bias}
  return sweeps.Sweep(config, sweeps.product(wang.sizes(), arms), seeds=1)


SCALES = {"demo": demo, "cpu": cpu, "gpu": gpu, "pod": pod}

_RATES = {
  "sign": (3e-3, 1e-2, 3e-2, 1e-1),
  "proportional": (1e-2, 3e-2, 1e-1),
  "multiplicative": (1e-2, 3e-2, 1e-1, 3e-1),
  "pid": (1e-2, 3e-2, 1e-1),
}


def _dropless(config, group):
  c = config
  c.model.moe.tokens_per_group = group
  c.model.moe.capacity_factor = None
  c.model.moe.dispatcher = {"name": "sorted"}
  c.train.accumulation = 4
  return c


def _losses():
  """{arm: the balancers} of a switch loss in each scope, at two coefficients."""
  return {
    f"{scope}_{coefficient}": {
      "loss": {
        "name": "switch",
        "scope": scope,
        "coefficient": float(coefficient),
      }
    }
    for scope in SCOPES
    for coefficient in ("1e-2", "1e-3")
  }


def _biases():
  """{arm: the balancers} of a bias by each rule; the rates are tuned."""
  rules = {
    "sign": {"rule": "sign"},
    "proportional": {"rule": "proportional"},
    "multiplicative": {"rule": "sign", "form": "multiply"},
    "pid": {"rule": "pid", "gain": 0.01, "damping": 3e-3},
  }
  return {
    arm: {"bias": {"name": "bias", "rate": 1e-2, **rule}}
    for arm, rule in rules.items()
  }


def _arms() -> sweeps.Arms:
  losses, biases = _losses(), _biases()
  sequence = {"name": "switch", "scope": "sequence", "coefficient": 1e-4}
  z_loss = {"z_loss": {"name": "z_loss", "coefficient": 1e-3}}
  quantile = {"quantile": {"name": "quantile", "bins": 256}}
  importance = {"name": "cv_squared", "scope": "micro_batch"}
  by_arm = {
    "none": {},
    **losses,
    "z_loss_alone": z_loss,
    "z_loss": losses["micro_batch_1e-2"] | z_loss,
    "importance": {"importance": importance | {"coefficient": 1e-2}},
    "adaptive": {"loss": {"name": "adaptive", "target": 0.3}},
    **biases,
    "sign_sequence": biases["sign"] | {"sequence": sequence},
    "sign_z_loss": biases["sign"] | z_loss,
    "quantile": quantile,
    "quantile_z_loss": quantile | z_loss,
    "quantile_ema": {
      "quantile": {"name": "quantile", "bins": 256, "decay": 0.9}
    },
    "bip": {"bip": {"name": "bip", "top_k": 4}},
    **{
      f"simbal_{c}": {
        "apart": {"name": "orthogonality", "coefficient": float(c)}
      }
      for c in ("1e-1", "1e-2")
    },
  }
  arms = sweeps.over(BALANCERS, by_arm)
  arms["bip"]["model.allow_noncausal"] = True
  return arms
