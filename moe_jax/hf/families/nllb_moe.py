"""NLLB-MoE (2207.04672): M2M-100's two stacks, with two experts for a token.

As published, there are slots for all tokens outside of training, so that
nothing is dropped. With fewer, the reference's slots are those of a whole batch
of texts, and the result of one text depends on the others; here every text has
slots of its own, as in the reference when it is alone.
"""

from moe_jax.hf import families, rows, tensors
from moe_jax.hf.tensors import FLAT, OUTPUT, SAME

_STACKS = {"encoder.": "encoder", "": "decoder"}
_FRACTION = "moe_eval_capacity_token_fraction"
_BEFORE = "normalize_router_prob_before_dropping"
_DISPATCHER = {"name": "gather", "order": "choice"}


def _read_heads(fields, ours):
  """Heads of keys and values, and their width, which have no fields."""
  heads = {}
  for stack, name in _STACKS.items():
    number, wide = ours[f"{stack}num_heads"], ours["d_model"]
    if wide % number:
      reason = f"does not divide d_model = {wide}"
      raise fields.error(f"{name}_attention_heads", number, reason)
    heads[f"{stack}num_kv_heads"] = number
    heads[f"{stack}head_dim"] = wide // number
  return heads


def _read_widths(fields, ours):
  """Dense networks of a stack are as wide as its experts."""
  widths = {}
  for stack, name in _STACKS.items():
    take = fields.take(f"{name}_ffn_dim", int, 4096, least=1, bounded=True)
    widths |= {f"{stack}d_ff": take, f"{stack}moe.d_expert": take}
  return widths


def _write_widths(ours):
  firsts = {name: ours[f"{stack}layers"][0] for stack, name in _STACKS.items()}
  return {
    f"{name}_ffn_dim": layer.get("moe.d_expert", layer.get("d_ff"))
    for name, layer in firsts.items()
  }


def _kinds(count, step):
  """Every step-th layer has experts; with a step of 0 no layer has."""
  sparse = [step > 0 and (i + 1) % step == 0 for i in range(count)]
  return ["moe" if x else "dense" for x in sparse]


def _read_layers(fields, ours):
  kinds = {}
  for stack, name in _STACKS.items():
    step = fields.take(f"{name}_sparse_step", int, 4)
    kinds[f"{stack}layers"] = _kinds(ours[f"{stack}num_layers"], step)
  return kinds


def _write_layers(ours):
  steps = {}
  for stack, name in _STACKS.items():
    kinds = [layer["kind"] for layer in ours[f"{stack}layers"]]
    step = kinds.index("moe") + 1 if "moe" in kinds else 0
    if _kinds(len(kinds), step) != kinds:
      raise rows.ConfigError(
        f"its sparse layers are every n-th one, and the {name} of this model has"
        f" {', '.join(kinds)}"
      )
    steps[f"{name}_sparse_step"] = step
  return steps


def _read_slots(fields, ours):
  """The slots of experts outside of training, which are those of training here."""
  fraction = fields.take(_FRACTION, float, 1.0)
  slots = fields.take("expert_capacity", int, 64, least=1)
  by_score = fields.take("batch_prioritized_routing", bool, False)
  before = fields.take(_BEFORE, bool, False)
  if fraction >= 1:  # There are slots for all tokens.
    return {}
  bound = {"moe.capacity": slots}
  if fraction > 0:
    factor = fraction * ours["moe.num_experts"] / 2
    bound = {"moe.capacity_factor": factor, "moe.capacity_rounding": "ceil"}
  return bound | {
    "moe.dispatcher": _DISPATCHER | {"renormalize": not before},
    "moe.router.priority": "score" if by_score else "none",
    "allow_noncausal": True,  # The reference's slots are not causal.
  }


def _write_slots(ours):
  by_score = ours.get("moe.router.priority") == "score"
  before = not ours.get("moe.renormalize")
  values = {"batch_prioritized_routing": by_score, _BEFORE: before}
  if slots := ours.get("moe.capacity"):
    return values | {_FRACTION: -1.0, "expert_capacity": slots}
  fraction, number = 1.0, ours.get("moe.num_experts")
  if factor := ours.get("moe.capacity_factor"):
    same = lambda x: x * number / 2 == factor  # noqa: E731
    fraction = rows.shortest(factor * 2 / number, same)
  return values | {_FRACTION: fraction}


