"""Tokenizers: bytes, or a tokenizer from a local file.

The last token of a vocabulary ends a document; the file does not have it.
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

from moe_jax.core import files
from moe_jax.core.errors import ConfigError, first_line

_BYTE = "<0x[0-9A-F]{2}>"  # The pieces that stand for one byte.
_MOST_IDS = 2**24  # Published vocabularies have up to 2^18.
# Every call compares up to _SAMPLES texts of fewer than _SAMPLE characters.
_SAMPLES, _SAMPLE = 4, 2**14
_FORMER_SPACE = (
  "\u180e"  # White space in one library's version of Unicode alone.
)
# Texts in which tokenizers differ if they differ at all.
_PROBES = (
  "",
  " ",
  "The first  two\n\n\tlines, it's 1234567 o'clock.\r\n",
  "def f(x_1, *a):\n    return {x_1: 3.14e-10}  # <0x0A> </s> <unk>",
  "Zwölf Boxkämpfer; déjà vu; \u0438\u043c\u044f; \u540d\u524d\u306f; \u05e9\u05dc\u05d5\u05dd",
  "e\u0301 \ufb01 \u2160 \u00a0\u3000\u2581 \U0001f600\u200d\U0001f680 \x00\x7f\ufffd",
)


class Tokenizer(NamedTuple):
  """Functions between text and tokens, and the size of every token.

  name: as in the config.
  encode_all: texts as bytes -> the tokens of each as a document, without its
    end, in integers [N]. Text that spells a special token is encoded as text.
    Libraries share the texts among all cores.
  prompt: text as bytes -> int64 tokens of a model's input: `begin`, and the
    text, which may spell special tokens.
  decode: tokens -> text.
  num_bytes_V: bytes of text that each token stands for, 0 for special tokens
    and the end; bits per byte are counted with it.
  key: a word that is different where the tokens of any document are different.
  begin: special tokens that the inputs of the file's model begin with.
  """

  name: str
  encode_all: Callable[[Sequence[bytes]], list[np.ndarray]]
  prompt: Callable[[bytes], np.ndarray]
  decode: Callable[[Sequence[int]], str]
  num_bytes_V: np.ndarray
  key: str
  begin: tuple[int, ...] = ()

  def encode(self, text: bytes) -> np.ndarray:
    """Returns the tokens of one document, see `encode_all`."""
    return self.encode_all([text])[0]

  @property
  def vocab_size(self) -> int:
    """V, with the token that ends a document."""
    return len(self.num_bytes_V)

  @property
  def end(self) -> int:
    """The token that ends a document."""
    return self.vocab_size - 1


def load(name: str | os.PathLike = "bytes") -> Tokenizer:
  """Returns the tokenizer of a name.

  Args:
    name: "bytes", or a file: tokenizer.json of the library tokenizers, or a
      SentencePiece .model.

  Raises:
    ConfigError: there is no such file, or it is no tokenizer, or its library is
      missing.
  """
  if name == "bytes":
    return _bytes()
  path = pathlib.Path(name).expanduser()
  what = f"data.tokenizer = {str(name)!r}"
  readers = {".json": _json, ".model": _sentencepiece}
  if path.suffix not in readers or not path.is_file():
    raise ConfigError(
      f'{what} is neither "bytes" nor a file that is there, a tokenizer.json or'
      " a SentencePiece .model"
    )
  try:
    encode_all, with_special, decode, sizes_V, begin = readers[path.suffix](
      path
    )
  except ImportError as e:
    raise ConfigError(
      f"{what} needs the package {e.name}; run: pip install 'moe_jax[data]'"
    ) from None
  except (ConfigError, KeyboardInterrupt, SystemExit):
    raise
  except BaseException as e:  # Rust's panics are no subclass of Exception.
    raise ConfigError(
      f"{what} cannot be read ({first_line(e)}); give a tokenizer.json or a"
      " SentencePiece .model"
    ) from None
  end = len(sizes_V) - 1

  def words(text):
    return text.decode("utf-8", "replace")

  return Tokenizer(
    str(path),
    lambda texts: encode_all([words(text) for text in texts]),
    lambda text: np.array([*begin, *with_special(words(text))], np.int64),
    lambda tokens: decode([int(t) for t in tokens if t < end]),
    sizes_V,
    hashlib.sha256(path.read_bytes()).hexdigest(),
    begin,
  )


def _bytes():
  def encode(text):
    return np.frombuffer(text, np.uint8).astype(np.int64)

  def encode_all(texts):
    return [np.frombuffer(text, np.uint8) for text in texts]

  def decode(tokens):
    return bytes(t for t in tokens if t < 256).decode("utf-8", "replace")

  sizes_V = np.append(np.ones(256, np.int32), np.int32(0))
  return Tokenizer("bytes", encode_all, encode, decode, sizes_V, "bytes")


# The readers of a file return texts -> ids of each as a document, text -> ids where
# text may spell special tokens, ids -> text, `num_bytes_V` and `begin`.


def _json(path):
  import tokenizers

  content = files.read_json(path, "a tokenizer.json", "give another file")
  model = content["model"]
  added = {t["content"]: t for t in content.get("added_tokens") or ()}
  pieces, unknown = model["vocab"], model.get("unk_token")
  if isinstance(pieces, list):  # A Unigram model: [piece, score] by id.
    if model.get("unk_id") is not None:
      unknown = pieces[model["unk_id"]][0]
    pieces = {piece: i for i, (piece, _) in enumerate(pieces)}
  ids = {text: t["id"] for text, t in added.items()} | pieces
  if pieces is model["vocab"]:
    model["vocab"] = ids  # Keeps ids of added tokens after a gap.
  model.pop("dropout", None)  # Equal text has equal tokens.
  tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
  tokenizer.no_truncation()
  tokenizer.no_padding()
  if (
    any(tokenizer.token_to_id(text) != t["id"] for text, t in added.items())
    or len(set(ids.values())) < len(ids)
    or max(ids.values()) >= _MOST_IDS
  ):
    raise ValueError(f"a token has no id of its own up to {_MOST_IDS}")
  special = {text for text, t in added.items() if t["special"]}
  many = _fast(tokenizer, content, path) or functools.partial(_many, tokenizer)
  return (
    _document_encoder(tokenizer, many, path, special, unknown),
    lambda text: _ids(tokenizer, text),
    tokenizer.decode,
    _sizes(content, pieces, ids, special | {unknown}),
    _begin(tokenizer, path, ids),
  )


def _ids(tokenizer, text, *, as_text=False):
  """Returns ids; with `as_text`, a special token in the text stays text."""
  tokenizer.encode_special_tokens = as_text
  return tokenizer.encode(text, add_special_tokens=False).ids


def _many(tokenizer, texts):
  """Returns the ids of each text; a special token in a text stays text."""
  tokenizer.encode_special_tokens = True
  encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
  return [np.array(encoding.ids, np.int64) for encoding in encodings]


def _fast(tokenizer, content, path):
  """Returns a function that does the work of `_many` faster, or None.

  The library fastokens is used if it is there, and if it can read the file. In
  every call it must agree with the library tokenizers on a sample.
  """
  try:
    import fastokens

    fast = fastokens.Tokenizer.from_json_str(json.dumps(content))
    fast.no_truncation()
    fast.no_padding()
  except (KeyboardInterrupt, SystemExit):
    raise
  except BaseException:  # Rust's panics are no subclass of Exception.
    return None

  def many(texts):
    flat, ends = fast.encode_batch_flat(texts, split_special_tokens=True)
    flat, ends = np.frombuffer(flat, "<u4"), np.frombuffer(ends, "<u8").tolist()
    made = [flat[i:j] for i, j in zip(ends, ends[1:])]
    for i in (i for i, text in enumerate(texts) if _FORMER_SPACE in text):
      made[i] = _many(tokenizer, [texts[i]])[0]
    return made

  def agrees(texts):
    return all(map(np.array_equal, many(texts), _many(tokenizer, texts)))

  def checked(texts):
    if not agrees([t for t in texts if len(t) < _SAMPLE][:_SAMPLES]):
      raise ConfigError(
        f"the packages fastokens and tokenizers read a document with data.tokenizer ="
        f" {str(path)!r} differently; run: pip uninstall fastokens"
      )
    return many(texts)

  return checked if agrees(_PROBES) else None


def _document_encoder(tokenizer, many, path, special, unknown):
  """Returns texts -> ids in which text that spells a special token stays text.

  Some models match text with every piece of their vocabulary, special ones too.
  So a spelled special piece is cut after its first character.
  """
  from tokenizers import Regex, pre_tokenizers

  words = special | {unknown} - {None}
  spelled = "|".join([_BYTE, *map(re.escape, words)])
  cut = pre_tokenizers.Split(
    Regex(rf"(?={spelled})[\s\S]"), "merged_with_previous"
  )
  usual = tokenizer.pre_tokenizer
  cutting = pre_tokenizers.Sequence([usual, cut] if usual else [cut])
  control = {tokenizer.token_to_id(word) for word in special - {unknown}}
  controls, search = np.array(sorted(control)), re.compile(spelled).search

  def cut_up(text):
    tokenizer.pre_tokenizer = cutting
    tokens = _ids(tokenizer, text, as_text=True)
    tokenizer.pre_tokenizer = usual
    for token in control.intersection(tokens):
      raise ConfigError(
        f"a document spells {tokenizer.id_to_token(token)!r}, a special token"
        f" that data.tokenizer = {str(path)!r} cannot encode as text; take"
        " another tokenizer, or leave the document out"
      )
    return np.array(tokens, np.int64)

  def encode_all(texts):
    made = many(texts)
    for i, text in enumerate(texts):
      if np.isin(made[i], controls).any() or search(text):
        made[i] = cut_up(text)
    return made

  return encode_all


def _begin(tokenizer, path, ids):
  """Returns the special tokens that the file's template puts first.

  A tokenizer_config.json beside the file may add a token, or leave it out.
  """
  some_text = next((p for p in ids if _ids(tokenizer, p, as_text=True)), "")
  encoding = tokenizer.encode(some_text)
  # Tokens that belong to no sequence come from the template.
  begin = tuple(encoding.ids[: [*encoding.sequence_ids, 0].index(0)])
  file = path.with_name("tokenizer_config.json")
  if file.exists():
    settings = files.read_json(file, "settings of a tokenizer", "correct it")
    if settings.get("add_bos_token") is False:
      return ()
    if settings.get("add_bos_token") and not begin:
      token = settings["bos_token"]
      return (ids[token["content"] if isinstance(token, dict) else token],)
  return begin


def _sizes(content, pieces, ids, no_text):
  """Returns `Tokenizer.num_bytes_V` of a tokenizer.json."""
  from tokenizers import pre_tokenizers

  model = content["model"]
  steps = [content.get(k) for k in ("normalizer", "pre_tokenizer", "decoder")]
  by_bytes = '"ByteLevel"' in json.dumps(steps)
  # Each of these characters stands for a byte in byte-level vocabularies.
  letters = set(pre_tokenizers.ByteLevel.alphabet() if by_bytes else "")
  prefix = model.get("continuing_subword_prefix") or ""
  sizes_V = np.zeros(max(ids.values()) + 2, np.int32)
  for piece in ids.keys() - no_text:
    if piece in pieces and letters.issuperset(piece):
      size = len(piece)
    elif by_bytes or piece not in pieces:  # An added token, as it is written.
      size = len(piece.encode())
    elif model.get("byte_fallback") and re.fullmatch(_BYTE, piece):
      size = 1
    else:
      size = _length(piece.removeprefix(prefix))
    sizes_V[ids[piece]] = size
  return sizes_V


def _sentencepiece(path):
  import sentencepiece

  model = sentencepiece.SentencePieceProcessor(model_file=str(path))
  size = model.get_piece_size()
  sizes_V = np.zeros(size + 1, np.int32)
  for i in range(size):
    if model.is_byte(i):
      sizes_V[i] = 1
    elif not (model.is_control(i) or model.is_unknown(i)):
      sizes_V[i] = _length(model.id_to_piece(i))
  begin = (model.bos_id(),) if model.bos_id() >= 0 else ()

  def encode_all(texts):
    return [np.array(ids, np.int64) for ids in model.encode(texts)]

  return encode_all, model.encode, model.decode, sizes_V, begin


def _length(piece):
  """Returns the bytes of a piece in which a space is written as U+2581."""
  return len(piece.replace("\u2581", " ").encode())
