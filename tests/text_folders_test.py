"""Text of one's own: files, folders and patterns of prose, objects and rows."""

import gzip
import io
import itertools
import json
import os
import re
import shutil

import pyarrow
import pyarrow.parquet
import pytest

from moe_jax import main
from moe_jax.core.errors import ConfigError
from moe_jax.data import batches, sources
from moe_jax.data.text import corpora, folders, mixed
from moe_jax.data.text import documents as reading

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


def pieces_of(content):
  return folders._pieces(io.BytesIO(content))


def test_long_files_are_several_documents():
  """They end at empty lines, or at line ends, and nothing is lost."""
  lines = [b"line %d\n" % i + b"\n" * (i % 9 == 0) for i in range(9000)]
  for content in (b"".join(lines), b"".join(x.rstrip() + b"\n" for x in lines)):
    pieces = [*pieces_of(content)]
    assert b"".join(pieces) == content and len(pieces) > 10
    end = b"\n\n" if b"\n\n" in content else b"\n"
    assert all(piece.endswith(end) for piece in pieces[:-1])
    assert all(2**12 < len(piece) <= 2**14 for piece in pieces[:-1])
  assert [*pieces_of(b"a" * 99_999)] == [b"a" * 99_999]
  assert [*pieces_of(b"")] == []
  for word in ("aß", "é", "\U0001f600"):
    content = word.encode() * 2**20  # One line of megabytes.
    pieces = [*pieces_of(content)]
    assert b"".join(pieces) == content
    assert max(map(len, pieces)) <= 2**20 and len(pieces) > 1
    assert all(set(piece.decode()) <= {*word} for piece in pieces)
  line = b"a" * 99_999 + b"\n"
  assert [*pieces_of(line * 3)] == [line] * 3
  assert len([*pieces_of(b"\x80" * 2**22)]) == 4


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
  (tmp_path / "a.txt").write_bytes(b"caf\xe9")
  words = (
    "^1 document is not UTF-8: part 1 of .*; convert it .from Latin-1 with"
    " iconv -f latin1 -t utf-8., or leave it out with"
  )
  with pytest.raises(ConfigError, match=f"{words} --config.data.skip_not"):
    prepared(tmp_path / "a.txt", tmp_path)


def test_domains_without_validation_are_said(place, tmp_path, caplog):
  (place / "rare").mkdir()
  (place / "rare" / "one.txt").write_text("a rare text")
  prepared(place, tmp_path)
  assert (
    "of the 6 domains of text is held out for validation: rare" in caplog.text
  )


def test_only_the_wanted_columns_of_parquet_are_read(tmp_path, monkeypatch):
  texts = [f"caption {i} of a picture" for i in range(NUMBER)]
  images = [b"\0" * 2**12] * NUMBER
  table = pyarrow.table(
    {"text": texts, "image": images, "domain": ["a"] * NUMBER}
  )
  pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
  asked, original = [], pyarrow.parquet.ParquetFile.iter_batches

  def iter_batches(self, size, columns):
    asked.append((size, columns))
    return original(self, size, columns=columns)

  monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", iter_batches)
  corpus = prepared(tmp_path / "rows.parquet", tmp_path / "caches")
  assert sum(own["a"] for own in corpus.num_documents.values()) == NUMBER
  # The first row is read whole, to say which fields there are.
  assert {size: sorted(columns) for size, columns in asked} == {
    1: ["domain", "image", "text"],
    1024: ["domain", "text"],
  }


def test_blank_lines_among_objects(tmp_path):
  lines = [json.dumps({"text": f"text {i}"}) for i in range(NUMBER)]
  (tmp_path / "rows.jsonl").write_text("\n\n".join(lines) + "\n\n \n")
  corpus = prepared(tmp_path / "rows.jsonl", tmp_path / "caches")
  assert sum(own["text"] for own in corpus.num_documents.values()) == NUMBER


def test_a_place_in_the_place_of_a_name(place):
  with pytest.raises(ConfigError, match="is a place; set data.dir to it"):
    corpora.prepare(str(place))


