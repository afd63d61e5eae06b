"""Tiny random checkpoints with the logits of the reference implementation.

  python -m tests.parity make     # writes tests/checkpoints/ anew
  python -m tests.parity check    # ours written back, read by the reference

Needs the extra `parity` (torch, transformers); the tests need only the files.
Every family has two or more, of different shapes: odd sizes, biases and scales
that are not trivial, groups of experts, shared experts, mixed layers. Those of
encoder-decoders are in `tests.hf_pairs`.
"""

import argparse
import pathlib
import sys
import tempfile

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "checkpoints"
LENGTH = 24  # Longer than every window and chunk below.
NEW_TOKENS = 32
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
YARN = {
  "rope_type": "yarn",
  "rope_theta": 10_000.0,
  "factor": 4.0,
  "original_max_position_embeddings": 16,
}


def cases():
  """{name: (model_type, options of its config)}."""
  small = dict(
    hidden_size=20,
    vocab_size=43,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
  )
  other = small | dict(hidden_size=14, num_attention_heads=3, vocab_size=37)
  other |= dict(num_key_value_heads=1, rms_norm_eps=1e-6)
  theta = {"rope_type": "default", "rope_theta": 500.0}
  latent = dict(
    kv_lora_rank=9,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    head_dim=4,
  )
  window, full = "sliding_attention", "full_attention"
  return {
    "mixtral_a": (
      "mixtral",
      small
      | dict(
        head_dim=6,
        intermediate_size=11,
        num_local_experts=5,
        num_experts_per_tok=2,
        rope_parameters=theta,
      ),
    ),
    "mixtral_b": (
      "mixtral",
      other
      | dict(
        head_dim=4,
        intermediate_size=7,
        num_local_experts=4,
        num_experts_per_tok=3,
        sliding_window=5,
        tie_word_embeddings=True,
      ),
    ),
    "qwen2_moe_a": (
      "qwen2_moe",
      small
      | dict(
        hidden_size=24,
        intermediate_size=18,
        moe_intermediate_size=7,
        shared_expert_intermediate_size=14,
        num_experts=6,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        decoder_sparse_step=1,
      ),
    ),
    "qwen2_moe_b": (
      "qwen2_moe",
      other
      | dict(
        hidden_size=18,
        intermediate_size=18,
        moe_intermediate_size=9,
        shared_expert_intermediate_size=9,
        num_hidden_layers=4,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=2,
        mlp_only_layers=[1],
      ),
    ),
    "qwen3_moe_a": (
      "qwen3_moe",
      small
      | dict(
        head_dim=6,
        intermediate_size=18,
        moe_intermediate_size=7,
        num_experts=6,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        rope_parameters=theta,
      ),
    ),
    "qwen3_moe_b": (
      "qwen3_moe",
      other
      | dict(
        head_dim=8,
        intermediate_size=10,
        moe_intermediate_size=5,
        num_hidden_layers=3,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        mlp_only_layers=[0],
        attention_bias=True,
        tie_word_embeddings=True,
      ),
    ),
    "olmoe_a": (
      "olmoe",
      small
      | dict(
        intermediate_size=7,
        num_experts=8,
        num_experts_per_tok=5,
        norm_topk_prob=False,
        hidden_size=24,
      ),
    ),
    "olmoe_b": (
      "olmoe",
      other
      | dict(
        hidden_size=18,
        num_key_value_heads=3,
        intermediate_size=9,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        clip_qkv=1.5,
      ),
    ),
    "deepseek_v3_a": (
      "deepseek_v3",
      small
      | latent
      | dict(
        num_key_value_heads=4,
        q_lora_rank=7,
        intermediate_size=18,
        moe_intermediate_size=6,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
      ),
    ),
    "deepseek_v3_b": (
      "deepseek_v3",
      other
      | latent
      | dict(
        num_key_value_heads=3,
        q_lora_rank=None,
        intermediate_size=10,
        moe_intermediate_size=5,
        first_k_dense_replace=0,
        n_routed_experts=6,
        n_shared_experts=2,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        norm_topk_prob=False,
        rope_interleave=False,
      ),
    ),
    "dbrx_a": (
      "dbrx",
      dict(
        d_model=20,
        n_heads=5,
        n_layers=2,
        max_seq_len=64,
        vocab_size=43,
        attn_config=dict(kv_n_heads=5, clip_qkv=1.0, rope_theta=500.0),
        ffn_config=dict(
          ffn_hidden_size=9,
          moe_num_experts=5,
          moe_top_k=3,
          moe_normalize_expert_weights=1.0,
        ),
        rope_parameters=theta,
      ),
    ),
    "dbrx_b": (
      "dbrx",
      dict(
        d_model=16,
        n_heads=4,
        n_layers=3,
        max_seq_len=64,
        vocab_size=37,
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10_000.0),
        ffn_config=dict(
          ffn_hidden_size=7,
          moe_num_experts=4,
          moe_top_k=2,
          moe_normalize_expert_weights=None,
        ),
      ),
    ),
    "llama4_text_a": (
      "llama4_text",
      small
      | dict(
        head_dim=6,
        intermediate_size=9,
        intermediate_size_mlp=15,
        num_hidden_layers=4,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
        no_rope_layers=[1, 1, 1, 0],
        use_qk_norm=True,
        attention_chunk_size=7,
        attn_temperature_tuning=True,
        floor_scale=8,
        attn_scale=0.3,
        rope_parameters={
          "rope_type": "llama3",
          "rope_theta": 500.0,
          "factor": 4.0,
          "low_freq_factor": 1.0,
          "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16,
        },
      ),
    ),
    "llama4_text_b": (
      "llama4_text",
      other
      | dict(
        head_dim=4,
        intermediate_size=7,
        intermediate_size_mlp=11,
        num_hidden_layers=4,
        num_local_experts=6,
        num_experts_per_tok=2,
        interleave_moe_layer_step=2,
        no_rope_layers=[1, 1, 1, 0],
        use_qk_norm=False,
        attention_chunk_size=10,
        attn_temperature_tuning=False,
        rope_parameters=theta,
      ),
    ),
    "gpt_oss_a": (
      "gpt_oss",
      small
      | dict(
        head_dim=6,
        intermediate_size=9,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=5,
        layer_types=[window, full],
        rope_parameters=YARN | {"truncate": False},
      ),
    ),
    "gpt_oss_b": (
      "gpt_oss",
      other
      | dict(
        head_dim=4,
        intermediate_size=7,
        num_hidden_layers=4,
        num_local_experts=6,
        num_experts_per_tok=4,
        sliding_window=7,
        layer_types=[window, full, window, full],
        rope_parameters=theta,
      ),
    ),
    "deepseek_v2_a": (
      "deepseek_v2",
      small
      | latent
      | dict(
        kv_lora_rank=10,  # The reference needs an even one.
        num_key_value_heads=4,
        q_lora_rank=7,
        intermediate_size=18,
        moe_intermediate_size=6,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        n_routed_experts=8,
        n_shared_experts=2,
        num_experts_per_tok=3,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        routed_scaling_factor=4.0,
        rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 0.7},
      ),
    ),
    "deepseek_v2_b": (
      "deepseek_v2",
      other
      | latent
      | dict(
        hidden_size=15,
        kv_lora_rank=8,
        num_key_value_heads=3,
        q_lora_rank=None,
        intermediate_size=10,
        moe_intermediate_size=5,
        first_k_dense_replace=0,
        n_routed_experts=6,
        n_shared_experts=1,
        num_experts_per_tok=2,
        topk_method="greedy",
      ),
    ),
    "glm4_moe_a": (
      "glm4_moe",
      small
      | dict(
        head_dim=8,
        intermediate_size=18,
        moe_intermediate_size=7,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        n_routed_experts=6,
        n_shared_experts=1,
        num_experts_per_tok=3,
        routed_scaling_factor=1.5,
        attention_bias=True,
        use_qk_norm=True,
        partial_rotary_factor=0.5,
        num_nextn_predict_layers=0,
      ),
    ),
    "glm4_moe_b": (
      "glm4_moe",
      other
      | dict(
        head_dim=16,
        intermediate_size=10,
        moe_intermediate_size=5,
        first_k_dense_replace=0,
        n_routed_experts=8,
        n_shared_experts=2,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        norm_topk_prob=False,
        rope_parameters=theta | {"partial_rotary_factor": 0.75},
        num_nextn_predict_layers=0,
      ),
    ),
    "ernie4_5_moe_a": (
      "ernie4_5_moe",
      small
      | dict(
        hidden_size=24,
        intermediate_size=18,
        moe_intermediate_size=7,
        num_hidden_layers=3,
        moe_num_experts=6,
        moe_k=3,
        moe_num_shared_experts=2,
        moe_layer_start_index=1,
        rope_parameters=theta,
        tie_word_embeddings=True,
      ),
    ),
    "ernie4_5_moe_b": (
      "ernie4_5_moe",
      other
      | dict(
        hidden_size=18,
        intermediate_size=10,
        moe_intermediate_size=5,
        moe_num_experts=4,
        moe_k=2,
        moe_num_shared_experts=0,
        moe_layer_start_index=0,
      ),
    ),
    "llama_a": (
      "llama",
      small
      | dict(
        hidden_size=24,
        head_dim=6,
        intermediate_size=11,
        rope_parameters={
          "rope_type": "llama3",
          "rope_theta": 500.0,
          "factor": 4.0,
          "low_freq_factor": 1.0,
          "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16,
        },
      ),
    ),
    "llama_b": (
      "llama",
      other
      | dict(
        hidden_size=18,
        num_key_value_heads=3,
        intermediate_size=10,
        attention_bias=True,
        tie_word_embeddings=True,
        rope_parameters=theta,
      ),
    ),
    "mistral_a": (
      "mistral",
      small | dict(head_dim=6, intermediate_size=11, sliding_window=5),
    ),
    "mistral_b": (
      "mistral",
      other
      | dict(
        head_dim=4,
        intermediate_size=7,
        sliding_window=None,
        tie_word_embeddings=True,
        rope_parameters=theta,
      ),
    ),
    "qwen2_a": ("qwen2", small | dict(hidden_size=24, intermediate_size=13)),
    "qwen2_b": (
      "qwen2",
      other
      | dict(
        hidden_size=18,
        intermediate_size=7,
        tie_word_embeddings=True,
        rope_parameters=theta,
      ),
    ),
    "qwen3_a": ("qwen3", small | dict(head_dim=6, intermediate_size=13)),
    "qwen3_b": (
      "qwen3",
      other
      | dict(
        head_dim=8,
        intermediate_size=7,
        attention_bias=True,
        tie_word_embeddings=True,
        rope_parameters=YARN,
      ),
    ),
  }


