"""T5 (1910.10683), and Switch Transformers (2101.03961) of its two stacks.

An expert has expert_capacity slots for each sequence, whatever its length.
Padding takes slots in the reference and none here; if padding comes last, both
compute the same function.
"""

from moe_jax.hf import families, rows, tensors
from moe_jax.hf.tensors import OUTPUT, SAME

# The expert_capacity that stands for dropless.
_UNBOUNDED = 2**31 - 1
_STACKS = {
  "encoder.": ("encoder", "num_sparse_encoder_layers"),
  "": ("decoder", "num_sparse_decoder_layers"),
}


def _kinds(count, step):
  """The kind of every layer of a stack, from the step of its sparse layers."""
  sparse = [step == 1 or (step > 1 and i % step == 1) for i in range(count)]
  return ["moe" if x else "dense" for x in sparse]


def _step(count, sparse):
  """The step of `sparse` layers among `count`; 0 sparse layers may have one."""
  return count // sparse if sparse else count


def _read_layers(fields, ours):
  kinds = {}
  for stack, (name, field) in _STACKS.items():
    count = ours[f"{stack}num_layers"]
    step = _step(count, fields.take(field, int, 3))
    # The reference's class also writes the step, which takes precedence.
    step = fields.take(f"{name}_sparse_step", int, step)
    kinds[f"{stack}layers"] = _kinds(count, step)
  return kinds


def _write_layers(ours):
  values = {}
  for stack, (name, field) in _STACKS.items():
    kinds = [layer["kind"] for layer in ours[f"{stack}layers"]]
    count = len(kinds)
    # With more sparse layers than layers, no layer has experts.
    for sparse in (kinds.count("moe"), *range(count + 2)):
      if _kinds(count, _step(count, sparse)) == kinds:
        values[field] = sparse
        break
    else:
      raise rows.ConfigError(
        f"its sparse layers are every n-th one from the second on, and the {name} of"
        f" this model has {', '.join(kinds)}"
      )
  return values


def _of_encoder(ours):
  return ours["encoder.num_layers"]


def _read_widths(fields, ours):
  """All networks are equally wide, and all heads have keys of their own."""
  wide = fields.take("d_ff", int, 2048, least=1, bounded=True)
  heads = ours["num_heads"]
  return {"d_ff": wide, "moe.d_expert": wide, "num_kv_heads": heads}


def _read_dense(fields, ours):
  """No layer has experts, whatever the number of experts says."""
  kinds = {f"{s}layers": ["dense"] * ours[f"{s}num_layers"] for s in _STACKS}
  return {"moe.num_experts": 1, **kinds}


def _write_widths(ours):
  first = ours["layers"][0]
  return {"d_ff": first.get("moe.d_expert", first.get("d_ff"))}


def _read_tied(fields, ours):
  """Vectors before a tied output layer are scaled, unless T5 says otherwise."""
  tied = fields.take("tie_word_embeddings", bool, True)
  scaled = fields.take("scale_decoder_outputs", bool, tied)
  return {"tie_embeddings": tied, "scale_output": scaled}


def _write_tied(ours):
  tied, scaled = ours["tie_embeddings"], ours["scale_output"]
  more = {"scale_decoder_outputs": scaled} if tied != scaled else {}
  return {"tie_word_embeddings": tied, **more}


def _read_slots(fields, ours):
  slots = fields.take("expert_capacity", int, 64, least=1)
  if slots >= _UNBOUNDED:
    return {}
  return {"moe.capacity": slots, "moe.dispatcher": {"name": "gather"}}


def _write_slots(ours):
  if ours.get("moe.capacity_factor"):
    raise rows.ConfigError(
      "an expert has a number of slots, whatever the length of a sequence, and not"
      f" capacity_factor = {ours['moe.capacity_factor']}; build the model with"
      " moe.capacity, or dropless"
    )
  return {"expert_capacity": ours.get("moe.capacity") or _UNBOUNDED}


_SELF, _CROSS = "layer.0.SelfAttention.{}.weight", "layer.1.EncDecAttention.{}"
_FFN = "up wi, down wo"
_GATED = "up wi_1, gate wi_0"
_BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"


def _networks(place, given, dense):
  """Maps of the networks of a layer, and of the norm before them.

  Args:
    place: the number of this sublayer.
    given: a parameter that only such layers have.
    dense: the name of networks without experts.
  """
  theirs = f"layer.{place}.{{}}.weight"
  dense = theirs.replace("{}", f"{dense}.{{}}")
  gated = tensors.maps(_GATED, "mlp/{}", dense)
  maps = (
    *tensors.maps("ffn_norm/scale layer_norm", theirs=theirs, form=SAME),
    *tensors.maps(_FFN, "mlp/{}", dense),
    *tensors.maps(
      _FFN, "moe/experts/{}", theirs.replace("{}", "mlp.experts.expert_{e}.{}")
    ),
    *tensors.maps("moe/router/kernel mlp.router.classifier", theirs=theirs),
    *tensors.maps(
      "moe/router/kernel_bias mlp.router.classifier",
      theirs=theirs.replace("weight", "bias"),
      form=SAME,
    ),
  )
  gated = [m._replace(given=(*given, "mlp/gate")) for m in gated]
  return [*gated, *(m._replace(given=given) for m in maps)]