def test_a_place_without_text(tmp_path):
  """The sentence says what lies there, and what to give, text first."""
  give = (
    "; give text in files such as .txt, .md, .jsonl or .parquet, or the folder"
  )
  for names, words in (
    ([], "is empty"),
    (["a.png"], "holds nothing that is read, but a.png"),
    ("cab", "holds nothing that is read, but 3 files or folders, such as a"),
  ):
    empty = tmp_path / f"of {len(names)}"
    empty.mkdir()
    for name in names:
      (empty / name).write_bytes(b"a")
    with pytest.raises(ConfigError, match=re.escape(f"{empty} {words}{give}")):
      prepared(empty, tmp_path)
  with pytest.raises(ConfigError, match="nothing does not exist; give text"):
    prepared(tmp_path / "nothing", tmp_path)
  with pytest.raises(
    ConfigError, match="a.png is a file of a kind that is not"
  ):
    prepared(tmp_path / "of 1" / "a.png", tmp_path)


@pytest.mark.parametrize(
  ("name", "content", "words"),
  [
    (
      "first.jsonl",
      b'{"body": "b", "n": 1, "on": true, "none": null, "tags": [], "in": {}}',
      'line 1 of .*first.jsonl has no text field "text"; it has the fields body'
      r" \(text\), n \(number\), on \(true or false\), none \(null\), tags"
      r" \(list\), in \(object\); set --config.data.text_feature to",
    ),
    (
      "later.jsonl",
      b'{"text": "a"}\n{"text": 1}\n',
      r'line 2 of .*later.jsonl .* "text"; it has the fields text \(number\); set',
    ),
    ("none.jsonl", b"{}", "line 1 of .*none.jsonl .*; it has no fields; set"),
    (
      "broken.jsonl",
      b'{"text": "a"}\n[1]\n',
      "line 2 of .*broken.jsonl: it is no JSON object",
    ),
    (
      "cut.jsonl.gz",
      gzip.compress(b'{"text": "a"}\n' * 99)[:-9],
      "the file .*cut.jsonl.gz cannot be read .*; mend it or take it away",
    ),
    ("a.parquet", b"PAR", "the file .*a.parquet cannot be read .*; mend it"),
  ],
)
def test_what_cannot_be_read(name, content, words, tmp_path):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ConfigError, match=words):
    prepared(tmp_path / name, tmp_path)


def test_examples_on_lines_without_any_text(tmp_path):
  (tmp_path / "train.jsonl").write_text('{"text": 1}')
  words = '"text" .* is not there; set .* of text: it has none$'
  with pytest.raises(ConfigError, match=words):
    prepared(tmp_path, tmp_path / "other")


def test_rows_without_a_text(tmp_path):
  rows = {"text": ["a", None], "more": [{"a": 1}, None], "n": [[1], [2]]}
  path = tmp_path / "rows.parquet"
  pyarrow.parquet.write_table(pyarrow.table(rows), path)
  words = r'row 2 of .* "text"; it has the fields text \(null\); set'
  with pytest.raises(ConfigError, match=words):
    prepared(path, tmp_path)
  with pytest.raises(
    ConfigError, match=r'row 1 of .* "more"; .*more \(object\)'
  ):
    prepared(path, tmp_path, text_feature="more")


def test_links_without_an_end_and_files_that_vanish(tmp_path, monkeypatch):
  place = tmp_path / "text"
  place.mkdir()
  (place / "a.txt").write_text("a")
  (place / "round").symlink_to(place)  # Folders behind links are not read.
  assert [
    f.path.name for f in folders.find(str(place), sources.SPLITS)["train"]
  ] == ["a.txt"]
  found = folders.find(str(place), sources.SPLITS)
  builder = folders.Builder(found, {"data.text_feature": "text"}, "domain")
  (place / "a.txt").unlink()
  with pytest.raises(ConfigError, match="the file .*a.txt cannot be read"):
    list(builder.examples("train"))
  (place / "b.txt").symlink_to(place / "b.txt")
  with pytest.raises(ConfigError, match="data.dir .*b.txt'.; take that file"):
    prepared(place, tmp_path)


