"""ERNIE 4.5 with experts, text, by Baidu."""

from moe_jax.hf import families, rows, tensors
from moe_jax.hf.tensors import Form


def _read_layers(fields, ours):
  """Every n-th layer of a range has experts, counted from the first layer."""
  count = ours["num_layers"]
  first = fields.take("moe_layer_start_index", int, 1, least=0)
  last = fields.take("moe_layer_end_index", int, -1, least=-1)
  every = fields.take("moe_layer_interval", int, 1)
  last = count - 1 if last == -1 else last
  sparse = {i for i in range(first, last + 1) if (i + 1) % every == 0}
  return {"layers": ["moe" if i in sparse else "dense" for i in range(count)]}


def _write_layers(ours):
  kinds = [layer["kind"] for layer in ours["layers"]]
  first = kinds.count("dense")
  if "dense" in kinds[first:]:
    raise rows.ConfigError(
      "ernie4_5_moe has its dense layers before the others, and this model has"
      f" {', '.join(kinds)}"
    )
  return {
    "moe_layer_start_index": first,
    "moe_layer_end_index": len(kinds) - 1,
    "moe_layer_interval": 1,
  }


_ROW = Form(lambda shape: (1, *shape))  # Files have a vector as a matrix's row.
_BIAS = "balance/moe/bias_E mlp.moe_statics.e_score_correction_bias"
ERNIE_4_5_MOE = families.Family(
  "ernie4_5_moe",
  "Ernie4_5_MoeForCausalLM",
  rows=(
    *rows.common(103_424, 2560, 28, 20, 1e-5, tied=True),
    *rows.grouped(kv_heads=4),
    rows.Rope(theta=5e5, longest=131_072),
    rows.fixed("use_bias", False),
    rows.Pair(_read_layers, _write_layers),
    rows.whole("intermediate_size", "d_ff", 12_288),
    rows.size("moe_num_experts", "moe.num_experts", 64, also="num_experts"),
    rows.whole("moe_k", "moe.top_k", 6, also="num_experts_per_tok"),
    rows.size("moe_intermediate_size", "moe.d_expert", 1536),
    rows.whole(
      *("moe_num_shared_experts", "moe.num_shared_experts", 2), null=0, least=0
    ),
  ),
  tensors=(
    *tensors.maps(_BIAS, form=_ROW),
    *tensors.gated("moe/shared/{}", "mlp.shared_experts.{}.weight"),
  ),
  constants={
    "attention.rope": "interleaved",
    "moe.router.renormalize": True,
    "moe.balancers.bias": {"name": "bias", "rate": 1e-3},
  },
  ends={"bos_token_id": 1, "eos_token_id": 2},
  ignored=("moe_norm_min",),
)
