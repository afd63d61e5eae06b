"""Encoder-decoders among the checkpoints of `tests.parity`, which runs this.

Beside logits, of texts with and without padding behind them, the files have greedy
texts and those of a beam search, with -1 after the token that ends a text.

The reference's NLLB-MoE is repaired first, see `repair`.
"""

import contextlib
import pathlib

import numpy as np

from tests import parity

LENGTHS = (
  17,
  12,
)  # Of inputs and of targets, longer than most capacities below.
NEW_TOKENS = 24
# A larger tied embedding would repeat the last token.
_SPREADS = {
  "switch_transformers": {"embedding": 0.6, "matrix": 0.4},
  "nllb-moe": {"embedding": 0.3, "matrix": 0.45},
  "t5": {"embedding": 0.3, "matrix": 0.5},
}
BEAMS = {"num_beams": 4, "length_penalty": 1.0, "early_stopping": False}


def cases():
  """{name: (model_type, options of its config)}."""
  switch = dict(
    d_model=14,
    d_kv=6,
    d_ff=11,
    vocab_size=37,
    num_heads=3,
    num_experts=5,
    decoder_start_token_id=0,
  )
  nllb = dict(
    d_model=18,
    vocab_size=37,
    max_position_embeddings=64,
    encoder_attention_heads=3,
    decoder_attention_heads=2,
    encoder_ffn_dim=11,
    decoder_ffn_dim=7,
    num_experts=5,
  )
  return {
    # Three slots, for 17 tokens of five experts.
    "switch_transformers_a": (
      "switch_transformers",
      switch
      | dict(
        num_layers=3,
        num_decoder_layers=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=2,
        expert_capacity=3,
      ),
    ),
    # No sparse layers in the decoder, which has one all the same.
    "switch_transformers_b": (
      "switch_transformers",
      switch
      | dict(
        num_layers=2,
        num_decoder_layers=3,
        num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=0,
        d_kv=4,
        num_experts=3,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=9,
        router_bias=True,
        tie_word_embeddings=False,
        dense_act_fn="gelu_new",
        layer_norm_epsilon=1e-5,
      ),
    ),
    # More sparse layers than there are layers make none.
    "switch_transformers_c": (
      "switch_transformers",
      switch
      | dict(
        d_model=10,
        num_heads=2,
        num_layers=2,
        num_decoder_layers=4,
        num_sparse_encoder_layers=3,
        num_sparse_decoder_layers=4,
        num_experts=4,
        expert_capacity=1,
      ),
    ),
    "t5_a": (
      "t5",
      dict(
        d_model=14,
        d_kv=6,
        d_ff=11,
        vocab_size=37,
        num_heads=3,
        num_layers=2,
        num_decoder_layers=3,
        decoder_start_token_id=0,
      ),
    ),
    # Gated, as the versions after the first, and not scaled.
    "t5_b": (
      "t5",
      dict(
        d_model=10,
        d_kv=4,
        d_ff=7,
        vocab_size=41,
        num_heads=2,
        num_layers=3,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=9,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        layer_norm_epsilon=1e-5,
        decoder_start_token_id=0,
      ),
    ),
    "nllb_moe_a": (
      "nllb-moe",
      nllb
      | dict(
        encoder_layers=3,
        decoder_layers=2,
        encoder_sparse_step=2,
        decoder_sparse_step=1,
      ),
    ),
    "nllb_moe_b": (
      "nllb-moe",
      nllb
      | dict(
        d_model=15,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=1,
        decoder_attention_heads=3,
        encoder_sparse_step=1,
        decoder_sparse_step=3,
        router_bias=True,
        moe_token_dropout=0.0,
        moe_eval_capacity_token_fraction=0.3,
        batch_prioritized_routing=True,
        normalize_router_prob_before_dropping=True,
      ),
    ),
    "nllb_moe_c": (
      "nllb-moe",
      nllb
      | dict(
        encoder_layers=3,
        decoder_layers=2,
        encoder_sparse_step=3,
        decoder_sparse_step=2,
        num_experts=4,
        scale_embedding=False,
        activation_function="gelu_new",
        moe_eval_capacity_token_fraction=-1.0,
        expert_capacity=4,
        normalize_router_prob_before_dropping=True,
      ),
    ),
    # Weights of what has a slot add up to 1.
    "nllb_moe_d": (
      "nllb-moe",
      nllb
      | dict(
        d_model=12,
        encoder_layers=2,
        decoder_layers=2,
        encoder_sparse_step=1,
        decoder_sparse_step=2,
        num_experts=4,
        moe_eval_capacity_token_fraction=0.35,
        batch_prioritized_routing=True,
        normalize_router_prob_before_dropping=False,
      ),
    ),
  }


# {name: (seed, the token that ends a text)}: of texts with many tokens, some of
# which end early.
DRAWN = {
  "switch_transformers_a": (6, 26),
  "switch_transformers_b": (8, 4),
  "switch_transformers_c": (10, 5),
  "t5_a": (3, 31),
  "t5_b": (5, 31),
  "nllb_moe_a": (0, 30),
  "nllb_moe_b": (6, 0),
  "nllb_moe_c": (8, 30),
  "nllb_moe_d": (10, 23),
}