def test_marks_line_ends_and_zeros(tmp_path):
  """The byte order mark is no text; all other bytes stay."""
  place = tmp_path / "text"
  place.mkdir()
  (place / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\0\r\n")
  (place / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "three"}\r\n')
  found = documents(prepared(place, tmp_path), "text")
  assert sorted(found) == ["one\r\ntwo\0\r\n", "three"]
  (place / "b.jsonl").unlink()
  (place / "a.txt").write_bytes(b"\xef\xbb\xbf")
  assert [*pieces_of(b"\xef\xbb\xbf")] == []


def of_splits(corpus, domain="text"):
  """The texts of a domain in the splits train and validation."""
  both = []
  for split in corpora.SPLITS:
    content = corpus.tokens(split, domain).tolist()
    words = "".join(chr(x) if x < 256 else "|" for x in content)
    both.append(words.split("|")[:-1])
  return both


def hashed(split, number):
  """Texts of 100 bytes that the hash gives to a split."""
  every = (f"{i:040d}\n{i:058d}\n" for i in itertools.count())
  chosen = (t for t in every if sources.split_of(t.encode()) == split)
  return list(itertools.islice(chosen, number))


@pytest.mark.parametrize("split", sources.SPLITS)
@pytest.mark.parametrize("number", [2, 8, 20])
def test_a_domain_is_in_both_splits(split, number, tmp_path):
  """Whatever its hashes are; a sixteenth of its bytes is held out, or more."""
  lines = hashed(split, number)
  path = tmp_path / "a.jsonl"
  path.write_text("".join(json.dumps({"text": x}) + "\n" for x in lines))
  train, validation = of_splits(prepared(path, tmp_path))
  begin, end = lines[-1][:41], lines[-1][41:]
  if number == 20:  # A sixteenth of 2000 bytes is more than the last text.
    begin, end = "", lines[-1]
  if split == "train":
    assert train == [*lines[:-1], *([begin] if begin else [])]
    assert validation == [end]
  elif begin:
    assert (train, validation) == ([begin], [*lines[:-1], end])
  else:
    assert (train, validation) == ([end], lines[:-1])


def test_a_domain_that_has_both_splits_is_not_changed(tmp_path):
  train, validation = hashed("train", 3), hashed("validation", 2)
  for order in itertools.permutations([*train, *validation]):
    pairs = (("text", [x.encode()]) for x in order)
    placed = [*reading._both_splits(pairs)]
    for split, own in zip(sources.SPLITS, (train, validation)):
      given = [texts[0].decode() for s, _, texts in placed if s == split]
      assert given == [x for x in order if x in own]


@pytest.mark.parametrize("size", [30, 256, 3000])
def test_a_small_file_is_enough(size, tmp_path):
  for i in range(8):  # Whatever its hash is.
    text = (f"{i:09d}\n" * size)[:size]
    path = tmp_path / f"{size}-{i}.txt"
    path.write_text(text)
    (train,), (validation,) = of_splits(prepared(path, tmp_path))
    assert train + validation == text and train[-1] == "\n"
    assert size / 16 - 1 < len(validation) < size / 16 + 10
  path.write_text("a" * 300)
  assert of_splits(prepared(path, tmp_path)) == [["a" * 300], []]


def test_a_single_object_is_enough_for_its_domain(tmp_path):
  """In all forms: the end of its text is held out."""
  text = "".join(f"line {i}\n" for i in range(32))
  several = [{"text": text, "domain": "a"}, {"text": text, "domain": "b"}]
  (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, several)))
  corpus = prepared(tmp_path / "x.jsonl", tmp_path)
  for domain in "ab":
    (train,), (validation,) = of_splits(corpus, domain)
    assert train + validation == text and 16 <= len(validation) < 26


def test_no_domains_where_none_are_asked_for(place, tmp_path):
  corpus = prepared(place, tmp_path, domain_feature="none")
  assert corpus.domains == ("text",)
  by_domain = prepared(place, tmp_path)
  assert len(by_domain.domains) > 1
  for split in corpora.SPLITS:
    both = (x.num_documents[split].values() for x in (corpus, by_domain))
    total, parts = (sum(x) for x in both)
    assert total == parts


