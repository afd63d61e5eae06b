"""Text to tokens: bytes, or a tokenizer from a local file.

A tokenizer is a record of three things; token `end` closes a document, and is
the last of the vocabulary.
"""

import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.core.errors import ConfigError, first_line

_BYTE = re.compile("<0x[0-9A-F]{2}>")  # A piece that stands for one byte.


class Tokenizer(NamedTuple):
  """name: as it was asked for.
  encode: bytes -> int array of tokens, without an end.
  prompt: the same, with the special tokens that a model's input begins with.
  decode: tokens -> text.
  num_bytes_V: how many bytes of text each token stands for, 0 for the end; bits
    per byte are counted with it.
  key: changes with anything that changes the tokens.
  """

  name: str
  encode: Callable[[bytes], np.ndarray]
  prompt: Callable[[bytes], np.ndarray]
  decode: Callable[[Sequence[int]], str]
  num_bytes_V: np.ndarray
  key: str

  @property
  def vocab_size(self) -> int:
    return len(self.num_bytes_V)

  @property
  def end(self) -> int:
    return self.vocab_size - 1


def load(name: str | os.PathLike = "bytes") -> Tokenizer:
  """The tokenizer of that name.

  Args:
    name: "bytes", or a file: tokenizer.json of the library tokenizers, or a
      SentencePiece .model.

  Raises:
    ConfigError: no such file, not a tokenizer, or its library is missing.
  """
  if name == "bytes":
    return _bytes()
  path = pathlib.Path(name).expanduser()
  readers = {".json": _json, ".model": _sentencepiece}
  if path.suffix not in readers or not path.is_file():
    raise ConfigError(
      f'data.tokenizer = {str(name)!r} is neither "bytes" nor a file that is'
      " there, a tokenizer.json or a SentencePiece .model"
    )
  try:
    return readers[path.suffix](path)
  except ImportError as e:
    raise ConfigError(
      f"data.tokenizer = {str(name)!r} needs the package {e.name}; run: pip"
      " install 'moe_jax[data]'"
    ) from None
  except Exception as e:  # Their parsers raise plain Exception.
    raise ConfigError(
      f"data.tokenizer = {str(name)!r} cannot be read ({first_line(e)}); give a"
      " tokenizer.json or a SentencePiece .model"
    ) from None


def _bytes():
  def encode(text):
    return np.frombuffer(text, np.uint8)

  def decode(tokens):
    return bytes(t for t in tokens if t < 256).decode("utf-8", "replace")

  return Tokenizer(
    name="bytes",
    encode=encode,
    prompt=encode,
    decode=decode,
    num_bytes_V=np.append(np.ones(256, np.int32), np.int32(0)),
    key="bytes",
  )


def _json(path):
  import tokenizers

  tokenizer = tokenizers.Tokenizer.from_file(str(path))
  tokenizer.no_truncation()
  tokenizer.no_padding()
  content = json.loads(path.read_text())
  model = content["model"]
  # In byte-level vocabularies a character stands for a byte.
  by_bytes = "ByteLevel" in json.dumps(content.get("decoder"))
  added = content.get("added_tokens") or ()
  no_text = {t["content"] for t in added if t["special"]}
  no_text.add(model.get("unk_token"))
  size = tokenizer.get_vocab_size()
  pieces = [tokenizer.id_to_token(i) or "" for i in range(size)]

  def length(piece):
    if piece in no_text:
      return 0
    if model.get("byte_fallback") and _BYTE.fullmatch(piece):
      return 1
    return len(piece) if by_bytes else _length(piece)

  def encode(text, special=False):
    text = text.decode("utf-8", "replace")
    return np.asarray(tokenizer.encode(text, add_special_tokens=special).ids)

  return Tokenizer(
    str(path),
    encode,
    functools.partial(encode, special=True),
    lambda tokens: tokenizer.decode([t for t in tokens if t < size]),
    _with_end(map(length, pieces)),
    _key(path),
  )


def _sentencepiece(path):
  import sentencepiece

  model = sentencepiece.SentencePieceProcessor(model_file=str(path))
  lengths = []
  for i in range(model.get_piece_size()):
    control = model.is_control(i) or model.is_unknown(i)
    piece = model.id_to_piece(i)
    lengths.append(0 if control else 1 if model.is_byte(i) else _length(piece))

  def encode(text, begin=False):
    text = text.decode("utf-8", "replace")
    return np.asarray(model.encode(text, add_bos=begin), np.int64)

  size = model.get_piece_size()
  return Tokenizer(
    str(path),
    encode,
    functools.partial(encode, begin=model.bos_id() >= 0),
    lambda tokens: model.decode([int(t) for t in tokens if t < size]),
    _with_end(lengths),
    _key(path),
  )


def _length(piece):
  """Bytes of a piece in which a space is written as U+2581."""
  return len(piece.replace("\u2581", " ").encode())


def _with_end(lengths):
  return np.array([*lengths, 0], np.int32)


def _key(path):
  return hashlib.sha256(path.read_bytes()).hexdigest()
