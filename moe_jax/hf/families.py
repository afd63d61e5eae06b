"""What the published decoders are in our parts, and what they call theirs.

A family has three things: which config of ours a config.json of it means, which
config.json a model of ours would have, and which of its tensors are which of
our parameters. `huggingface` reads and writes the files.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from moe_jax.core import registry
from moe_jax.core.errors import ConfigError

# Fields without a part in the function that a decoder computes, or in ours.
_NO_MATTER = """
  _attn_implementation_autoset _name_or_path architectures attention_dropout
  attn_pdrop auto_map aux_loss_alpha bos_token_id cache_implementation
  chunk_size_feed_forward dtype emb_pdrop embd_pdrop
  eos_token_id ep_size experts_per_token for_llm_compressor id2label
  initial_context_length initializer_range is_encoder_decoder label2id
  max_position_embeddings max_seq_len max_window_layers model_type
  moe_jitter_eps moe_loss_weight no_rope_layer_interval num_nextn_predict_layers
  output_attentions output_hidden_states output_router_logits pad_token_id
  pretraining_tp problem_type qk_head_dim resid_pdrop return_dict
  router_aux_loss_coef router_jitter_noise seq_aux torch_dtype
  transformers_version use_cache
"""


class Fields:
  """A config.json whose fields are all to be accounted for."""

  def __init__(self, values: Mapping[str, Any], where: str):
    self._left, self.where = dict(values), where

  def take(self, *names: str, default=...):
    """The value of the first of these fields that is there.

    Raises:
      ConfigError: none of them is, and there is no default.
    """
    found = [self._left.pop(name) for name in names if name in self._left]
    if found:
      return found[0]
    if default is ...:
      raise ConfigError(f'{self.where} has no field "{names[0]}"')
    return default

  def section(self, name: str) -> "Fields":
    """The fields of a section."""
    return Fields(self.take(name, default={}), f"{self.where}, {name}")

  def only(self, name: str, *supported) -> None:
    """Raises ConfigError unless it is missing, or has one of these values."""
    value = self.take(name, default=supported[0])
    if value not in supported:
      raise ConfigError(
        f"{self.where} has {name} = {value!r}, which is not supported;"
        f" supported: {', '.join(map(repr, supported))}"
      )

  def finish(self) -> None:
    """Raises ConfigError for a field that nobody took."""
    for name, value in self._left.items():
      if name not in _NO_MATTER.split() and value not in (
        None,
        False,
        0,
        [],
        {},
      ):
        raise ConfigError(
          f"{self.where} has {name} = {value!r}, a field that is not supported"
          " here"
        )


class Map(NamedTuple):
  """Parameters of a layer, and the tensors that hold them.

  leaves: paths of parameters in a layer, "moe/experts/gate" or, of a balancer,
    "balance/moe/LABEL/bias_E".
  tensors: names in a layer; "{e}" for one of each expert.
  read: (tensors) -> leaves, both without the axis of experts if by_expert.
  write: the other way.
  by_expert: leaves have a first axis of experts; so have tensors without "{e}".
  rows: tensors have the rows of all experts one after another.
  """

  leaves: tuple[str, ...]
  tensors: tuple[str, ...]
  read: Callable
  write: Callable
  by_expert: bool = False
  rows: bool = False


def same(leaf, tensor, **more) -> Map:
  """The same array."""
  return Map((leaf,), (tensor,), lambda x: (x,), lambda x: (x,), **more)


def transposed(leaf, tensor, **more) -> Map:
  """[in, out] here, [out, in] there."""
  return Map((leaf,), (tensor,), lambda x: (x.T,), lambda x: (x.T,), **more)


def shaped(leaf, tensor, shape, inputs=1) -> Map:
  """More axes here, of which the first `inputs` are those of the input."""
  ins = int(np.prod(shape[:inputs]))
  return Map(
    (leaf,),
    (tensor,),
    lambda x: (x.T.reshape(shape),),
    lambda x: (x.reshape(ins, -1).T,),
  )


def flat(leaf, tensor, shape) -> Map:
  """More axes here, one there."""
  return Map(
    (leaf,), (tensor,), lambda x: (x.reshape(shape),), lambda x: (x.ravel(),)
  )


def interleaved(leaves, tensor) -> Map:
  """Of every expert, two parameters in turn along the last axis."""
  return Map(
    leaves,
    (tensor,),
    lambda x: (x[..., ::2], x[..., 1::2]),
    lambda a, b: (np.stack([a, b], -1).reshape(*a.shape[:-1], -1),),
    by_expert=True,
  )


def halves(leaves, tensor) -> Map:
  """Of every expert, two parameters one after another along the last axis."""
  return Map(
    leaves,
    (tensor,),
    lambda x: np.split(x, 2, -1),
    lambda a, b: (np.concatenate([a, b], -1),),
    by_expert=True,
  )


class Widths(NamedTuple):
  """F of a routed expert, and the hidden width of the shared ones; 0: none."""

  expert: int
  shared: int


class Family(NamedTuple):
  """A model_type of config.json.

  section: Fields -> the options of `config.model` that it means.
  describe: (Architecture, Widths) -> fields of config.json. Read again they may
    mean another model, where the family has nothing like this one.
  maps: (Architecture, kind of the layer) -> maps of the layer.
  layer: prefix of a layer's tensors.
  embedding, final_norm, head: tensors of these names; head is not there if it
    is the transposed embedding.
  left_out: prefixes of tensors that belong to parts we do not have.
  """

  section: Callable[[Fields], dict]
  describe: Callable[[Any, "Widths"], dict]
  maps: Callable[[Any, str], list[Map]]
  layer: str = "model.layers.{i}."
  embedding: str = "model.embed_tokens.weight"
  final_norm: str = "model.norm.weight"
  head: str = "lm_head.weight"
  left_out: Callable[[Mapping], tuple[str, ...]] = lambda config: ()


# What they share: fields.


def _common(fields: Fields) -> dict:
  d_model = fields.take("hidden_size")
  heads = fields.take("num_attention_heads")
  fields.only("hidden_act", "silu")
  return {
    "vocab_size": fields.take("vocab_size"),
    "d_model": d_model,
    "num_layers": fields.take("num_hidden_layers"),
    "num_heads": heads,
    "num_kv_heads": fields.take("num_key_value_heads", default=heads),
    "head_dim": fields.take("head_dim", default=None) or d_model // heads,
    "norm_eps": fields.take("rms_norm_eps"),
    "tie_embeddings": fields.take("tie_word_embeddings", default=False),
  }


# Their rope_type: our name of it, and fields that are called the same.
_SCALINGS = {
  "yarn": (
    *("yarn", "beta_fast", "beta_slow", "truncate"),
    *("attention_factor", "mscale", "mscale_all_dim"),
  ),
  "llama3": ("wavelength", "low_freq_factor", "high_freq_factor"),
}


def _rope(fields: Fields, default_theta: float) -> tuple[float, dict | None]:
  """(theta, scaling): of the newer field, or of the two older ones."""
  theta = fields.take("rope_theta", default=None)
  older = fields.take("rope_scaling", default=None) or {}
  newer = fields.take("rope_parameters", default=None) or {}
  rope = Fields(older | newer, f"{fields.where}, rope_parameters")
  theta = rope.take("rope_theta", default=theta) or default_theta
  name = rope.take("rope_type", "type", default="default")
  if name == "default":
    rope.finish()
    return theta, None
  scaling = {
    "factor": rope.take("factor"),
    "original_length": rope.take("original_max_position_embeddings"),
  }
  if name not in _SCALINGS:
    raise ConfigError(
      f"{rope.where} has rope_type = {name!r}, which is not supported;"
      f" supported: default, {', '.join(_SCALINGS)}"
    )
  scaling["name"], *keys = _SCALINGS[name]
  for key in keys:
    value = rope.take(key, default=None)
    if value is not None:
      scaling[key] = value
  rope.finish()
  return theta, scaling


def _rope_parameters(attention) -> dict:
  """The newer field, of options of attention."""
  rope = {"rope_theta": attention.rope_theta, "rope_type": "default"}
  scaling = attention.rope_scaling
  ours = type(scaling).__name__.lower()
  if ours != "plain":
    name = next(k for k, v in _SCALINGS.items() if v[0] == ours)
    values = {k: v for k, v in vars(scaling).items() if v is not None}
    length = values.pop("original_length")
    rope |= {
      "rope_type": name,
      "original_max_position_embeddings": length,
      **values,
    }
  return rope


def _described(arch) -> dict:
  attention = arch.attention
  return {
    "vocab_size": arch.vocab_size,
    "hidden_size": arch.d_model,
    "num_hidden_layers": arch.num_layers,
    "num_attention_heads": attention.num_heads,
    "num_key_value_heads": attention.num_kv_heads,
    "head_dim": attention.head_dim,
    "hidden_act": "silu",
    "rms_norm_eps": arch.norm_eps,
    "tie_word_embeddings": arch.tie_embeddings,
    "rope_parameters": _rope_parameters(attention),
    "attention_dropout": 0.0,
  }


def _router(arch) -> dict:
  """All options of the router, which is top_k in every family."""
  return registry.made_of(arch.recipe.router)[1]


def listed(kinds: list[str]) -> dict:
  """prefix and pattern of a list of layers, with as few names as there can be.

  Args:
    kinds: of every layer.
  """
  layers = len(kinds)
  _, prefix, pattern = min(
    (first + length, first, length)
    for first in range(layers)
    for length in range(1, layers - first + 1)
    if (layers - first) % length == 0
    and all(
      kinds[i] == kinds[i + length] for i in range(first, layers - length)
    )
  )
  return {
    "prefix": tuple(kinds[:prefix]),
    "pattern": tuple(kinds[prefix : prefix + pattern]),
  }


# What they share: tensors.


def _projections(arch, kind, *, biases: str, out="o_proj") -> list[Map]:
  m, d_model = arch.attention_of(kind), arch.d_model
  maps = []
  for ours, theirs, heads in (
    ("query", "q_proj", m.num_heads),
    ("key", "k_proj", m.num_kv_heads),
    ("value", "v_proj", m.num_kv_heads),
  ):
    there = f"self_attn.{theirs}"
    shape = (d_model, heads, m.head_dim)
    maps.append(shaped(f"attention/{ours}", f"{there}.weight", shape))
    if biases != "none":
      maps.append(flat(f"attention/{ours}_bias", f"{there}.bias", shape[1:]))
  shape = (m.num_heads, m.head_dim, d_model)
  maps.append(shaped("attention/out", f"self_attn.{out}.weight", shape, 2))
  if biases == "all":
    maps.append(same("attention/out_bias", f"self_attn.{out}.bias"))
  if m.qk_norm in ("head", "projection"):
    for x in ("query", "key"):
      maps.append(
        same(f"attention/{x}_norm/scale", f"self_attn.{x[0]}_norm.weight")
      )
  return maps


_NORMS = [
  same("attention_norm/scale", "input_layernorm.weight"),
  same("ffn_norm/scale", "post_attention_layernorm.weight"),
]
_GATED = ("gate", "up", "down")


def _network(ours: str, theirs: str, names=None, **more) -> list[Map]:
  names = names or {x: f"{x}_proj" for x in _GATED}
  return [
    transposed(f"{ours}/{x}", f"{theirs}.{names[x]}.weight", **more)
    for x in _GATED
  ]


def _sparse(kind):
  return kind.startswith("moe")


# Mixtral (2401.04088).


def _mixtral_section(fields):
  section = _common(fields)
  theta, scaling = _rope(fields, 1e6)
  top_k = fields.take("num_experts_per_tok")
  attention = {"rope_scaling": scaling}
  attention["window"] = fields.take("sliding_window", default=None)
  return section | {
    "rope_theta": theta,
    "attention": attention,
    "moe": {
      "num_experts": fields.take("num_local_experts"),
      "top_k": top_k,
      "d_expert": fields.take("intermediate_size"),
      "router": _softmax(top_k, renormalize=True),
    },
  }


def _softmax(top_k, renormalize):
  """Softmax, K largest, over their sum or not. One renormalised weight is 1
  whatever the router says: nothing to learn, but what the reference does."""
  if renormalize and top_k == 1:
    raise ConfigError(
      "a single expert per token with a renormalised weight is not supported,"
      " as its weight is always 1"
    )
  return {"name": "top_k", "renormalize": bool(renormalize)}


def _mixtral_described(arch, widths):
  return _described(arch) | {
    "num_local_experts": arch.recipe.num_experts,
    "num_experts_per_tok": arch.recipe.router.top_k,
    "sliding_window": arch.attention.window,
    "intermediate_size": widths.expert,
  }


def _mixtral_maps(arch, kind):
  names = {"gate": "w1", "up": "w3", "down": "w2"}
  there = "block_sparse_moe"
  return [
    *_NORMS,
    *_projections(arch, kind, biases="none"),
    transposed("moe/router/kernel", f"{there}.gate.weight"),
    *_network("moe/experts", f"{there}.experts.{{e}}", names, by_expert=True),
  ]


# Qwen2-MoE (2407.10671), Qwen3-MoE (2505.09388), OLMoE (2409.02060).


def _qwen_kinds(fields, layers):
  step = fields.take("decoder_sparse_step", default=1)
  dense = fields.take("mlp_only_layers", default=None) or []
  return [
    "dense" if i in dense or (i + 1) % step else "moe" for i in range(layers)
  ]


def _qwen_moe(fields):
  top_k = fields.take("num_experts_per_tok")
  return {
    "num_experts": fields.take("num_experts", "num_local_experts"),
    "top_k": top_k,
    "d_expert": fields.take("moe_intermediate_size"),
    "router": _softmax(top_k, fields.take("norm_topk_prob", default=False)),
  }


def _qwen2_moe_section(fields):
  section = _common(fields)
  theta, scaling = _rope(fields, 10_000.0)
  moe = _qwen_moe(fields)
  wide = fields.take("shared_expert_intermediate_size")
  if wide % moe["d_expert"]:
    raise ConfigError(
      f"{fields.where} has shared_expert_intermediate_size = {wide}, which is"
      f" no multiple of moe_intermediate_size = {moe['d_expert']}"
    )
  moe |= {
    "num_shared_experts": wide // moe["d_expert"],
    "shared_gate": True,
  }
  fields.only("use_sliding_window", False)
  fields.take("sliding_window", default=None)
  fields.take("layer_types", default=None)
  bias = "qkv" if fields.take("qkv_bias", default=True) else "none"
  return section | {
    **listed(_qwen_kinds(fields, section["num_layers"])),
    "d_ff": fields.take("intermediate_size"),
    "rope_theta": theta,
    "attention": {"rope_scaling": scaling, "bias": bias},
    "moe": moe,
  }


def _qwen_described(arch, widths):
  kinds = arch.layers
  moe = arch.recipe
  return _described(arch) | {
    "intermediate_size": arch.d_ff,
    "moe_intermediate_size": widths.expert,
    "num_experts": moe.num_experts,
    "num_experts_per_tok": moe.router.top_k,
    "norm_topk_prob": _router(arch)["renormalize"],
    "decoder_sparse_step": 1,
    "mlp_only_layers": [i for i, k in enumerate(kinds) if not _sparse(k)],
  }


def _qwen2_moe_described(arch, widths):
  return _qwen_described(arch, widths) | {
    "shared_expert_intermediate_size": widths.shared,
    "qkv_bias": arch.attention.bias == "qkv",
    "use_sliding_window": False,
  }


def _qwen_dense_or_sparse(kind):
  if not _sparse(kind):
    return _network("mlp", "mlp")
  return [
    transposed("moe/router/kernel", "mlp.gate.weight"),
    *_network("moe/experts", "mlp.experts.{e}", by_expert=True),
  ]


def _qwen2_moe_maps(arch, kind):
  maps = [
    *_NORMS,
    *_projections(arch, kind, biases=arch.attention.bias),
    *_qwen_dense_or_sparse(kind),
  ]
  if _sparse(kind):
    maps += _network("moe/shared", "mlp.shared_expert")
    maps.append(
      transposed("moe/shared/token_gate", "mlp.shared_expert_gate.weight")
    )
  return maps


def _qwen3_moe_section(fields):
  section = _common(fields)
  theta, scaling = _rope(fields, 10_000.0)
  fields.only("use_sliding_window", False)
  fields.take("sliding_window", default=None)
  bias = "all" if fields.take("attention_bias", default=False) else "none"
  attention = {"rope_scaling": scaling, "bias": bias, "qk_norm": "head"}
  return section | {
    **listed(_qwen_kinds(fields, section["num_layers"])),
    "d_ff": fields.take("intermediate_size"),
    "rope_theta": theta,
    "attention": attention,
    "moe": _qwen_moe(fields),
  }


def _qwen3_moe_described(arch, widths):
  return _qwen_described(arch, widths) | {
    "attention_bias": arch.attention.bias == "all",
    "use_sliding_window": False,
  }


def _qwen3_moe_maps(arch, kind):
  return [
    *_NORMS,
    *_projections(arch, kind, biases=arch.attention.bias),
    *_qwen_dense_or_sparse(kind),
  ]


def _olmoe_section(fields):
  section = _common(fields)
  theta, scaling = _rope(fields, 10_000.0)
  top_k = fields.take("num_experts_per_tok")
  bias = "all" if fields.take("attention_bias", default=False) else "none"
  return section | {
    "rope_theta": theta,
    "attention": {
      "rope_scaling": scaling,
      "bias": bias,
      "qk_norm": "projection",
      "clip": fields.take("clip_qkv", default=None),
    },
    "moe": {
      "num_experts": fields.take("num_experts"),
      "top_k": top_k,
      "d_expert": fields.take("intermediate_size"),
      "router": _softmax(top_k, fields.take("norm_topk_prob", default=False)),
    },
  }


def _olmoe_described(arch, widths):
  values = _described(arch) | {
    "intermediate_size": widths.expert,
    "num_experts": arch.recipe.num_experts,
    "num_experts_per_tok": arch.recipe.router.top_k,
    "norm_topk_prob": _router(arch)["renormalize"],
    "attention_bias": arch.attention.bias == "all",
    "clip_qkv": arch.attention.clip,
  }
  del values["head_dim"]  # It is d_model over the heads.
  return values


# DeepSeek-V3 (2412.19437).

_BIAS = "bias"  # Label of the balancer.


def _deepseek_v3_section(fields):
  section = _common(fields)
  theta, scaling = _rope(fields, 10_000.0)
  fields.only("attention_bias", False)
  fields.only("scoring_func", "sigmoid")
  fields.only("topk_method", "noaux_tc")
  fields.only("moe_layer_freq", 1)
  pairs = fields.take("rope_interleave", default=True)
  dense = fields.take("first_k_dense_replace")
  layers = section["num_layers"]
  top_k = fields.take("num_experts_per_tok")
  section |= {
    **listed(["dense"] * dense + ["moe"] * (layers - dense)),
    "num_kv_heads": section["num_heads"],
    "head_dim": fields.take("qk_nope_head_dim"),
    "d_ff": fields.take("intermediate_size"),
    "rope_theta": theta,
    "attention": {
      "rope_scaling": scaling,
      "rope": "interleaved" if pairs else "half",
      "kv_lora_rank": fields.take("kv_lora_rank"),
      "q_lora_rank": fields.take("q_lora_rank", default=None),
      "rope_head_dim": fields.take("qk_rope_head_dim"),
      "v_head_dim": fields.take("v_head_dim"),
    },
    "moe": {
      "num_experts": fields.take("n_routed_experts", "num_local_experts"),
      "top_k": top_k,
      "d_expert": fields.take("moe_intermediate_size"),
      "num_shared_experts": fields.take("n_shared_experts", default=0) or 0,
      "router": {
        "name": "top_k",
        "score": "sigmoid",
        "renormalize": fields.take("norm_topk_prob", default=True),
        "scale": float(fields.take("routed_scaling_factor", default=1.0)),
        "num_expert_groups": fields.take("n_group", default=1) or 1,
        "top_expert_groups": fields.take("topk_group", default=1) or 1,
        "group_score": "sum_top_2",
      },
      "balancers": {_BIAS: {"name": "bias", "rate": 1e-3}},
    },
  }
  return section


def _deepseek_v3_described(arch, widths):
  m, moe, router = arch.attention, arch.recipe, _router(arch)
  values = _described(arch) | {
    "kv_lora_rank": m.kv_lora_rank,
    "q_lora_rank": m.q_lora_rank,
    "qk_nope_head_dim": m.head_dim,
    "qk_rope_head_dim": m.rope_head_dim,
    "v_head_dim": m.v_head_dim,
    "head_dim": m.rope_head_dim,
    "rope_interleave": m.rope == "interleaved",
    "attention_bias": False,
    "intermediate_size": arch.d_ff,
    "first_k_dense_replace": sum(not _sparse(k) for k in arch.layers),
    "moe_intermediate_size": widths.expert,
    "n_shared_experts": widths.shared // widths.expert,
    "n_routed_experts": moe.num_experts,
    "num_experts_per_tok": moe.router.top_k,
    "norm_topk_prob": router["renormalize"],
    "routed_scaling_factor": router["scale"],
    "n_group": router["num_expert_groups"],
    "topk_group": router["top_expert_groups"],
  }
  return values


def _deepseek_v3_maps(arch, kind):
  m, d_model = arch.attention, arch.d_model
  query = (m.num_heads, m.head_dim + m.rope_head_dim)
  there = "self_attn"
  if m.q_lora_rank is None:
    maps = [
      shaped("attention/query", f"{there}.q_proj.weight", (d_model, *query))
    ]
  else:
    maps = [
      transposed("attention/query_down", f"{there}.q_a_proj.weight"),
      same("attention/query_norm/scale", f"{there}.q_a_layernorm.weight"),
      shaped(
        "attention/query", f"{there}.q_b_proj.weight", (m.q_lora_rank, *query)
      ),
    ]
  up = (m.kv_lora_rank, m.num_heads, m.head_dim + m.v_head_dim)
  maps += [
    *_NORMS,
    transposed("attention/kv_down", f"{there}.kv_a_proj_with_mqa.weight"),
    same("attention/kv_norm/scale", f"{there}.kv_a_layernorm.weight"),
    shaped("attention/kv_up", f"{there}.kv_b_proj.weight", up),
    shaped(
      "attention/out",
      f"{there}.o_proj.weight",
      (m.num_heads, m.v_head_dim, d_model),
      2,
    ),
    *_qwen_dense_or_sparse(kind),
  ]
  if _sparse(kind):
    maps.append(
      same(f"balance/moe/{_BIAS}/bias_E", "mlp.gate.e_score_correction_bias")
    )
    if arch.recipe.shared is not None:
      maps += _network("moe/shared", "mlp.shared_experts")
  return maps


def _deepseek_v3_left_out(config):
  """Layers beyond the last are for predicting more than one token."""
  layers = config["num_hidden_layers"]
  more = config.get("num_nextn_predict_layers", 0) or 0
  return tuple(f"model.layers.{layers + i}." for i in range(more))


# DBRX.


def _dbrx_section(fields):
  d_model, heads = fields.take("d_model"), fields.take("n_heads")
  attention, ffn = fields.section("attn_config"), fields.section("ffn_config")
  theta = attention.take("rope_theta", default=10_000.0)
  if fields.take("rope_theta", default=None) is not None:
    raise ConfigError(f"{fields.where} has rope_theta outside of attn_config")
  rope = fields.take("rope_parameters", default=None) or {}
  rope = Fields(rope, f"{fields.where}, rope_parameters")
  rope.only("rope_type", "default")
  theta = rope.take("rope_theta", default=theta)
  rope.finish()
  fields.take("num_key_value_heads", default=None)
  top_k = ffn.take("moe_top_k")
  ffn.take("hidden_size", default=None)
  act = ffn.take("ffn_act_fn", default=None) or {"name": "silu"}
  if act != {"name": "silu"}:
    raise ConfigError(f"{ffn.where} has ffn_act_fn = {act}, not silu")
  norm = ffn.take("moe_normalize_expert_weights", default=1.0)
  if norm not in (None, 1):
    raise ConfigError(
      f"{ffn.where} has moe_normalize_expert_weights = {norm}, which is not"
      " supported; supported: 1, null"
    )
  section = {
    "vocab_size": fields.take("vocab_size"),
    "d_model": d_model,
    "num_layers": fields.take("n_layers"),
    "num_heads": heads,
    "num_kv_heads": attention.take("kv_n_heads", default=1),
    "head_dim": d_model // heads,
    "norm": "layer",
    "norm_eps": 1e-5,
    "rope_theta": theta,
    "tie_embeddings": fields.take("tie_word_embeddings", default=False),
    "attention": {"clip": attention.take("clip_qkv", default=None)},
    "moe": {
      "num_experts": ffn.take("moe_num_experts"),
      "top_k": top_k,
      "d_expert": ffn.take("ffn_hidden_size"),
      "router": _softmax(top_k, norm is not None),
    },
  }
  attention.finish()
  ffn.finish()
  return section


def _dbrx_described(arch, widths):
  m, moe = arch.attention, arch.recipe
  renormalize = _router(arch)["renormalize"]
  return {
    "vocab_size": arch.vocab_size,
    "d_model": arch.d_model,
    "n_layers": arch.num_layers,
    "n_heads": m.num_heads,
    "tie_word_embeddings": arch.tie_embeddings,
    "rope_parameters": _rope_parameters(m),
    "attn_config": {
      "kv_n_heads": m.num_kv_heads,
      "clip_qkv": m.clip,
      "rope_theta": m.rope_theta,
    },
    "ffn_config": {
      "ffn_act_fn": {"name": "silu"},
      "ffn_hidden_size": widths.expert,
      "moe_num_experts": moe.num_experts,
      "moe_top_k": moe.router.top_k,
      "moe_normalize_expert_weights": 1.0 if renormalize else None,
    },
  }


def _dbrx_maps(arch, kind):
  m, d_model = arch.attention, arch.d_model
  queries, keys = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim

  def read(x):
    parts = np.split(x, [queries, queries + keys])
    return tuple(p.T.reshape(d_model, -1, m.head_dim) for p in parts)

  def write(*parts):
    return (np.concatenate([p.reshape(d_model, -1).T for p in parts]),)

  there = "ffn.experts.mlp"
  return [
    same("attention_norm/scale", "norm_attn_norm.norm_1.weight"),
    same("ffn_norm/scale", "norm_attn_norm.norm_2.weight"),
    Map(
      tuple(f"attention/{x}" for x in ("query", "key", "value")),
      ("norm_attn_norm.attn.Wqkv.weight",),
      read,
      write,
    ),
    shaped(
      "attention/out",
      "norm_attn_norm.attn.out_proj.weight",
      (m.num_heads, m.head_dim, d_model),
      2,
    ),
    transposed("moe/router/kernel", "ffn.router.layer.weight"),
    transposed("moe/experts/gate", f"{there}.w1", by_expert=True, rows=True),
    transposed("moe/experts/up", f"{there}.v1", by_expert=True, rows=True),
    same("moe/experts/down", f"{there}.w2", by_expert=True, rows=True),
  ]


# Llama 4, text.


def _llama4_section(fields):
  section = _common(fields)
  theta, scaling = _rope(fields, 500_000.0)
  fields.only("attention_bias", False)
  layers = section["num_layers"]
  step = fields.take("interleave_moe_layer_step", default=1)
  listed_moe = fields.take("moe_layers", default=None)
  if listed_moe is None:
    listed_moe = range(step - 1, layers, step)
  interval = fields.take("no_rope_layer_interval", default=4)
  turning = fields.take("no_rope_layers", default=None) or [
    int((i + 1) % interval != 0) for i in range(layers)
  ]
  chunked = ["chunked_attention" if t else "full_attention" for t in turning]
  types = fields.take("layer_types", default=None) or chunked
  if list(types) != chunked:
    raise ConfigError(
      f"{fields.where} has layer_types that are not chunked where there are"
      " rotary positions, and full elsewhere, which is not supported"
    )
  tuning = fields.take("attn_temperature_tuning", default=True)
  scale = fields.take("attn_scale", default=0.1)
  length = int(fields.take("floor_scale", default=8192))
  chunk = fields.take("attention_chunk_size", default=8192)
  norm = "l2" if fields.take("use_qk_norm", default=True) else "none"
  top_k = fields.take("num_experts_per_tok")
  kinds = [
    ("moe" if i in listed_moe else "dense") + ("@local" if turning[i] else "")
    for i in range(layers)
  ]
  return section | {
    **listed(kinds),
    "d_ff": fields.take("intermediate_size_mlp"),
    "rope_theta": theta,
    "attention": {
      "rope": "none",
      "temperature": (scale, length, 1) if tuning else None,
    },
    "variants": {
      "local": {
        "rope": "interleaved",
        "rope_scaling": scaling,
        "chunk": chunk,
        "qk_norm": norm,
        "temperature": None,
      }
    },
    "moe": {
      "num_experts": fields.take("num_local_experts"),
      "top_k": top_k,
      "d_expert": fields.take("intermediate_size"),
      "num_shared_experts": 1,
      "router": {
        "name": "top_k",
        "score": "sigmoid",
        "score_before_top_k": False,
        "apply_to": "input",
      },
    },
  }


def _llama4_described(arch, widths):
  local = dict(arch.variants)["local"]
  temperature = arch.attention.temperature
  scale, length, _ = temperature or (0.1, 8192, 1)
  layers = arch.layers
  return _described(arch) | {
    "rope_parameters": _rope_parameters(local),
    "attention_bias": False,
    "interleave_moe_layer_step": 1,
    "moe_layers": [i for i, kind in enumerate(layers) if _sparse(kind)],
    "no_rope_layers": [int(kind.endswith("@local")) for kind in layers],
    "layer_types": [
      "chunked_attention" if kind.endswith("@local") else "full_attention"
      for kind in layers
    ],
    "attn_temperature_tuning": temperature is not None,
    "attn_scale": scale,
    "floor_scale": length,
    "attention_chunk_size": local.chunk,
    "use_qk_norm": local.qk_norm == "l2",
    "num_local_experts": arch.recipe.num_experts,
    "num_experts_per_tok": arch.recipe.router.top_k,
    "intermediate_size": widths.expert,
    "intermediate_size_mlp": arch.d_ff,
  }


def _llama4_maps(arch, kind):
  maps = [*_NORMS, *_projections(arch, kind, biases="none")]
  there = "feed_forward"
  if not _sparse(kind):
    return maps + _network("mlp", there)
  experts = f"{there}.experts"
  return [
    *maps,
    transposed("moe/router/kernel", f"{there}.router.weight"),
    halves(("moe/experts/gate", "moe/experts/up"), f"{experts}.gate_up_proj"),
    same("moe/experts/down", f"{experts}.down_proj", by_expert=True),
    *_network("moe/shared", f"{there}.shared_expert"),
  ]


# The same with its vision, of which nothing is read.

_VISION = (
  *("boi_token_index", "eoi_token_index", "image_token_index"),
  *("vision_config", "tie_word_embeddings"),
)


def _llama4_with_vision_section(fields):
  for name in _VISION:
    fields.take(name, default=None)
  text = fields.section("text_config")
  section = _llama4_section(text)
  text.finish()
  return section


def _llama4_with_vision_described(arch, widths):
  raise ConfigError("there is no vision here; save it as llama4_text")


# gpt-oss (2508.10925).


def _gpt_oss_section(fields):
  section = _common(fields)
  theta, scaling = _rope(fields, 150_000.0)
  fields.only("swiglu_limit", 7.0)
  fields.only("swiglu_alpha", 1.702)
  fields.only("attention_bias", True)
  layers = section["num_layers"]
  window = fields.take("sliding_window")
  types = fields.take("layer_types", default=None) or [
    "full_attention" if i % 2 else "sliding_attention" for i in range(layers)
  ]
  kinds = [
    {"full_attention": "moe", "sliding_attention": "moe@window"}[t]
    for t in types
  ]
  top_k = fields.take("num_experts_per_tok")
  return section | {
    **listed(kinds),
    "rope_theta": theta,
    "attention": {"rope_scaling": scaling, "bias": "all", "sinks": True},
    "variants": {"window": {"window": window}},
    "moe": {
      "num_experts": fields.take("num_local_experts"),
      "top_k": top_k,
      "d_expert": fields.take("intermediate_size"),
      "activation": "clamped_swiglu",
      "use_bias": True,
      "router": {
        "name": "top_k",
        "score_before_top_k": False,
        "use_bias": True,
      },
    },
  }


def _gpt_oss_described(arch, widths):
  window = dict(arch.variants)["window"].window
  return _described(arch) | {
    "attention_bias": True,
    "sliding_window": window,
    "layer_types": [
      "sliding_attention" if k.endswith("@window") else "full_attention"
      for k in arch.layers
    ],
    "num_local_experts": arch.recipe.num_experts,
    "num_experts_per_tok": arch.recipe.router.top_k,
    "intermediate_size": widths.expert,
    "swiglu_limit": 7.0,
    "swiglu_alpha": 1.702,
  }


def _gpt_oss_maps(arch, kind):
  there = "mlp.experts"
  ours = "moe/experts"
  return [
    *_NORMS,
    *_projections(arch, kind, biases="all"),
    same("attention/sinks", "self_attn.sinks"),
    transposed("moe/router/kernel", "mlp.router.weight"),
    same("moe/router/kernel_bias", "mlp.router.bias"),
    interleaved((f"{ours}/gate", f"{ours}/up"), f"{there}.gate_up_proj"),
    interleaved(
      (f"{ours}/gate_bias", f"{ours}/up_bias"), f"{there}.gate_up_proj_bias"
    ),
    same(f"{ours}/down", f"{there}.down_proj", by_expert=True),
    same(f"{ours}/down_bias", f"{there}.down_proj_bias", by_expert=True),
  ]


FAMILIES = {
  "mixtral": Family(_mixtral_section, _mixtral_described, _mixtral_maps),
  "qwen2_moe": Family(
    _qwen2_moe_section, _qwen2_moe_described, _qwen2_moe_maps
  ),
  "qwen3_moe": Family(
    _qwen3_moe_section, _qwen3_moe_described, _qwen3_moe_maps
  ),
  "olmoe": Family(_olmoe_section, _olmoe_described, _qwen3_moe_maps),
  "deepseek_v3": Family(
    _deepseek_v3_section,
    _deepseek_v3_described,
    _deepseek_v3_maps,
    left_out=_deepseek_v3_left_out,
  ),
  "dbrx": Family(
    _dbrx_section,
    _dbrx_described,
    _dbrx_maps,
    layer="transformer.blocks.{i}.",
    embedding="transformer.wte.weight",
    final_norm="transformer.norm_f.weight",
  ),
  "llama4_text": Family(_llama4_section, _llama4_described, _llama4_maps),
  "llama4": Family(
    _llama4_with_vision_section,
    _llama4_with_vision_described,
    _llama4_maps,
    layer="language_model.model.layers.{i}.",
    embedding="language_model.model.embed_tokens.weight",
    final_norm="language_model.model.norm.weight",
    head="language_model.lm_head.weight",
    left_out=lambda config: ("vision_model.", "multi_modal_projector."),
  ),
  "gpt_oss": Family(_gpt_oss_section, _gpt_oss_described, _gpt_oss_maps),
}