def test_links_to_folders_are_said(place, tmp_path, caplog):
  """They are not followed, as a link may lead to a folder it is in."""
  before = prepared(place, tmp_path).fingerprint
  (place / "again").symlink_to(place)
  assert prepared(place, tmp_path).fingerprint == before
  assert f"such as {place / 'again'}" in caplog.text
  assert "and not behind links to folders" in caplog.text


def test_a_file_without_validation_text_says_what_to_do(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("a" * 300)
  corpus = prepared(path, tmp_path)
  with pytest.raises(
    ConfigError, match="into the folders train and validation"
  ):
    batches.validation_batches(corpus, seq_len=8, batch_size=1)


def test_text_is_called_by_its_place(tmp_path, caplog):
  """Unless it has a name of its own; also in a mixture that goes on."""
  path = tmp_path / "poems"
  path.mkdir()
  (path / "a.txt").write_text("a line\n" * 99)
  part = {"name": "python_sources", "dir": str(path)}
  shared = {"tokenizer": "bytes", "cache_dir": str(tmp_path / "cache")}
  one = mixed.prepare(part | shared | {"mixture": {}})
  assert one.name == "poems"
  named = part | {"name": "verse"}
  other = mixed.prepare(named | shared | {"mixture": {}})
  assert (other.name, other.fingerprint) == ("verse", one.fingerprint)
  data = shared | {"mixture": {"b": part, "a": named}}
  both = mixed.prepare(data)
  assert mixed.prepare(data, fingerprint=both.fingerprint) == both
  assert "have changed" not in caplog.text
  (path / "a.txt").write_text("changed")
  again = mixed.prepare(data, fingerprint=both.fingerprint)
  assert again.fingerprint == both.fingerprint
  said = f"The files in {path} have changed since this run began"
  assert caplog.text.count(said) == 2


def test_a_run_that_goes_on_says_that_its_files_have_changed(
  place, tmp_path, caplog
):
  first = prepared(place, tmp_path)
  assert prepared(place, tmp_path, fingerprint=first.fingerprint) == first
  assert "have changed" not in caplog.text
  (place / "code" / "new.py").write_text("one more")
  assert prepared(place, tmp_path, fingerprint=first.fingerprint) == first
  assert f"The files in {place} have changed since this run" in caplog.text
  caplog.clear()
  (place / "code" / "new.py").unlink()
  for i in range(4):  # The same text with another time is no other text.
    os.utime(place / "code" / "0.py", (i, i))
    assert prepared(place, tmp_path).fingerprint == first.fingerprint
    prepared(place, tmp_path, fingerprint=first.fingerprint)
  assert "have changed" not in caplog.text
  caplog.clear()
  shutil.rmtree(place)  # The run goes on without its files too.
  again = prepared(place, tmp_path, fingerprint=first.fingerprint)
  assert again.fingerprint == first.fingerprint
  assert not caplog.text


def test_the_folder_of_the_readme_has_one_warning(tmp_path, caplog):
  corpus = prepared("docs", tmp_path)
  assert {"text", "site_pages"} <= {*corpus.domains}
  for domain in corpus.domains:
    assert all(corpus.tokens(s, domain).size > 1 for s in corpora.SPLITS)
  (said,) = [r.message for r in caplog.records if r.levelname == "WARNING"]
  assert "files in docs are not read, such as docs/architecture.svg" in said


def test_a_run_on_text_of_ones_own(place, tmp_path):
  flags = ["--config=configs/tiny.py", "--config.data.name=text"]
  flags += [f"--config.data.dir={place}", "--config.train.num_steps=6"]
  flags += [f"--config.data.cache_dir={tmp_path}/cache"]
  assert main.main([*flags, f"--workdir={tmp_path}/run"]) == 0
  facts = json.loads((tmp_path / "run" / "run.json").read_text())
  assert facts["data_sources"]["data_dir"] == str(place)
