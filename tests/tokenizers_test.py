"""Tokenizers: the ids of their file, bytes of text, and special tokens."""

import json
import sys

import fastokens
import numpy as np
import pytest
import tokenizers as library
from tokenizers import decoders, models, pre_tokenizers, processors

from moe_jax.core.errors import ConfigError
from moe_jax.data.text import tokenizers

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


TEXTS = [f"Größe {i}: the quick brown fox, déjà vu.\n" * 9 for i in range(80)]


def make_tokenizer(kind, folder):
  """A small tokenizer, trained on TEXTS."""
  if kind == "sentencepiece":
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(TEXTS),
      model_prefix=str(folder / "m"),
      vocab_size=340,
      byte_fallback=True,
      hard_vocab_limit=False,
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      minloglevel=2,
    )
    return folder / "m.model"
  tokenizer = library.Tokenizer(library.models.BPE())
  tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  tokenizer.decoder = library.decoders.ByteLevel()
  trainer = library.trainers.BpeTrainer(
    vocab_size=400,
    initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(TEXTS, trainer)
  tokenizer.save(str(folder / "tokenizer.json"))
  return folder / "tokenizer.json"


def by_bytes(vocab=None, **options):
  """A byte-level BPE without merges, of 256 tokens if nothing else is said."""
  vocab = vocab or {c: i for i, c in enumerate(ALPHABET)}
  tokenizer = library.Tokenizer(models.BPE(vocab=vocab, merges=[], **options))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


def unigram(*pieces, **options):
  """A Unigram model of single characters and these pieces."""
  letters = [(c, -5.0) for c in "▁abcs</>x0A|"]
  pieces = [("<unk>", 0.0), *((p, 0.0) for p in pieces), *letters]
  tokenizer = library.Tokenizer(models.Unigram(pieces, 0, **options))
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
  tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
  return tokenizer


def load(folder, tokenizer, added=None, **changes):
  """Loads it from a file with some sections changed.

  Args:
    added: {content: (id, special)} of the added tokens.
  """
  content = json.loads(tokenizer.to_str()) | changes
  if added is not None:
    content["added_tokens"] = [
      {"id": i, "content": text, "special": special, **FLAGS}
      for text, (i, special) in added.items()
    ]
  path = folder / "tokenizer.json"
  path.write_text(json.dumps(content))
  return tokenizers.load(path)


def num_bytes(tokenizer, text):
  return int(tokenizer.num_bytes_V[tokenizer.encode(text.encode())].sum())


# Ids.


def gapped(gap):
  return by_bytes({c: i + gap * (i >= 65) for i, c in enumerate(ALPHABET)})


@pytest.mark.parametrize("gap", [1, 3, 1000])
def test_the_end_of_a_document_is_behind_the_largest_id(gap, tmp_path):
  found = load(tmp_path, gapped(gap))
  assert found.end == 256 + gap and found.vocab_size == 257 + gap
  assert found.num_bytes_V.shape == (257 + gap,)
  assert found.num_bytes_V.sum() == 256
  text = "xíy <\U0001f600>"
  tokens = found.encode(text.encode())
  assert tokens.dtype == np.int64
  assert tokens.max() < found.end
  assert num_bytes(found, text) == len(text.encode())
  assert found.decode([*tokens, found.end]) == text


def test_added_tokens_keep_the_ids_of_the_file(tmp_path):
  added = {"<eos>": (300, True), "<user>": (310, False)}
  found = load(tmp_path, by_bytes(), added)
  assert found.end == 311
  assert found.prompt(b"<eos><user>").tolist() == [300, 310]
  assert found.decode([310]) == "<user>"
  # After a gap, the library would give the first one the id of a letter.
  found = load(tmp_path, gapped(3), {"<eos>": (259, True)})
  assert found.prompt(b"<eos>").tolist() == [259] and found.end == 260
  letters = found.encode(bytes(range(65, 123)))
  assert len(set(letters.tolist()) - {259}) == 58
  # A Unigram model has no gaps.
  found = load(tmp_path, unigram(), {"<eos>": (13, True)})
  assert found.prompt(b"a<eos>").tolist() == [2, 13]


@pytest.mark.parametrize(
  ("made", "added"),
  [
    (by_bytes(), {"<eos>": (70, True)}),  # A letter has this id.
    (by_bytes(), {"<eos>": (300, True), "<bos>": (300, True)}),
    (by_bytes(), {"a": (300, False)}),  # A letter has another id.
    (by_bytes(), {"<eos>": (2**24, True)}),
    (by_bytes(), {"<eos>": (2**31, True)}),
    (unigram(), {"<eos>": (50, True)}),
    (unigram(), {"<eos>": (2, True)}),
  ],
)
def test_ids_that_cannot_be_kept_are_refused(made, added, tmp_path):
  with pytest.raises(ConfigError, match="no id of its own up to 16777216"):
    load(tmp_path, made, added)


# Bytes.


def test_added_tokens_have_the_bytes_that_they_are_written_in(tmp_path):
  added = {
    "<｜User｜>": (256, False),
    "<｜a▁b｜>": (257, False),
    "ж": (258, False),
    "  ": (259, False),
    "</s>": (260, True),
  }
  found = load(tmp_path, by_bytes(), added)
  assert found.num_bytes_V[256:].tolist() == [12, 13, 2, 2, 0, 0]
  text = "a<｜User｜>  ж</s> <｜a▁b｜>ü"
  tokens = found.encode(text.encode())
  assert {256, 257, 258, 259} < set(tokens.tolist())
  assert num_bytes(found, text) == len(text.encode())
  assert found.decode(tokens) == text
  added = {"<unk>": (0, True), "▁▁": (13, False), "<ü▁>": (14, False)}
  found = load(tmp_path, unigram(), added)
  assert found.num_bytes_V[12:].tolist() == [1, 6, 7, 0]


def test_an_added_token_of_the_models_vocabulary_has_the_models_bytes(tmp_path):
  """Gemma's runs of spaces are such tokens, spelled with spaces."""
  spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
  found = load(
    tmp_path,
    unigram("▁▁"),
    {"▁▁": (1, False)},
    normalizer=spaces,
    pre_tokenizer=None,
  )
  assert found.encode(b"a  a").tolist() == [3, 1, 3]
  assert num_bytes(found, "a  a") == 4


def test_an_unknown_token_stands_for_no_bytes(tmp_path):
  found = load(tmp_path, unigram())  # Not among the added tokens.
  assert found.encode("aé".encode()).tolist() == [2, 0]
  assert num_bytes(found, "aé") == 1


def test_the_prefix_of_the_inside_of_a_word_is_no_text(tmp_path):
  words = {"[UNK]": 0, "ab": 1, "##c": 2}
  made = library.Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
  made.pre_tokenizer = pre_tokenizers.Whitespace()
  found = load(tmp_path, made)
  assert found.encode(b"abc").tolist() == [1, 2]
  assert num_bytes(found, "abc") == 3


def test_bytes_of_a_vocabulary_that_falls_back_to_bytes(tmp_path):
  """Llama spells spaces as U+2581, and letters that it lacks in bytes."""
  words = ["<unk>", "<s>", "<0x0A>", "<0xC3>", "<0xA9>", "\u2581", "a", "b"]
  model = library.models.BPE(
    vocab={w: i for i, w in enumerate([*words, "ab"])},
    merges=[("a", "b")],
    unk_token="<unk>",
    byte_fallback=True,
  )
  tokenizer = library.Tokenizer(model)
  tokenizer.normalizer = library.normalizers.Replace(" ", "\u2581")
  tokenizer.add_special_tokens(["<s>"])
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  found = tokenizers.load(tmp_path / "tokenizer.json")
  assert found.num_bytes_V.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 2, 0]
  text = "ab a\né".encode()
  assert found.num_bytes_V[found.encode(text)].sum() == len(text)


