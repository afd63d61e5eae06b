"""Tiny random weights with the outputs of V-MoE's public code.

  PYTHONPATH=VMOE:VISION_TRANSFORMER:. python -m tests.vision_parity

writes tests/images/ anew. It needs checkouts of google-research/vmoe and of
google-research/vision_transformer; the tests need only the files. There is noise in
one case alone, whose file has the noise too.
"""

import argparse
import pathlib
import sys
from unittest import mock

import numpy as np

from configs import base

FOLDER = pathlib.Path(__file__).parent / "images"
IMAGES = 6  # In every file.

# What differs from `_setting`: tokens in a group are those of whole images.
CASES = {
  # Ample and tight capacity, with and without batch priority.
  "ample": {},
  "ample_priority": {"priority": True},
  "tight": {"capacity": 0.6, "multiple": 1},
  "tight_priority": {"capacity": 0.6, "multiple": 1, "priority": True},
  "scarce_priority": {"capacity": 0.2, "multiple": 1, "priority": True},
  "last": {"layers": (3,), "num_layers": 4, "per_group": 2, "capacity": 1.05},
  "one_expert": {"top_k": 1, "capacity": 1.25, "per_group": 6},
  "no_head": {"d_head": None, "classifier": "gap", "position": "sincos2d"},
  "normed": {"qk_norm": True, "position": "none", "shape": (6, 9, 1)},
  "choice": {
    "router": "choice",
    "multiple": 1,
    "capacity": 1.0,
    "classifier": "gap",
  },
  "soft": {"router": "soft", "slots": 2, "classifier": "gap", "per_group": 1},
  "soft_normed": {
    "router": "soft",
    "slots": 1,
    "qk_norm": True,
    "per_group": 1,
  },
  # As in training: with noise, of which the load loss is made.
  "noisy": {"noise": 1.0, "capacity": 1.05},
}
# The weights of the two losses differ, so that they cannot be taken for each other.
WEIGHTS = {"importance": 1.0, "load": 2.0}


def setting(name: str) -> dict:
  """The whole setting of a case."""
  own = dict(shape=(9, 6, 3), patch=3, d_model=24, d_ff=20, num_heads=3)
  own |= dict(num_layers=2, layers=(1,), num_experts=5, top_k=2, per_group=3)
  own |= dict(capacity=1.5, multiple=4, priority=False, router="top_k")
  own |= dict(classifier="token", position="learned", d_head=24, qk_norm=False)
  own |= dict(noise=0.0)
  return own | CASES[name]


