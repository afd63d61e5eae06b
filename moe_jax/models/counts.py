"""Parameters, operations and cache of a model, without allocating any of it."""

from moe_jax.core import registry


def count(model, seq_len: int) -> dict[str, int]:
  """Numbers of parameters.

  Active counts, for one token, the chosen K of E routed experts and
  everything else once.

  Args:
    model: from `models.build`.
    seq_len: any length the model accepts.

  Returns:
    total, active, active_without_embedding, and by part: embedding, head,
    attention, dense (feed-forward layers), experts, shared, router, norm;
    selection_bias, which is not learnt by a gradient and in no sum.
  """
  import flax.linen as nn
  import jax
  import jax.numpy as jnp

  from moe_jax.core import parallel

  arch = model.arch
  tokens = max(1, parallel.token_shards(arch.mesh))
  if arch.grouping is not None:
    per_group, _ = arch.grouping.resolve(arch.recipe, seq_len, True)
    tokens *= max(1, per_group // seq_len)
  shapes = jax.eval_shape(
    lambda: nn.unbox(
      model.init(jax.random.key(0), jnp.zeros((tokens, seq_len), jnp.int32))
    )
  )
  parts: dict[str, int] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(shapes["params"]):
    part = _part([getattr(p, "key", "") for p in path])
    parts[part] = parts.get(part, 0) + leaf.size
  total = sum(parts.values())
  biases = sum(x.size for x in jax.tree.leaves(shapes.get("balance", {})))
  active = total
  if arch.recipe is not None:
    idle = arch.recipe.num_experts - arch.recipe.router.top_k
    active -= parts.get("experts", 0) // arch.recipe.num_experts * idle
  return {
    "total": total,
    "active": active,
    "active_without_embedding": active - parts["embedding"],
    **parts,
    **({"selection_bias": biases} if biases else {}),
  }


def train_flops_per_token(model, seq_len: int) -> int:
  """Floating-point operations of a training step for one token.

  Forward two for every active weight that multiplies, and 4 L H d a layer for
  attention over L positions; backward twice as much. Nothing for empty or
  dropped slots: it is what the mathematics asks for, not what a kernel does.

  Args:
    model: from `models.build`.
    seq_len: L.
  """
  arch, found = model.arch, count(model, seq_len)
  weights = found["active"] - found.get("norm", 0)
  if not arch.tie_embeddings:
    weights -= found["embedding"]  # Looked up; tied, it is the output layer.
  attention = sum(
    arch.attention_of(kind).flops_per_pair for kind in arch.layers
  )
  return 3 * (2 * weights + attention * seq_len)


def kv_cache_per_token(model) -> int:
  """Numbers that attention keeps for every token of a context."""
  arch = model.arch
  return sum(arch.attention_of(kind).cached_per_token for kind in arch.layers)


def describe(model_config, plugins: tuple[str, ...] = ()) -> dict:
  """The resolved routing and balancing recipe, with no hidden defaults.

  {} for a model without MoE layers.
  """
  from moe_jax import models

  if "moe" not in models.layer_kinds(model_config):
    return {}

  def part(kind, section):
    name, options = registry.split(kind, section)
    options = registry.resolved(kind, name, plugins=plugins, **options)
    return {"name": name, **options}

  recipe = model_config.moe.to_dict()
  recipe["router"] = part("routers", recipe["router"])
  recipe["dispatcher"] = part("dispatchers", recipe["dispatcher"])
  recipe["balancers"] = {
    label: part("balancers", section)
    for label, section in recipe["balancers"].items()
  }
  return recipe


def _part(keys):
  if "moe" in keys:
    return {"experts": "experts", "shared": "shared", "router": "router"}[
      keys[keys.index("moe") + 1]
    ]
  if "mlp" in keys:
    return "dense"
  if "attention" in keys:
    return "attention"
  if keys[-1] == "scale":
    return "norm"
  return keys[-1]