def test_a_byte_that_is_spelled_is_text(tmp_path):
  """The text "<0x0A>" does not become the token of a newline."""
  found = load(tmp_path, unigram("<0x0A>", byte_fallback=True))
  for text in ("a<0x0A>b", "a\nb", "<0x0A>", "<0x0A><0x0A>\n"):
    tokens = found.encode(text.encode())
    assert (tokens == 1).sum() == text.count("\n"), text
    assert num_bytes(found, text) == len(text)
    assert found.decode(tokens).replace("<0x0A>", "\n") == text.replace(
      "<0x0A>", "\n"
    )


@pytest.mark.parametrize("name", ["bytes", "json", "sentencepiece"])
def test_no_text_has_no_tokens(name, tmp_path):
  if name == "json":
    found = load(tmp_path, by_bytes())
  else:
    path = name if name == "bytes" else make_tokenizer(name, tmp_path)
    found = tokenizers.load(path)
  for tokens in (found.encode(b""), found.encode(b"a")):
    assert tokens.dtype.kind in "iu" and tokens.ndim == 1
  assert found.encode(b"").size == 0
  assert found.prompt(b"").tolist() == list(found.begin)
  assert found.decode([]) == ""


# Special tokens.

SPELLED = "print('</s>') or <s></s><|x|>"


def ignoring_merges():
  made = by_bytes({c: i for i, c in enumerate([*ALPHABET, "</s>"])})
  model = json.loads(made.to_str())["model"] | {"ignore_merges": True}
  return made, {"model": model, "pre_tokenizer": None}