@contextlib.contextmanager
def repair():
  """The reference with an NLLB-MoE that computes what its authors' does.

  That of transformers 5.24 sends all first choices to expert 1 and all others to
  expert 0. That of 4.57 is right and gives the logits of these files, text by text.
  Slots are those of a whole batch there, and of each text here.
  """
  import torch
  from transformers.models.nllb_moe import modeling_nllb_moe as reference

  def apply(self, hidden_states, router_mask, router_probs):
    kept = 1 - self.moe_token_dropout
    return sum(
      router_probs[:, e, None] * kept * self[f"expert_{e}"](hidden_states)
      for e in range(self.num_experts)
    )

  of_batch = reference.NllbMoeSparseMLP.forward

  def by_text(self, hidden_states, padding_mask=None):
    masks = [None] * len(hidden_states)
    if padding_mask is not None:
      whole = len(hidden_states), *padding_mask.shape[1:]
      masks = padding_mask.expand(whole).split(1)
    parts = zip(hidden_states.split(1), masks, strict=True)
    return torch.cat([of_batch(self, *part) for part in parts])

  experts, experts_of = (
    reference.NllbMoeExperts,
    reference.NllbMoeExperts.forward,
  )
  experts.forward = apply
  reference.NllbMoeSparseMLP.forward = by_text
  try:
    yield
  finally:
    experts.forward = experts_of
    reference.NllbMoeSparseMLP.forward = of_batch


def make(folder: pathlib.Path, only: str = "") -> None:
  """Writes every case: config.json, model.safetensors, expected.npz.

  Args:
    folder: of the checkpoints.
    only: the beginning of the names of those that are made; "": all.
  """
  for name, (model_type, options) in cases().items():
    if not name.startswith(only):
      continue
    seed, options["eos_token_id"] = DRAWN[name]
    model, path = _random(model_type, options, seed), folder / name
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    (path / "generation_config.json").unlink(missing_ok=True)
    texts = _texts(np.random.default_rng(seed), model.config)
    with repair():
      wanted = {
        "logits": logits(model, texts["inputs"], texts["targets"]),
        "logits_padded": logits(model, *_padded(texts, model.config)),
        **_generated(model, texts),
      }
    np.savez_compressed(path / "expected.npz", **texts, **wanted)
    parity.report(path, wanted["logits"])


def _random(model_type, options, seed):
  """A model whose every parameter matters."""
  import torch
  import transformers

  config = transformers.AutoConfig.for_model(model_type, **options)
  torch.manual_seed(seed)
  model = transformers.AutoModelForSeq2SeqLM.from_config(
    config, dtype=torch.float32, attn_implementation="eager"
  )
  model.eval()
  parity.randomise(model, **_SPREADS[model_type])
  if model_type == "nllb-moe":
    # A text with padding in it has other positions there; none has so.
    model.model.shared.weight.data[config.pad_token_id] = 0
  if not config.tie_word_embeddings:
    # Older versions of the reference have one embedding, and so have we.
    for stack in (model.encoder, model.decoder):
      stack.embed_tokens.weight.data.copy_(model.shared.weight)
  return model


def _texts(rng, config):
  """Two texts on either side, and where they end in another batch."""
  texts = {}
  for side, length in zip(("inputs", "targets"), LENGTHS):
    tokens = rng.integers(3, config.vocab_size, (2, length))
    lengths = np.array([length, rng.integers(length // 2, length)])
    texts[side] = tokens.astype(np.int32)
    texts[f"{side}_mask"] = np.arange(length) < lengths[:, None]
  return texts


def _padded(texts, config):
  """inputs, targets and their masks, with the reference's padding behind them."""
  masks = [texts[f"{side}_mask"] for side in ("inputs", "targets")]
  tokens = [
    np.where(mask, texts[side], config.pad_token_id)
    for side, mask in zip(("inputs", "targets"), masks)
  ]
  return *tokens, *masks


def logits(model, inputs, targets, inputs_mask=None, targets_mask=None):
  """The reference's logits of the token after each of the targets."""
  import torch

  masks = {
    "attention_mask": inputs_mask,
    "decoder_attention_mask": targets_mask,
  }
  masks = {
    k: torch.tensor(x.astype(int)) for k, x in masks.items() if x is not None
  }
  texts = {"input_ids": inputs, "decoder_input_ids": targets}
  texts = {k: torch.tensor(x.astype(int)) for k, x in texts.items()}
  with torch.no_grad():
    return model(**texts, **masks).logits.numpy().astype(np.float32)


def _generated(model, texts):
  """Texts of the reference for the padded inputs, and how it made them."""
  import torch
  from transformers.cache_utils import DynamicCache, EncoderDecoderCache

  config = model.config
  inputs, _, mask, _ = _padded(texts, config)
  options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
  options |= {"return_dict_in_generate": True, "output_scores": True}
  found = {"start": config.decoder_start_token_id, "eos": config.eos_token_id}
  for name, how in (("greedy", {"num_beams": 1}), ("beam4", BEAMS)):
    made = model.generate(
      torch.tensor(inputs.astype(int)),
      attention_mask=torch.tensor(mask.astype(int)),
      # Its own has as many layers as the encoder.
      cache=EncoderDecoderCache(DynamicCache(), DynamicCache()),
      **options,
      **how,
    )
    tokens = made.sequences.numpy()[:, 1:]
    ended = np.cumsum(tokens == config.eos_token_id, axis=1)
    over = (ended - (tokens == config.eos_token_id)) > 0
    tokens = np.where(over, -1, tokens).astype(np.int32)
    left = NEW_TOKENS - tokens.shape[1]
    found[name] = np.pad(tokens, ((0, 0), (0, left)), constant_values=-1)
  found["beam4_score"] = made.sequences_scores.numpy()
  return found | BEAMS


def check(folder: pathlib.Path, names) -> int:
  """Does what `parity.check` does, on the logits of texts without padding."""

  def without_padding(model, expected):
    with repair():
      return logits(model, expected["inputs"], expected["targets"])

  return parity.check(folder, names, "AutoModelForSeq2SeqLM", without_padding)
