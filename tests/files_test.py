"""JSON on disk that may hold anything, and text that is written as a whole."""

import pathlib

import pytest

from moe_jax.core import files
from moe_jax.core.errors import ConfigError, RunError

BROKEN = {
  b'{"a": "\xe1"}': "can't decode byte 0xe1 in position 7",
  b"": "Expecting value: line 1 column 1",
  b'{"a": 1': "Expecting ',' delimiter: line 1 column 8",
  b"[" * 100_000: "deeper than 64 levels",
  b'{"a":' * 65 + b"1" + b"}" * 65: "deeper than 64 levels",
  b'{"a": NaN}': "float values are not JSON compliant",
  b'{"a": [-Infinity]}': "float values are not JSON compliant",
  b'{"a": 1e999}': "float values are not JSON compliant",
  b'{"a": "\\ud800"}': "surrogates not allowed",
  b'{"\\ud800": 1}': "surrogates not allowed",
  b'{"a": %s}' % (b"9" * 10_000): "4300 digits",
  b"[1]": "holds a list",
  b'{"a": "%s"}' % (b"x" * 2000): "larger than 1,000 bytes",
}


@pytest.mark.parametrize(("raw", "words"), BROKEN.items(), ids=BROKEN.values())
def test_what_is_no_json_is_one_sentence(tmp_path, raw, words, monkeypatch):
  path = tmp_path / "a.json"
  path.write_bytes(raw)
  if "larger" in words:
    monkeypatch.setattr(files, "MAX_BYTES", 1000)
  with pytest.raises(ConfigError) as e:
    files.read_json(path, "a list of things", "make it again")
  assert str(e.value).startswith(f"{path} is not a list of things (")
  assert str(e.value).endswith("; make it again") and words in str(e.value)
  assert "\n" not in str(e.value)


def test_whole_json_is_read(tmp_path):
  path = tmp_path / "a.json"
  path.write_text('{"a": [1, 2.5, null, true, "\\ud83d\\ude00é"], "b": {}}')
  value = files.read_json(path, "x", "y")
  assert value == {"a": [1, 2.5, None, True, "\U0001f600é"], "b": {}}
  path.write_bytes(b'{"a":' * 64 + b"1" + b"}" * 64)
  files.read_json(path, "x", "y")
  path.write_text('{"a": 1e999}')
  assert files.read_json(path, "x", "y", allow_nan=True)
  with pytest.raises(FileNotFoundError):
    files.read_json(tmp_path / "none", "x", "y")
  with pytest.raises(ConfigError, match="cannot be read .Is a directory.; y"):
    files.read_json(tmp_path, "x", "y")


def positive(value):
  if not isinstance(value, int) or value <= 0:
    raise ValueError(f"{value} is not positive")


def test_lines_and_those_that_are_broken(tmp_path, monkeypatch):
  path = tmp_path / "a.jsonl"

  def read(raw, **options):
    path.write_bytes(raw)
    return files.read_json_lines(path, "x", "y", check=positive, **options)

  assert read(b"") == []
  assert read(b"1\n2\n") == read(b"1\n2") == [1, 2]
  # Its writer is in the middle of the last line, or was killed there.
  assert read(b'1\n2\n{"a') == read(b"1\n2\n\xe1") == [1, 2]
  for broken in (b'{"a', b"\xe1", b"-1", b"[" * 100_000, b"NaN", b""):
    for rest in (b"\n", b"\n2\n", b"\n2"):
      with pytest.raises(ConfigError, match="^line 2 of .* is not x .*; y$"):
        read(b"1\n" + broken + rest)
      whole, damaged = [1, 2] if b"2" in rest else [1], []
      assert read(b"1\n" + broken + rest, damaged=damaged) == whole
      assert damaged == [2]
  monkeypatch.setattr(files, "MAX_BYTES", 3)
  with pytest.raises(ConfigError, match="^line 1 of .* larger than 3 bytes"):
    read(b"11111\n")
  with pytest.raises(FileNotFoundError):
    files.read_json_lines(tmp_path / "none", "x", "y", check=positive)


def test_text_is_written_as_a_whole(tmp_path, monkeypatch):
  path = tmp_path / "a.txt"
  files.write_text(path, "é\n")
  assert path.read_bytes() == b"\xc3\xa9\n"

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(files.os, "fsync", full)
  with pytest.raises(RunError, match=f"^{path} cannot be written to .No space"):
    files.write_text(path, "new")
  assert (
    path.read_bytes() == b"\xc3\xa9\n" and len(list(tmp_path.iterdir())) == 1
  )


def test_an_error_names_the_file_that_the_user_knows():
  for file in (None, ".a"):
    with (
      pytest.raises(RunError, match="^a cannot be written to .No space left"),
      files.writing(pathlib.Path("a")),
    ):
      raise OSError(28, "No space left on device", file)