def merging():
  """Merges that make the special token out of text."""
  vocab = {c: i for i, c in enumerate(ALPHABET)}
  vocab |= {"/s": 256, "/s>": 257, "</s>": 258}
  merges = [("/", "s"), ("/s", ">"), ("<", "/s>")]
  made = library.Tokenizer(models.BPE(vocab=vocab, merges=merges))
  made.decoder = decoders.ByteLevel()
  return made


def words():
  vocab = {c: i for i, c in enumerate(["[UNK]", "</s>", "a", "<", "/s>"])}
  made = library.Tokenizer(models.WordLevel(vocab, "[UNK]"))
  made.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
  return made


@pytest.mark.parametrize(
  ("made", "changes", "text"),
  [
    (by_bytes(), {}, SPELLED),
    (*ignoring_merges(), "</s>"),
    (merging(), {}, "a</s></s>"),
    (unigram("</s>"), {}, "a</s>a <s> </s></s>"),
    (words(), {}, "</s>"),
  ],
)
def test_text_that_spells_a_special_token_is_text(
  made, changes, text, tmp_path
):
  made.add_special_tokens(["</s>"])
  changes = {k: v for k, v in changes.items() if v} | {
    k: None for k, v in changes.items() if not v
  }
  found = load(tmp_path, made, **changes)
  end = made.token_to_id("</s>")
  tokens = found.encode(text.encode())
  assert end not in tokens
  assert num_bytes(found, text) == len(text)
  assert found.decode(tokens).replace(" ", "") == text.replace(" ", "")
  # A prompt may spell it.
  assert found.prompt(b"</s>")[-1] == end
  np.testing.assert_array_equal(found.encode(text.encode()), tokens)


def test_ordinary_text_is_cut_nowhere(tmp_path):
  made = library.Tokenizer.from_file(
    str(make_tokenizer("tokenizers", tmp_path))
  )
  made.add_special_tokens(["</s>"])
  found = load(tmp_path, made)
  for text in TEXTS[:3]:
    want = made.encode(text).ids
    assert found.encode(text.encode()).tolist() == want
    assert found.prompt(text.encode()).tolist() == want


def test_a_special_token_of_one_character_that_text_has_is_refused(tmp_path):
  made = words()
  made.add_special_tokens(["a"])
  found = load(tmp_path, made)
  with pytest.raises(ConfigError, match="spells 'a', a special token"):
    found.encode(b"a")
  assert found.encode(b"</s>").size


ENDS = {"<s>": (256, True), "</s>": (257, True)}
IDS = [("<s>", 256), ("</s>", 257)]


def template(single):
  return processors.TemplateProcessing(single=single, special_tokens=IDS)


@pytest.mark.parametrize(
  ("processor", "begin"),
  [
    (None, []),
    (template("<s> $A"), [256]),
    (template("<s> $A </s>"), [256]),
    (template("$A </s>"), []),
    (template("<s> </s> $A </s>"), [256, 257]),
    (processors.RobertaProcessing(("</s>", 257), ("<s>", 256)), [256]),
    (processors.Sequence([processors.ByteLevel(), template("<s> $A")]), [256]),
  ],
)
def test_a_prompt_begins_with_the_template_and_never_ends_with_it(
  processor, begin, tmp_path
):
  made = by_bytes()
  made.add_special_tokens(list(ENDS))
  if processor is not None:
    made.post_processor = processor
  found = load(tmp_path, made)
  text = [ALPHABET.index(c) for c in "ab"]
  assert found.begin == tuple(begin)
  assert found.prompt(b"ab").tolist() == [*begin, *text]
  assert found.prompt(b"").tolist() == begin
  assert found.encode(b"ab").tolist() == text
  assert found.prompt(b"a</s>").tolist() == [*begin, text[0], 257]


@pytest.mark.parametrize(
  ("settings", "begin"),
  [
    ({}, (256,)),
    ({"add_bos_token": True, "bos_token": "</s>"}, (256,)),
    ({"add_bos_token": False}, ()),
  ],
)
def test_the_settings_beside_it_may_leave_the_begin_out(
  settings, begin, tmp_path
):
  made = by_bytes()
  made.add_special_tokens(list(ENDS))
  made.post_processor = template("<s> $A")
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
  assert load(tmp_path, made).begin == begin


@pytest.mark.parametrize("token", ["<s>", {"content": "<s>", "lstrip": False}])
def test_the_settings_beside_it_may_add_a_begin(token, tmp_path):
  """Families whose loaders add it have such settings."""
  settings = {"add_bos_token": True, "bos_token": token}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
  assert load(tmp_path, by_bytes(), ENDS).begin == (256,)
  (tmp_path / "tokenizer_config.json").write_text("{")
  with pytest.raises(ConfigError, match="tokenizer_config.json is not"):
    load(tmp_path, by_bytes(), ENDS)


