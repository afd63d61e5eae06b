"""Measures how fast text of one's own becomes tokens, and the memory that it takes.

  python -m benchmarks.tokenization --megabytes=1000
  python -m benchmarks.tokenization --megabytes=1000 --tokenizer=PATH

Writes a folder of text files and a .jsonl file from the source code of installed
packages, again and again until there is as much as wanted, and prepares it as a run
does, with a fresh cache. The tokenizer is a byte-level BPE of 16,000 tokens, made from
the first megabytes, or the given one. Prints megabytes of text per second, and the
largest memory of this process's own (RssAnon, by Linux's account) beside that before.
"""

import contextlib
import json
import pathlib
import sysconfig
import tempfile
import threading
import time

from benchmarks import timing
from moe_jax.core.errors import ConfigError
from moe_jax.run import command
from moe_jax.run import config as config_lib

_STATUS = pathlib.Path("/proc/self/status")
_FILE = 2**26  # Bytes of a text file, about.
_LEARNT = 2**22  # Bytes of text that the tokenizer is made from.


def main(argv=None) -> int:
  """The command."""
  parser = timing.parser("tokenization", __doc__)
  add = parser.add_argument
  add("--megabytes", type=config_lib.at_least_1, default=100, metavar="N")
  add(
    "--tokenizer", metavar="NAME", help="as data.tokenizer; a BPE if left out"
  )
  args = parser.parse_args(argv)
  if not _STATUS.exists():
    raise ConfigError(
      "benchmarks.tokenization reads /proc, which only Linux has"
    )
  with tempfile.TemporaryDirectory() as scratch:
    scratch = pathlib.Path(scratch)
    write_text(scratch / "text", args.megabytes * 10**6)
    tokenizer = args.tokenizer or learnt(scratch)
    result = measure(scratch, tokenizer)
  result["tokenizer"] = args.tokenizer or "byte-level BPE of 16,000 tokens"
  if args.json:
    command.write_json(args.json, result)
  print(json.dumps(result, indent=2))
  return 0


def sources():
  """Yields the text of installed Python files, again and again."""
  paths = sorted(pathlib.Path(sysconfig.get_paths()["purelib"]).rglob("*.py"))
  while True:
    for path in paths:
      with contextlib.suppress(UnicodeDecodeError, OSError):
        yield path.read_text(encoding="utf-8")


def write_text(folder: pathlib.Path, num_bytes: int) -> None:
  """Writes about as many bytes of text: one half in .txt, the other in .jsonl."""
  folder.mkdir()
  texts, written, number = sources(), 0, 0
  while written < num_bytes // 2:
    with (folder / f"{number:03d}.txt").open("wb") as file:
      while file.tell() < min(_FILE, num_bytes // 2):
        file.write(next(texts).encode())
      written += file.tell()
    number += 1
  with (folder / "more.jsonl").open("w") as file:
    while file.tell() < num_bytes - written:
      file.write(json.dumps({"text": next(texts)}) + "\n")


def learnt(folder: pathlib.Path) -> str:
  """Makes a tokenizer.json of text in a folder; returns its path."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, trainers

  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=16_000,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    special_tokens=["<|endoftext|>"],
    show_progress=False,
  )
  first = (folder / "text" / "000.txt").open("rb").read(_LEARNT)
  lines = first.decode(errors="replace").splitlines(keepends=True)
  made.train_from_iterator(lines, trainer)
  made.save(str(folder / "tokenizer.json"))
  return str(folder / "tokenizer.json")


def measure(scratch: pathlib.Path, tokenizer: str) -> dict:
  """Prepares the folder's text once; returns the speed and the memory."""
  import tensorflow_datasets as tfds

  from moe_jax.data.text import corpora, tokenizers

  # Imported and read before the time begins.
  tfds.features.Text()
  tokenizers.load(tokenizer).encode(b"text")
  before, most = _own(), [0]
  done = threading.Event()

  def watch():
    while not done.wait(0.02):
      most[0] = max(most[0], _own())

  watching = threading.Thread(target=watch)
  watching.start()
  started = time.perf_counter()
  corpus = corpora.prepare(
    "text",
    data_dir=scratch / "text",
    tokenizer=tokenizer,
    cache_dir=scratch / "cache",
  )
  seconds = time.perf_counter() - started
  done.set()
  watching.join()
  num_bytes = sum(p.stat().st_size for p in (scratch / "text").iterdir())
  num_tokens = sum(sum(own.values()) for own in corpus.num_tokens.values())
  return {
    "megabytes": round(num_bytes / 1e6, 1),
    "tokens": num_tokens,
    "seconds": round(seconds, 2),
    "megabytes_per_second": round(num_bytes / 1e6 / seconds, 2),
    "memory_before_mb": round(before / 1e6),
    "largest_memory_mb": round(most[0] / 1e6),
  }


def _own():
  """Bytes of memory that are not of files."""
  line = next(x for x in _STATUS.open() if x.startswith("RssAnon"))
  return int(line.split()[1]) * 1024


if __name__ == "__main__":
  command.run(main)
