"""Markdown that is made from the code: configs, commands, results, the package.

Each function is called for a comment `<!-- made: NAME ARGUMENTS -->` or
`<!-- site: NAME ARGUMENTS -->` in a page; `pages` explains the difference.
"""

import ast
import collections
import csv
import json
import pathlib
import re
import subprocess
import sys
import textwrap
import tokenize

ROOT = pathlib.Path(__file__).resolve().parents[2]
BASE = ROOT / "configs" / "base.py"
# Says what a command's parser has, in the place of parsing.
_TELL = """
import argparse, importlib, json, runpy, sys

def tell(parser, *args, **kwargs):
  if not parser.add_help:  # It looks ahead for a flag that the command needs.
    return argparse.Namespace(questions=None), []
  flags = [
    {
      "flags": a.option_strings or [a.dest],
      "metavar": a.metavar or (None if a.nargs == 0 else "WORD" if a.choices
        else a.dest.upper()),
      "choices": list(a.choices) if a.choices else [],
      "required": a.required,
      "help": parser._get_formatter()._expand_help(a) if a.help else "",
    }
    for a in parser._actions
    if a.help != argparse.SUPPRESS and a.dest != "help"
  ]
  told[sys.argv[0]] = [parser.description or "", parser.epilog or "", flags]
  raise SystemExit

told = {}
argparse.ArgumentParser.parse_known_args = tell
for name in sys.argv[1:]:
  sys.argv = [name, "QUESTION"]
  try:
    runpy.run_module(name, run_name="__main__", alter_sys=False)
  except SystemExit:
    pass
print(json.dumps(told))
"""


def contents() -> str:
  """The tree of pages: the links of index.md, in their order, by section."""
  text = (ROOT / "docs" / "index.md").read_text()
  trees = []
  for title, body in re.findall(r"^## (.*)\n((?:(?!^## ).*\n)*)", text, re.M):
    links = re.findall(r"^- \[([^\]]+)\]\(([^)#:]+\.md)\)", body, re.M)
    trees.append(_tree(title, links))
  questions = [
    (q.parent.name, f"../{q.relative_to(ROOT).as_posix()}")
    for q in sorted(ROOT.glob("experiments/*/README.md"))
  ]
  return "\n\n".join([*trees, _tree("Questions", questions)])


def _tree(title, links):
  """The directive of Sphinx; pages outside of docs/ have copies in it."""
  options = [f":caption: {title}", ":hidden:", ""]
  pages = [
    f"{words} <{re.sub('^[.][.]/', 'repository/', link).removesuffix('.md')}>"
    for words, link in links
  ]
  return "\n".join(["```{toctree}", *options, *pages, "```"])


def config() -> str:
  """All keys of configs/base.py with their defaults and comments, by section."""
  sections = collections.defaultdict(list)
  for key, default, meaning in config_rows():
    section = "model.moe" if key.startswith("model.moe") else key.split(".")[0]
    sections[section if "." in key else "the run"].append(
      f"| `{key} = {default}` | {escaped(meaning)} |"
    )
  head = "| key and default | meaning |\n|---|---|\n"
  tables = [
    f"### {name}\n\n{head}" + "\n".join(rows) for name, rows in sections.items()
  ]
  return "\n\n".join(tables)


def config_rows() -> list[tuple[str, str, str]]:
  """(key, default, comment) of every assignment in configs/base.py."""
  from configs import base

  values = base.get_config()
  with BASE.open("rb") as file:
    tokens = list(tokenize.tokenize(file.readline))
  comments = {t.start[0]: t for t in tokens if t.type == tokenize.COMMENT}
  function = ast.parse(BASE.read_text()).body[-1]
  rows, above, meaning = [], 0, ""
  for node in function.body[1:]:
    if not isinstance(node, ast.Assign):
      continue
    own = [n for n in sorted(comments) if above < n <= node.end_lineno]
    # A key without a comment goes on with the one before.
    meaning = " ".join(comments[n].string.lstrip("# ") for n in own) or meaning
    keys = [ast.unparse(t) for t in node.targets if "." in ast.unparse(t)]
    for key in keys:
      key = re.sub(r"^moe\.", "model.moe.", key).removeprefix("c.")
      value = values
      for name in key.split("."):
        value = value[name]
      rows.append((key, value, meaning))
    if keys or not own:
      above = node.end_lineno
  return [(k, _shown(v), m) for k, v, m in rows if not _is_parent(k, rows)]


def _is_parent(key, rows):
  return any(other.startswith(f"{key}.") for other, *_ in rows)