def test_what_sentencepiece_begins_with(tmp_path):
  found = tokenizers.load(make_tokenizer("sentencepiece", tmp_path))
  assert found.begin == (1,)
  tokens = found.encode(b"fox </s> <0x0A>")
  assert not {0, 1, 2} & set(tokens.tolist())
  assert found.prompt(b"fox").tolist() == [1, *found.encode(b"fox")]
  assert num_bytes(found, "fox </s> <0x0A>") == 15


# Damage.


@pytest.mark.parametrize(
  "changes",
  [
    {"model": None},
    {"model": {"type": "BPE", "vocab": {}, "merges": []}},
    {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
    {"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}},
    {"model": {"type": "Unigram", "vocab": [["a"]], "unk_id": 0}},
    {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 9}},
    {"added_tokens": [{"id": 256}]},
    {"added_tokens": {"a": 1}},
    # The library panics, which is no Exception.
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
  ],
)
def test_a_damaged_tokenizer_is_one_sentence(changes, tmp_path):
  with pytest.raises(ConfigError, match="tokenizer.json' cannot be read") as e:
    load(tmp_path, by_bytes(), **changes)
  assert len(str(e.value).splitlines()) == 1


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
  for name, text in {
    "tokenizer.json": "{}",
    "deep.json": "[" * 1000,
    "list.json": "[]",
    "m.model": "{}",
  }.items():
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=name):
      tokenizers.load(tmp_path / name)


def test_equal_text_has_equal_tokens(tmp_path):
  """Also where a model was saved with the dropout of its training."""
  made = library.Tokenizer.from_file(
    str(make_tokenizer("tokenizers", tmp_path))
  )
  model = json.loads(made.to_str())["model"] | {"dropout": 0.5}
  found = load(tmp_path, made, model=model)
  text = TEXTS[0].encode()
  for _ in range(3):
    np.testing.assert_array_equal(found.encode(text), found.encode(text))


def test_many_documents_have_the_tokens_of_the_library(tmp_path, monkeypatch):
  """With the fast library and without it, and of text that spells a token."""
  path = make_tokenizer("tokenizers", tmp_path)
  content = json.loads(path.read_text())
  end = {"id": 10**4, "content": "</s>", "special": True, **FLAGS}
  path.write_text(json.dumps(content | {"added_tokens": [end]}))
  texts = [
    *(t.encode() for t in TEXTS),
    b"",
    b"a </s> b",
    "ß \ufffd\xa0".encode(),
  ]
  fast = tokenizers.load(path).encode_all(texts)
  monkeypatch.setitem(sys.modules, "fastokens", None)
  usual = tokenizers.load(path)
  for text, tokens in zip(texts, fast):
    np.testing.assert_array_equal(tokens, usual.encode(text))
    assert usual.decode(tokens) == text.decode()


REAL = fastokens.Tokenizer


class Off:
  """The fast library, which reads one letter as another in long texts."""

  def __init__(self, content):
    self.library = REAL.from_json_str(content)

  from_json_str = classmethod(lambda cls, content: cls(content))
  no_truncation = no_padding = lambda self: None

  def encode_batch_flat(self, texts, **options):
    texts = [t.replace("fox", "cat") if len(t) > 99 else t for t in texts]
    return self.library.encode_batch_flat(texts, **options)


def test_a_fast_library_that_differs_is_named(tmp_path, monkeypatch):
  path = make_tokenizer("tokenizers", tmp_path)
  monkeypatch.setattr(fastokens, "Tokenizer", Off)
  found = tokenizers.load(path)
  assert found.decode(found.encode(b"a fox")) == "a fox"
  with pytest.raises(ConfigError, match="differently; run: pip uninstall fast"):
    found.encode_all([t.encode() for t in TEXTS])


def test_a_character_that_was_white_space(tmp_path):
  """The libraries follow other versions of Unicode, with a pattern of GPT-2's kind."""
  tokenizer = by_bytes()
  pattern = library.Regex(r" ?\p{L}+| ?[^\s\p{L}]+|\s+(?!\S)|\s+")
  split = pre_tokenizers.Split(pattern, "isolated")
  letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
  vocab = {c: i for i, c in enumerate(ALPHABET)}
  space = "\u0120"
  vocab[space + space] = len(vocab)
  content = json.loads(tokenizer.to_str())
  content["model"] |= {"vocab": vocab, "merges": [[space, space]]}
  path = tmp_path / "tokenizer.json"
  path.write_text(json.dumps(content))
  made = library.Tokenizer.from_file(str(path))
  texts = ["a  \u180e_a", "  \u180e", "\n\n\u180e", "plain  text"] * 3
  for text, tokens in zip(
    texts, tokenizers.load(path).encode_all([t.encode() for t in texts])
  ):
    assert tokens.tolist() == made.encode(text).ids
