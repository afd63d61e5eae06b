"""Text of one's own: files, folders and patterns of prose, objects and rows."""

import gzip
import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from moe_jax import main
from moe_jax.core.errors import ConfigError
from moe_jax.data.text import corpora, folders

NUMBER = 60  # Documents of each kind, of which some are held out.


def texts(kind):
  return [f"{kind} {i}: {'word ' * (i % 7)}" for i in range(NUMBER)]


@pytest.fixture
def place(tmp_path):
  """A folder with every kind of file."""
  place = tmp_path / "text"
  for folder in ("prose/deep", "code", ".hidden"):
    (place / folder).mkdir(parents=True)
  for i, (prose, code) in enumerate(zip(texts("prose"), texts("code"))):
    (place / "prose" / ("deep" if i % 2 else "") / f"{i}.TXT").write_text(prose)
    (place / "code" / f"{i}.py").write_text(code)
  (place / ".hidden" / "a.txt").write_text("not read")
  (place / "code" / "a.bin").write_bytes(b"\xff")
  lines = [json.dumps({"text": text}) + "\n" for text in texts("line")]
  (place / "lines.jsonl").write_text("".join(lines))
  named = [{"text": text, "domain": "named"} for text in texts("zipped")]
  content = "".join(json.dumps(one) + "\n" for one in named)
  (place / "more.jsonl.gz").write_bytes(gzip.compress(content.encode()))
  rows = {"text": texts("row"), "domain": ["rows", None] * (NUMBER // 2)}
  pyarrow.parquet.write_table(pyarrow.table(rows), place / "rows.parquet")
  return place


def prepared(place, tmp_path, **options):
  options = {"data_dir": str(place), "cache_dir": tmp_path / "cache"} | options
  return corpora.prepare("text", **options)


def documents(corpus, domain):
  """The texts of a domain, in both splits."""
  found = []
  for split in corpora.SPLITS:
    ids = corpus.tokens(split, domain).tolist()
    ends = [i for i, x in enumerate(ids) if x == corpus.end_of_document]
    starts = [0, *(i + 1 for i in ends)]
    found += [bytes(ids[a:b]).decode() for a, b in zip(starts, ends)]
  return found


def test_every_kind_of_file_and_its_domain(place, tmp_path, caplog):
  """The first folder, the document's own domain, or "text"."""
  corpus = prepared(place, tmp_path)
  rows = texts("row")
  wanted = {
    "prose": texts("prose"),
    "code": texts("code"),
    "named": texts("zipped"),
    "rows": rows[::2],
    "text": texts("line") + rows[1::2],
  }
  assert {*corpus.domains} == {*wanted}
  assert "1 of 124 files in" in caplog.text and "code/a.bin" in caplog.text
  for domain, own in wanted.items():
    assert sorted(documents(corpus, domain)) == sorted(own), domain
  held_out = sum(corpus.num_documents["validation"].values())
  assert 5 < held_out < 40


def test_a_file_and_a_pattern(place, tmp_path):
  one = prepared(place / "lines.jsonl", tmp_path)
  assert sorted(documents(one, "text")) == sorted(texts("line"))
  some = prepared(place / "*" / "?.py", tmp_path)
  assert some.domains == ("code",)
  assert sorted(documents(some, "code")) == sorted(texts("code")[:10])


def test_folders_that_are_splits(tmp_path):
  place = tmp_path / "text"
  for split, n in (("train", 3), ("validation", 2)):
    (place / split / "a").mkdir(parents=True)
    for i in range(n):
      (place / split / "a" / f"{i}.md").write_text(f"{split} {i}")
  corpus = prepared(place, tmp_path)
  assert corpus.num_documents == {"train": {"a": 3}, "validation": {"a": 2}}


def test_long_files_are_several_documents():
  """They end at empty lines, or at line ends, and nothing is lost."""
  lines = [b"line %d\n" % i + b"\n" * (i % 9 == 0) for i in range(9000)]
  for content in (b"".join(lines), b"".join(x.rstrip() + b"\n" for x in lines)):
    pieces = [*folders._pieces(content)]
    assert b"".join(pieces) == content and len(pieces) > 10
    end = b"\n\n" if b"\n\n" in content else b"\n"
    assert all(piece.endswith(end) for piece in pieces[:-1])
    assert all(2**12 < len(piece) <= 2**14 for piece in pieces[:-1])
  assert [*folders._pieces(b"a" * 99_999)] == [b"a" * 99_999]
  assert [*folders._pieces(b"")] == []
  for word in ("aß", "é", "\U0001f600"):
    content = word.encode() * 2**20  # One line of megabytes.
    pieces = [*folders._pieces(content)]
    assert b"".join(pieces) == content
    assert max(map(len, pieces)) <= 2**20 and len(pieces) > 1
    assert all(set(piece.decode()) <= {*word} for piece in pieces)
  line = b"a" * 99_999 + b"\n"
  assert [*folders._pieces(line * 3)] == [line] * 3
  assert len([*folders._pieces(b"\x80" * 2**22)]) == 4


def test_changed_files_make_another_corpus(place, tmp_path):
  first = prepared(place, tmp_path)
  assert prepared(place, tmp_path).directory == first.directory
  path = place / "code" / "0.py"
  path.write_text("other")
  os.utime(path, (1, 1))
  assert prepared(place, tmp_path).fingerprint != first.fingerprint
  (place / "code" / "new.py").write_text("one more")
  third = prepared(place, tmp_path)
  assert "one more" in documents(third, "code")


def test_what_is_not_utf8(place, tmp_path, caplog):
  for i in range(5):
    (place / "code" / f"{i}.py").write_bytes(b"caf\xe9")
  words = (
    "5 documents are not UTF-8: .*/0.py, .*/1.py, .*/2.py, ...; convert .*True$"
  )
  with pytest.raises(ConfigError, match=words):
    prepared(place, tmp_path)
  corpus = prepared(place, tmp_path, skip_not_utf8=True)
  assert sorted(documents(corpus, "code")) == sorted(texts("code")[5:])
  assert "Left out: 5 documents are not UTF-8" in caplog.text


def test_domains_without_validation_are_said(place, tmp_path, caplog):
  (place / "rare").mkdir()
  (place / "rare" / "one.txt").write_text("a rare text")
  prepared(place, tmp_path)
  assert (
    "of the 6 domains of text is held out for validation: rare" in caplog.text
  )


def test_a_place_in_the_place_of_a_name(place):
  with pytest.raises(ConfigError, match="is a place; set data.dir to it"):
    corpora.prepare(str(place))


def test_what_cannot_be_read(place, tmp_path):
  empty = tmp_path / "empty"
  empty.mkdir()
  (empty / "a.bin").write_bytes(b"a")
  few = tmp_path / "few.jsonl"
  few.write_text('{"text": "a"}\n{"body": "b", "title": "c"}\n')
  broken = tmp_path / "broken.jsonl"
  broken.write_text('{"text": "a"}\n[1]\n')
  refused = {
    "or text in files such as .txt, .md": {"place": empty},
    "does not exist": {"place": tmp_path / "nothing"},
    'line 2 of .*few.jsonl has no text "text"; it has: body, title': {
      "place": few
    },
    "line 2 of .*broken.jsonl: it is no JSON object": {"place": broken},
    '"body" of dataset text is not there; .* of text: text': {
      "place": place / "lines.jsonl",
      "text_feature": "body",
    },
  }
  for words, options in refused.items():
    with pytest.raises(ConfigError, match=words):
      prepared(options.pop("place"), tmp_path, **options)


def test_a_run_on_text_of_ones_own(place, tmp_path):
  flags = ["--config=configs/tiny.py", "--config.data.name=text"]
  flags += [f"--config.data.dir={place}", "--config.train.num_steps=6"]
  flags += [f"--config.data.cache_dir={tmp_path}/cache"]
  assert main.main([*flags, f"--workdir={tmp_path}/run"]) == 0
  facts = json.loads((tmp_path / "run" / "run.json").read_text())
  assert facts["data_sources"]["data_dir"] == str(place)