def _shown(value):
  return repr(value.to_dict() if hasattr(value, "to_dict") else value)


def script() -> str:
  """The commands of the script `moe-jax`."""
  from moe_jax import __main__ as names

  rows = [
    f"| `moe-jax {name}` | `python -m {place}` | {escaped(words)} |"
    for name, (place, words) in names.COMMANDS.items()
  ]
  return "\n".join(["| name | command | does |", "|---|---|---|", *rows])


def command(module: str) -> str:
  """The flags of a command, from its parser."""
  about, epilog, flags = _commands()[module]
  first, *rest = about.strip().split("\n\n")
  text = [escaped(" ".join(first.split()))]
  text += map(_about, rest)
  rows = [f"| {_flag(flag)} | {_meaning(flag)} |" for flag in flags]
  if rows:
    text.append("\n".join(["| flag | meaning |", "|---|---|", *rows]))
  if epilog:
    text.append(escaped(epilog))
  return "\n\n".join(text)


def _about(block):
  """A paragraph of a description, or commands as code."""
  if re.match(r"\s|python -m|moe-jax", block):
    return f"```text\n{_named(textwrap.dedent(block))}\n```"
  return escaped(" ".join(block.split()))


def _named(text):
  """Commands by their names of the script `moe-jax`, where they have one."""
  from moe_jax import __main__ as names

  short = {place: f"moe-jax {n}" for n, (place, _) in names.COMMANDS.items()}
  return re.sub(r"python -m ([\w.]+)", lambda m: short.get(m[1], m[0]), text)


def _flag(flag):
  value = f"={flag['metavar']}" if flag["metavar"] else ""
  if not flag["flags"][0].startswith("-"):
    return f"`{flag['metavar'] or flag['flags'][0]}`"
  return ", ".join(f"`{name}{value}`" for name in flag["flags"])


def _meaning(flag):
  words = [escaped(flag["help"])] if flag["help"] else []
  if flag["choices"]:
    words.append("one of " + ", ".join(f"`{x}`" for x in flag["choices"]))
  words += ["needed"] if flag["required"] else []
  return "; ".join(words)


_told = {}


def _commands():
  """{module: its parser} of all commands that cli.md has."""
  if not _told:
    text = (ROOT / "docs" / "cli.md").read_text()
    names = re.findall(r"<!-- made: command ([\w.]+) -->", text)
    done = subprocess.run(
      [sys.executable, "-c", _TELL, *names],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=True,
    )
    _told.update(json.loads(done.stdout.splitlines()[-1]))
  return _told


def answered() -> list[pathlib.Path]:
  """The READMEs of the questions that have rows and an answer."""
  return [
    path
    for path in sorted(ROOT.glob("experiments/*/README.md"))
    if path.with_name("results.csv").exists()
    and "## Answer\n" in path.read_text()
  ]


def questions() -> str:
  """The answer of every answered question, with its figure and its rows."""
  return "\n\n".join(map(_question, answered()))


def _question(path):
  text = path.read_text()
  name = path.parent.name
  title = re.search(r"^# (.*)", text)[1]
  answer = text.split("## Answer\n", 1)[1].strip().split("\n\n")[0]
  words, figure = re.search(r"!\[([^\]]*)\]\(([^)]*)\)", text).groups()
  with (path.parent / "results.csv").open() as file:
    rows = [(r["scale"], r["arm"], r["seed"]) for r in csv.DictReader(file)]
  counts = [
    f"{sum(r[0] == scale for r in rows)} runs at scale `{scale}`, of"
    f" {len({r[1] for r in rows if r[0] == scale})} arms"
    for scale in sorted({r[0] for r in rows})
  ]
  return "\n\n".join(
    [
      f"## {title}",
      answer,
      f"![{words}](../experiments/{name}/{figure})",
      f"Committed: {'; '.join(counts)}."
      f" [Arms, tables and notes](../experiments/{name}/README.md)."
      f" `moe-jax experiment {name} --scale=cpu --report`",
    ]
  )


def module(name: str) -> str:
  """The docstrings of a module, by autodoc."""
  return f"```{{eval-rst}}\n.. automodule:: {name}\n```"


def parts(kind: str) -> str:
  """The docstrings of all files of a kind of part, by autodoc."""
  from moe_jax.core import registry

  return "\n\n".join(
    f"### {name}\n\n{module(registry.find(kind, name).__name__)}"
    for name in registry.names(kind)
  )


def escaped(text: str) -> str:
  """Text without the markup of Markdown, also in a table."""
  return re.sub(r"([\\`*_{}\[\]<>|])", r"\\\1", text)