_PAD = "pad_token_id", 1
_SELF, _CROSS = "self_attn.{}_proj.weight", "cross_attention.{}_proj."
_NORMS = "attention self_attn, cross cross_attention, ffn ff"
_FFN, _EXPERTS = "up fc1, down fc2", "ffn.experts.expert_{e}.{}."
NLLB_MOE = families.Family(
  "nllb-moe",
  "NllbMoeForConditionalGeneration",
  rows=(
    rows.size("vocab_size", "vocab_size", 128_112),
    rows.size("d_model", "d_model", 1024, also="hidden_size"),
    rows.size(
      *("encoder_layers", "encoder.num_layers", 12), also="num_hidden_layers"
    ),
    rows.size("decoder_layers", "num_layers", 12),
    rows.size(
      *("encoder_attention_heads", "encoder.num_heads", 16),
      also="num_attention_heads",
    ),
    rows.size("decoder_attention_heads", "num_heads", 16),
    rows.Pair(_read_heads, lambda ours: {}),
    rows.Pair(_read_widths, _write_widths),
    rows.Row(
      *(str, "activation_function", "activation", "relu"),
      values=rows.TWO_MATRICES,
    ),
    rows.flag("scale_embedding", "scale_embedding", True),
    rows.flag("tie_word_embeddings", "tie_embeddings", True, fixed=True),
    # The reference counts positions from the padding token's number plus one.
    rows.Pair(rows.fixed(*_PAD).read, lambda ours: dict([_PAD])),
    rows.size("num_experts", "moe.num_experts", 128),
    rows.flag("router_bias", "moe.router.use_bias", False),
    rows.fixed("router_dtype", "float32"),
    rows.fixed("router_ignore_padding_tokens", False),
    rows.fixed("second_expert_policy", "all"),
    rows.Pair(_read_layers, _write_layers),
    rows.Pair(_read_slots, _write_slots),
    rows.number("moe_token_dropout", "moe.router.output_masking", 0.2),
  ),
  tensors=(
    *tensors.maps(_NORMS, "{}_norm/scale", "{}_layer_norm.weight", SAME),
    *tensors.maps(_NORMS, "{}_norm/bias", "{}_layer_norm.bias", SAME),
    *tensors.maps("out out", "attention/{}", _SELF, OUTPUT),
    *tensors.maps(
      "out out", "attention/{}_bias", "self_attn.{}_proj.bias", SAME
    ),
    *tensors.maps("query q, key k, value v", "cross/{}", f"{_CROSS}weight"),
    *tensors.maps("out out", "cross/{}", f"{_CROSS}weight", OUTPUT),
    *tensors.maps(
      "query q, key k, value v, out out",
      *("cross/{}_bias", f"{_CROSS}bias", FLAT),
    ),
    *tensors.maps(_FFN, "mlp/{}", "ffn.{}.weight"),
    *tensors.maps(_FFN, "mlp/{}_bias", "ffn.{}.bias", SAME),
    *tensors.maps(_FFN, "moe/experts/{}", f"{_EXPERTS}weight"),
    *tensors.maps(_FFN, "moe/experts/{}_bias", f"{_EXPERTS}bias", SAME),
    *tensors.maps("kernel weight", "moe/router/{}", "ffn.router.classifier.{}"),
    *tensors.maps(
      "kernel_bias bias", "moe/router/{}", "ffn.router.classifier.{}", SAME
    ),
  ),
  constants={
    "norm": "layer_bias",
    "norm_eps": 1e-5,
    "positions": "sinusoidal",
    "attention.rope": "none",
    "attention.bias": "all",
    "use_bias": True,
    "moe.use_bias": True,
    "moe.top_k": 2,
    "moe.router.renormalize": True,
  },
  ends={
    **{"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
    "decoder_start_token_id": 2,
  },
  ignored=("encoder_layerdrop", "decoder_layerdrop", "init_std"),
  prefix="model.",
  layer="{stack}.layers.{i}.",
  outer=(
    *tensors.maps("embedding shared.weight", form=SAME),
    *tensors.maps(
      "encoder encoder, decoder decoder",
      *("{}_norm/scale", "{}.layer_norm.weight", SAME),
    ),
    *tensors.maps(
      "encoder encoder, decoder decoder",
      *("{}_norm/bias", "{}.layer_norm.bias", SAME),
    ),
  ),
  model="encoder_decoder",
  copies={
    "model.encoder.embed_tokens.weight": "model.shared.weight",
    "model.decoder.embed_tokens.weight": "model.shared.weight",
  },
)