def _rows(d_model, layers, decoder, num_heads, *own):
  """Rows of both families, with the defaults of one, and its own rows."""
  return (
    rows.size("vocab_size", "vocab_size", 32_128),
    rows.size("d_model", "d_model", d_model, also="hidden_size"),
    rows.size(
      "num_layers", "encoder.num_layers", layers, also="num_hidden_layers"
    ),
    rows.size("num_decoder_layers", "num_layers", decoder, null=_of_encoder),
    rows.size("num_heads", "num_heads", num_heads, also="num_attention_heads"),
    rows.size("d_kv", "head_dim", 64),
    rows.Pair(_read_widths, _write_widths),
    rows.number("layer_norm_epsilon", "norm_eps", 1e-6),
    rows.Pair(_read_tied, _write_tied),
    rows.size("relative_attention_num_buckets", "attention.bias_buckets", 32),
    rows.whole(
      "relative_attention_max_distance", "attention.bias_distance", 128
    ),
    *own,
  )


def _tensors(dense):
  """Maps of both families; `dense` is the name of networks without experts."""
  return (
    *_networks(2, ("cross/query",), dense),
    *_networks(1, (), dense),
    *tensors.maps("query q, key k, value v", "attention/{}", _SELF),
    *tensors.maps("out o", "attention/{}", _SELF, OUTPUT),
    *tensors.maps("query q, key k, value v", "cross/{}", f"{_CROSS}.weight"),
    *tensors.maps("out o", "cross/{}", f"{_CROSS}.weight", OUTPUT),
    *tensors.maps(
      "attention 0, cross 1",
      "{}_norm/scale",
      "layer.{}.layer_norm.weight",
      SAME,
    ),
  )


_FORMS = {"relu": "relu", "gated-gelu": "geglu", "gated-silu": "swiglu"}
_IDLE = (
  "dropout_rate",
  "initializer_factor",
  "n_positions",
  "task_specific_params",
)
T5 = families.Family(
  "t5",
  "T5ForConditionalGeneration",
  rows=_rows(
    *(512, 6, _of_encoder, 8),
    rows.Row(*(str, "feed_forward_proj", "activation", "relu"), values=_FORMS),
    rows.Pair(_read_dense, lambda ours: {}),
  ),
  tensors=_tensors("DenseReluDense"),
  constants={
    "attention.rope": "none",
    "attention.position_bias": "shared",
    "attention.scale_scores": False,
    "moe.top_k": 1,
    # The first files have it, and the reference does not use it.
    "left_out": (
      f"decoder.block.0.{_CROSS.format('relative_attention_bias')}",
    ),
  },
  ends={"eos_token_id": 1, "pad_token_id": 0},
  ignored=(*_IDLE, "dense_act_fn", "is_gated_act", "classifier_dropout"),
  layer="{stack}.block.{i}.",
  outer=(
    *tensors.maps("embedding shared.weight", form=SAME),
    *tensors.maps(
      "encoder encoder, decoder decoder",
      *("{}_norm/scale", "{}.final_layer_norm.weight", SAME),
    ),
    *tensors.maps(
      "encoder encoder, decoder decoder",
      *("{}_position_bias", f"{{}}.block.0.{_BIAS}", SAME),
    ),
  ),
  model="encoder_decoder",
  copies={
    "encoder.embed_tokens.weight": "shared.weight",
    "decoder.embed_tokens.weight": "shared.weight",
  },
)
SWITCH_TRANSFORMERS = T5._replace(
  model_type="switch_transformers",
  architecture="SwitchTransformersForConditionalGeneration",
  rows=_rows(
    *(768, 12, 12, 12),
    rows.Row(
      *(str, "dense_act_fn", "activation", "relu"), values=rows.TWO_MATRICES
    ),
    rows.size("num_experts", "moe.num_experts", 8),
    rows.flag("router_bias", "moe.router.use_bias", False),
    rows.fixed("router_dtype", "float32"),
    rows.fixed("num_selected_experts", 1),
    rows.Pair(_read_layers, _write_layers),
    rows.Pair(_read_slots, _write_slots),
  ),
  tensors=_tensors("mlp"),
  ignored=(
    *_IDLE,
    *("add_router_probs", "feed_forward_proj", "router_type"),
    "router_ignore_padding_tokens",
  ),
)