def tokens(s) -> int:
  """Tokens of an image."""
  rows, columns = (n // s["patch"] for n in s["shape"][:2])
  return rows * columns + (s["classifier"] == "token")


def losses(s) -> list[str]:
  """The balancing losses of a setting."""
  if s["router"] != "top_k":
    return []
  return ["importance", "load"] if s["noise"] else ["importance"]


def section(s) -> dict:
  """The section `model` of a setting."""
  m = base.get_config().model
  pattern = tuple(
    "moe" if i in s["layers"] else "dense" for i in range(s["num_layers"])
  )
  with m.unlocked():
    m.update(name="vision", d_model=s["d_model"], d_ff=s["d_ff"])
    m.update(num_layers=s["num_layers"], pattern=pattern, norm="layer_bias")
    m.update(num_heads=s["num_heads"], num_kv_heads=s["num_heads"])
    m.update(head_dim=s["d_model"] // s["num_heads"], use_bias=True)
    m.activation = m.moe.activation = "gelu"
    m.attention = {"rope": "none", "bias": "all"}
    if s["qk_norm"]:
      m.attention.qk_norm = "head_layer"
    m.image = {
      "patch": s["patch"],
      "pooling": {"token": "token", "gap": "mean"}[s["classifier"]],
      "positions": {"sincos2d": "waves"}.get(s["position"], s["position"]),
      "d_head": s["d_head"],
    }
    moe = m.moe
    moe.update(num_experts=s["num_experts"], top_k=s["top_k"], use_bias=True)
    moe.update(d_expert=s["d_ff"], tokens_per_group=tokens(s) * s["per_group"])
    moe.update(capacity_factor=s["capacity"], capacity_rounding="ceil")
    moe.capacity_multiple = s["multiple"]
    moe.dispatcher = {"name": "gather", "order": "choice"}
    moe.router = {"name": "top_k"}
    if s["priority"]:
      moe.router.priority = "score"
    moe.balancers = {
      of: {"name": "cv_squared", "coefficient": WEIGHTS[of], "of": of}
      for of in losses(s)
    }
    if s["noise"]:
      moe.router.noise = s["noise"] / s["num_experts"]
    if s["router"] == "choice":
      moe.router = {"name": "expert_choice", "rounding": "round"}
      moe.top_k, moe.balancers = 1, {}
      moe.capacity_factor, moe.capacity_multiple = None, 1
    if s["router"] == "soft":
      moe.router, moe.top_k = {"name": "soft", "normalize": True}, s["slots"]
      moe.capacity_factor, moe.balancers = None, {}
      moe.capacity_multiple = 1
  return m.to_dict()


def _theirs(s):
  """The model of a setting in V-MoE's code."""
  from vmoe.nn import vit_moe

  dispatcher = {"name": "einsum", "capacity_factor": s["capacity"]}
  dispatcher["capacity_multiple_of"] = s["multiple"]
  router = {"num_selected_experts": s["top_k"], "noise_std": s["noise"]}
  router["deterministic"] = not s["noise"]
  router |= {f"{of}_loss_weight": weight for of, weight in WEIGHTS.items()}
  router["dispatcher"] = {**dispatcher, "batch_priority": s["priority"]}
  if s["router"] == "choice":
    name = "NoisyTopItemsPerExpertRouter"
    dispatcher["capacity_ceil_or_round"] = "round"
    router = {"name": name, "noise_std": 0.0, "dispatcher": dispatcher}
  if s["router"] == "soft":
    from vmoe.projects.soft_moe import router as soft

    soft.Bfloat16Dispatcher = lambda dispatcher: dispatcher  # It would round.
    vit_moe.routing.SoftRouter = (
      soft.SoftRouter
    )  # Where its configs look for it.
    router = {"name": "SoftRouter", "num_slots": s["slots"]}
    router["compute_similarity_metrics"] = False
  moe = {
    "num_experts": s["num_experts"],
    "layers": s["layers"],
    "router": router,
  }
  moe["group_size"] = tokens(s) * s["per_group"]
  encoder = {"num_layers": s["num_layers"], "mlp_dim": s["d_ff"], "moe": moe}
  encoder |= {"num_heads": s["num_heads"], "attention_qk_norm": s["qk_norm"]}
  encoder["position_emb"] = {"name": s["position"]}
  return vit_moe.VisionTransformerMoe(
    num_classes=7,
    patch_size=(s["patch"], s["patch"]),
    hidden_size=s["d_model"],
    encoder=encoder,
    classifier=s["classifier"],
    representation_size=s["d_head"],
    deterministic=True,
  )


def _make(name, seed):
  import jax
  from flax import traverse_util

  s, rng = setting(name), np.random.default_rng(seed)
  model = _theirs(s)
  image = rng.normal(size=(IMAGES, *s["shape"])).astype(np.float32)
  params = model.init(jax.random.key(seed), image)["params"]
  flat = traverse_util.flatten_dict(params, sep="/")
  # All biases, scales and experts differ.
  flat = {
    k: np.asarray(x + rng.normal(scale=0.15, size=x.shape), np.float32)
    for k, x in flat.items()
  }
  variables, more = {"params": traverse_util.unflatten_dict(flat, sep="/")}, {}
  rngs = None
  if s["noise"]:
    groups = IMAGES // s["per_group"]
    shape = groups, tokens(s) * s["per_group"], s["num_experts"]
    more["noise"] = rng.normal(size=shape).astype(np.float32)
    rngs = {"gating": jax.random.key(0)}
  drawn = mock.patch("jax.random.normal", lambda key, shape: more["noise"])
  with jax.default_matmul_precision("highest"), drawn:
    logits, metrics = model.apply(variables, image, rngs=rngs)
  more |= {
    f"{of}/{k}": np.asarray(v[f"{of}_loss"])
    for k, v in metrics.items()
    for of in losses(s)
    if k != "auxiliary_loss"
  }
  if s["noise"]:
    more["auxiliary"] = np.asarray(metrics["auxiliary_loss"])
  arrays = {f"params/{k}": x for k, x in flat.items()}
  np.savez_compressed(
    FOLDER / f"{name}.npz", image=image, logits=logits, **arrays, **more
  )
  print(f"{name}: {sum(x.size for x in flat.values())} parameters", flush=True)


def main(argv=None) -> int:
  argparse.ArgumentParser(
    prog="python -m tests.vision_parity",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  ).parse_args(argv)
  FOLDER.mkdir(exist_ok=True)
  for seed, name in enumerate(CASES):
    _make(name, seed)
  return 0


if __name__ == "__main__":
  sys.exit(main())
