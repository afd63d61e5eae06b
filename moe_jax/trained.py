"""A model with its weights and its tokenizer: of a run, or published."""

import dataclasses
import logging
import pathlib
from typing import Any, NamedTuple

from moe_jax import config as config_lib
from moe_jax import tokenizers
from moe_jax.errors import ConfigError


class Trained(NamedTuple):
  """model, variables: for `model.apply`, dropless.

  tokenizer: of its text.
  ends: tokens that end a text, the first of which stands for the end of a
    document.
  """

  model: Any
  variables: dict
  tokenizer: tokenizers.Tokenizer
  ends: tuple[int, ...]


def of_run(path: str, batch: int = 1, seq_len: int = 1) -> Trained:
  """The newest checkpoint of a run, or one of them.

  Args:
    path: a work directory, or WORKDIR/checkpoints/STEP.
    batch: sequences that the model is to take at a time.
    seq_len: tokens of each.

  Raises:
    ConfigError: there is no run, or no checkpoint that can be read.
  """
  from moe_jax import checkpoint, models

  folder = pathlib.Path(path).absolute()
  runs = [
    f for f in (folder, *folder.parents[:2]) if (f / "config.json").exists()
  ]
  if not runs:
    raise ConfigError(f"{path} is no work directory of a run, nor in one")
  config = config_lib.load(str(runs[0] / "config.json"))
  tokenizer = tokenizers.load(config.data.tokenizer)
  model = models.build(
    config.model,
    vocab_size=tokenizer.vocab_size,
    end_of_document=tokenizer.end if config.data.separate_documents else None,
    seq_len=seq_len,
    batch_sizes=(batch,),
    plugins=config.plugins,
  )
  variables = checkpoint.load_variables(folder)
  return Trained(dropless(model), variables, tokenizer, (tokenizer.end,))


def published(path: str, dtype: str = "float32") -> Trained:
  """The weights in a folder of config.json, safetensors and tokenizer.json.

  Args:
    path: the folder. Without a tokenizer.json tokens are bytes.
    dtype: of parameters and activations.

  Raises:
    ConfigError: see `interop.huggingface.load`; or a vocabulary too small.
  """
  from moe_jax.interop import huggingface

  folder = pathlib.Path(path)
  model, variables = huggingface.load(folder, dtype=dtype)
  ends = huggingface.read_config(folder).get("eos_token_id")
  ends = () if ends is None else (ends,) if isinstance(ends, int) else ends
  file = folder / "tokenizer.json"
  tokenizer = tokenizers.load(file if file.exists() else "bytes")
  if not file.exists():
    logging.warning("%s is not there: tokens are the bytes of the text", file)
  # The tokenizer's own last token is our end of a document.
  if tokenizer.vocab_size - 1 > model.arch.vocab_size:
    raise ConfigError(
      f"the tokenizer of {path} has {tokenizer.vocab_size - 1} tokens, and the"
      f" model {model.arch.vocab_size}; put the model's tokenizer.json beside it"
    )
  return Trained(model, variables, tokenizer, tuple(ends))


def dropless(model):
  """The same model, whose experts take every token that is sent to them."""
  from moe_jax import registry
  from moe_jax.models import moe

  arch = model.arch
  if arch.recipe is None:
    return model
  recipe = dataclasses.replace(
    arch.recipe, dispatcher=registry.load("dispatchers", "sorted")
  )
  return model.clone(
    arch=dataclasses.replace(arch, recipe=recipe, grouping=moe.Grouping())
  )