def make(folder: pathlib.Path, only: str = "") -> None:
  """Writes every case: config.json, model.safetensors, expected.npz.

  Args:
    folder: of the checkpoints.
    only: the beginning of the names of those that are made; "": all.
  """
  import torch

  for number, (name, (model_type, options)) in enumerate(cases().items()):
    if not name.startswith(only):
      continue
    model = _random(model_type, options, number)
    rng = np.random.default_rng(number)
    tokens = rng.integers(0, options["vocab_size"], (2, LENGTH))
    with torch.no_grad():
      logits = model(torch.tensor(tokens)).logits.numpy()
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    generated = _greedy(model, tokens[:, :5])
    (path / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(
      path / "expected.npz",
      tokens=tokens.astype(np.int32),
      logits=logits.astype(np.float32),
      generated=generated.astype(np.int32),
    )
    report(path, logits)


def report(path: pathlib.Path, logits: np.ndarray) -> None:
  """Prints the size of a checkpoint and of its logits."""
  size = sum(f.stat().st_size for f in path.iterdir())
  most = np.abs(logits).max()
  print(f"{path.name}: {size / 1e3:.0f} kB, |logits| <= {most:.1f}")


def _random(model_type, options, seed):
  """A model whose every parameter matters."""
  import torch
  import transformers

  config = transformers.AutoConfig.for_model(model_type, **options)
  torch.manual_seed(seed)
  model = transformers.AutoModelForCausalLM.from_config(
    config, dtype=torch.float32, **EAGER
  )
  model.eval()
  randomise(model)
  return model


def randomise(model, embedding: float = 1.0, matrix: float = 0.3) -> None:
  """Draws every parameter such that it matters, with torch's own generator.

  Args:
    model: of the reference.
    embedding, matrix: standard deviations of these parameters.
  """
  import torch

  with torch.no_grad():
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
      if "inv_freq" in name or "embed_positions" in name:
        continue
      scale = matrix if tensor.ndim > 1 else 0.2
      # Norms of nearly nothing would amplify rounding.
      looked_up = any(word in name for word in ("embed", "wte", "shared.w"))
      tensor.normal_(0.0, embedding if looked_up else scale)
      if "norm" in name and "bias" not in name:
        tensor += 1.0


def _greedy(model, tokens):
  """Token by token, from whole sequences."""
  import torch

  with torch.no_grad():
    for _ in range(NEW_TOKENS):
      logits = model(torch.tensor(tokens)).logits[:, -1].numpy()
      tokens = np.concatenate([tokens, logits.argmax(-1)[:, None]], axis=1)
  return tokens


def check(folder: pathlib.Path, names, auto_class: str, logits) -> int:
  """Saves models, and checks the logits of the reference that loads them.

  Args:
    folder: of the checkpoints.
    names: of those that are checked.
    auto_class: of the reference, which loads them.
    logits: (model of the reference, contents of expected.npz) -> its logits.
  """
  import torch
  import transformers

  from moe_jax import hf

  failed = 0
  for name in names:
    model, variables = hf.load(folder / name)
    with np.load(folder / name / "expected.npz") as file:
      expected = dict(file)
    with tempfile.TemporaryDirectory() as written:
      hf.save(written, model, variables, max_shard_bytes=20_000)
      read, about = getattr(transformers, auto_class).from_pretrained(
        written, dtype=torch.float32, **EAGER, output_loading_info=True
      )
      read.eval()
    difference = logits(read, expected) - expected["logits"]
    failed += not is_same(name, difference, about)
  print(f"{len(names) - failed} passed, {failed} failed")
  return 1 if failed else 0


def logits_of(model, expected) -> np.ndarray:
  """The reference's logits of a decoder."""
  import torch

  with torch.no_grad():
    return model(torch.tensor(expected["tokens"])).logits.numpy()


def is_same(name: str, difference: np.ndarray, about) -> bool:
  """Whether the reference read all and gives the same logits; prints it.

  Args:
    name: of the checkpoint.
    difference: of the logits.
    about: what it says of the tensors that it read.
  """
  off, strange = np.abs(difference).max(), [k for k, v in about.items() if v]
  good = off <= 1e-4 and not strange
  word = "passed" if good else "FAILED"
  print(f"{word}: {name} differs by {off:.1e} {strange or ''}")
  return good


def main(argv=None) -> int:
  """The command."""
  parser = argparse.ArgumentParser(
    prog="python -m tests.parity",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("what", choices=("make", "check"))
  parser.add_argument("--folder", type=pathlib.Path, default=FOLDER)
  words = "those whose names begin so; the others stay as they are"
  parser.add_argument("--only", default="", metavar="NAME", help=words)
  args = parser.parse_args(argv)

  from tests import hf_pairs

  if args.what == "make":
    make(args.folder, args.only)
    hf_pairs.make(args.folder, args.only)
    return 0
  decoders, pairs = (
    [name for name in some if name.startswith(args.only)]
    for some in (cases(), hf_pairs.cases())
  )
  failed = check(args.folder, decoders, "AutoModelForCausalLM", logits_of)
  return max(failed, hf_pairs.check(args.folder, pairs))


if __name__ == "__main__":
  sys.exit(main())
