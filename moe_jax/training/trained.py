"""A model with its weights and its tokenizer: of a run, or published."""

import argparse
import logging
import pathlib
from typing import Any, NamedTuple

from moe_jax.core.errors import ConfigError
from moe_jax.data import tokenizers
from moe_jax.run import config as config_lib


class Trained(NamedTuple):
  """model, variables: for `model.apply`, dropless, on one device or a mesh.

  tokenizer: of its text.
  ends: tokens that end a text, the first of which stands for the end of a
    document.
  """

  model: Any
  variables: dict
  tokenizer: tokenizers.Tokenizer
  ends: tuple[int, ...]


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags that `load` takes."""
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument(
    "--checkpoint", metavar="DIR", help="a work directory, or one checkpoint"
  )
  source.add_argument(
    "--hf", metavar="DIR", help="config.json, safetensors, tokenizer.json"
  )
  parser.add_argument(
    "--dtype",
    choices=("float32", "bfloat16"),
    default="float32",
    help="of --hf; a run has its own",
  )
  parser.add_argument(
    "--mesh",
    type=_sizes,
    metavar="DATA,FSDP,EXPERT,TENSOR",
    help="devices along each axis, -1: what is left; default: one device",
  )


def _sizes(text):
  try:
    return tuple(int(size) for size in text.strip("()").split(","))
  except ValueError:
    raise argparse.ArgumentTypeError(
      f"{text!r} is not four whole numbers, such as 1,1,-1,1"
    ) from None


def load(args: argparse.Namespace) -> Trained:
  """What the flags of `add_flags` ask for.

  Raises:
    ConfigError: as `of_run` and `published`, or an impossible mesh.
  """
  from moe_jax.core import parallel

  mesh = None if args.mesh is None else parallel.mesh_or_none(args.mesh)
  if args.hf:
    return published(args.hf, args.dtype, mesh)
  return of_run(args.checkpoint, mesh)


def of_run(path: str, mesh=None) -> Trained:
  """The newest checkpoint of a run, or one of them.

  Args:
    path: a work directory, or WORKDIR/checkpoints/STEP.
    mesh: from `parallel.make_mesh`; None: one device.

  Raises:
    ConfigError: there is no run, no checkpoint that can be read, or the model
      does not divide over the mesh.
  """
  import jax

  from moe_jax import models
  from moe_jax.core import parallel
  from moe_jax.training import checkpoint

  folder = pathlib.Path(path).absolute()
  runs = [
    f for f in (folder, *folder.parents[:2]) if (f / "config.json").exists()
  ]
  if not runs:
    raise ConfigError(f"{path} is no work directory of a run, nor in one")
  config = config_lib.load(str(runs[0] / "config.json"))
  section = config.model.to_dict()
  section["moe"] |= models.DROPLESS
  tokenizer = tokenizers.load(config.data.tokenizer)
  model = models.build(
    section,
    vocab_size=tokenizer.vocab_size,
    end_of_document=tokenizer.end if config.data.separate_documents else None,
    seq_len=1,
    batch_sizes=(parallel.token_shards(mesh),),
    mesh=mesh,
    plugins=config.plugins,
  )
  variables = checkpoint.load_variables(folder)
  if mesh is not None:
    variables = jax.device_put(variables, models.shardings(model))
  return Trained(model, variables, tokenizer, (tokenizer.end,))


def published(path: str, dtype: str = "float32", mesh=None) -> Trained:
  """The weights in a folder of config.json, safetensors and tokenizer.json.

  Args:
    path: the folder. Without a tokenizer.json tokens are bytes.
    dtype: of parameters and activations.
    mesh: as in `of_run`.

  Raises:
    ConfigError: see `interop.huggingface.load`; or a vocabulary too small.
  """
  from moe_jax.hf import huggingface

  folder = pathlib.Path(path)
  model, variables = huggingface.load(folder, mesh, dtype=dtype)
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
