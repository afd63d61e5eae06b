"""The structure of the package, measured: rooms, files, functions, imports.

  python -m tests.house

prints what is there and ends with exit code 1 beyond the limits below.

  python -m tests.house --walk

trains an arm of load_balancing for two steps, and prints the files that its
training step, and its way from the command to results.csv, pass through.
"""

import argparse
import ast
import functools
import io
import pathlib
import statistics
import sys
import tempfile
import tokenize
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = "moe_jax"

# A room imports from itself and from the rooms before it.
ROOMS = ("core", "moe", "data", "models", "hf", "run", "training", "tasks")
COMMANDS = "commands"  # The files at the top level, after all rooms.
# The code lines that the package has, rounded up. A commit that deletes code
# lowers this number, and one that adds a feature raises it by that feature. The
# aim was 7,000: to reach it, features or messages about wrong input would go.
MOST_CODE_LINES = 21_159
MOST_ROOMS = 8
# Files of a room or one of its folders, without __init__.py. Folders of parts, which
# the registry finds by name, may have any number.
MOST_FILES = 10
MOST_LINES = 400  # Lines of a file.
MOST_LINES_OF_A_FUNCTION = 60
MOST_LINES_OF_THE_MEDIAN = 10


class Module(NamedTuple):
  """name: with dots; room: of `ROOMS` or `COMMANDS`; tree: parsed source;
  lines, code: of the file, and without docstrings, comments and blanks."""

  name: str
  path: pathlib.Path
  room: str
  tree: ast.Module
  lines: int
  code: int

  @property
  def folder(self) -> str:
    return self.path.parent.relative_to(ROOT).as_posix()


@functools.cache
def modules() -> dict[str, Module]:
  """All modules of the package, by name."""
  paths = sorted((ROOT / PACKAGE).rglob("*.py"))
  return {m.name: m for m in map(_module, paths)}


def _module(path):
  parts = path.relative_to(ROOT).with_suffix("").parts
  name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
  room = parts[1] if len(parts) > 2 and parts[1] in ROOMS else COMMANDS
  text = path.read_text()
  tree = ast.parse(text)
  return Module(
    name, path, room, tree, len(text.splitlines()), _code_lines(text, tree)
  )


def _code_lines(text, tree):
  """Lines that hold anything but docstrings, comments and blanks."""
  skipped = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
  }
  lines = set()
  for token in tokenize.generate_tokens(io.StringIO(text).readline):
    if token.type not in skipped:
      lines |= set(range(token.start[0], token.end[0] + 1))
  kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
  for node in ast.walk(tree):
    if isinstance(node, kinds) and ast.get_docstring(node, clean=False):
      docstring = node.body[0]
      lines -= set(range(docstring.lineno, docstring.end_lineno + 1))
  return len(lines)


def functions(module: Module) -> list[tuple[int, str]]:
  """(lines, name:line) of every function of a module."""
  kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
  return [
    (node.end_lineno - node.lineno + 1, f"{node.name}:{node.lineno}")
    for node in ast.walk(module.tree)
    if isinstance(node, kinds)
  ]


def imports(module: Module, top_level: bool = False) -> set[str]:
  """Full names that a module imports.

  Args:
    module: from `modules`.
    top_level: only what is imported together with the module.
  """
  found, stack = set(), [module.tree]
  while stack:
    node = stack.pop()
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{module.name}: imports are absolute"
      for alias in node.names:
        full = f"{node.module}.{alias.name}"
        found.add(full if full in modules() else node.module)
    function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    if not (top_level and function):
      stack.extend(ast.iter_child_nodes(node))
  return found


def imports_up() -> list[str]:
  """Imports of a room from a later one."""
  order = {room: i for i, room in enumerate((*ROOMS, COMMANDS))}
  return [
    f"{module.name} imports {other}, from the later room"
    f" {modules()[other].room}"
    for module in modules().values()
    for other in sorted(imports(module))
    if other in modules()
    and other != PACKAGE
    and order[modules()[other].room] > order[module.room]
  ]


def cycles() -> list[str]:
  """Modules that import each other, directly or through others."""
  edges = {
    m.name: [n for n in imports(m, top_level=True) if n in modules()]
    for m in modules().values()
  }
  found, done = [], set()

  def visit(name, path):
    if name in path:
      found.append(" imports ".join([*path[path.index(name) :], name]))
    elif name not in done:
      for other in edges[name]:
        visit(other, [*path, name])
      done.add(name)

  for name in edges:
    visit(name, [])
  return found


def problems() -> list[str]:
  """Everything beyond the limits, a sentence each."""
  found = imports_up() + cycles()
  total = sum(m.code for m in modules().values())
  if total > MOST_CODE_LINES:
    found.append(f"{total} code lines are more than {MOST_CODE_LINES}")
  rooms = {m.room for m in modules().values()} - {COMMANDS}
  if len(rooms) > MOST_ROOMS:
    found.append(f"{len(rooms)} rooms are more than {MOST_ROOMS}")
  for folder, count in files_by_folder().items():
    if count > MOST_FILES:
      found.append(f"{folder} has {count} files, more than {MOST_FILES}")
  lengths = []
  for module in modules().values():
    if module.lines > MOST_LINES:
      found.append(
        f"{module.name} has {module.lines} lines, more than {MOST_LINES}"
      )
    for lines, name in functions(module):
      lengths.append(lines)
      if lines > MOST_LINES_OF_A_FUNCTION:
        found.append(
          f"{module.name}.{name} has {lines} lines, more than"
          f" {MOST_LINES_OF_A_FUNCTION}"
        )
  if statistics.median(lengths) > MOST_LINES_OF_THE_MEDIAN:
    found.append(
      f"the median function has {statistics.median(lengths)} lines, more than"
      f" {MOST_LINES_OF_THE_MEDIAN}"
    )
  return found


def files_by_folder() -> dict[str, int]:
  """{folder: its files, without __init__.py}, but for folders of parts."""
  counts = {}
  for module in modules().values():
    if "\nPART = " in (module.path.parent / "__init__.py").read_text():
      continue
    counted = module.path.name != "__init__.py"
    counts[module.folder] = counts.get(module.folder, 0) + counted
  return counts


def _print():
  for room in (*ROOMS, COMMANDS):
    inside = [m for m in modules().values() if m.room == room]
    if not inside:
      continue
    print(f"{room}: {sum(m.code for m in inside)} code lines")
    for m in inside:
      longest = max(functions(m), default=(0, "-"))
      print(
        f"  {m.name:44} {m.code:5} code {m.lines:5} lines; longest function"
        f" {longest[1]} {longest[0]}"
      )
  lengths = sorted(n for m in modules().values() for n, _ in functions(m))
  print(
    f"{sum(m.code for m in modules().values())} code lines in"
    f" {len(modules())} files; {len(lengths)} functions, median"
    f" {statistics.median(lengths)}, longest {lengths[-1]} lines"
  )


class Walk:
  """A function for sys.setprofile that notes files in the order of reading.

  A function is read once, when it is first called; what an import calls is not
  read. A stay is a change of file, also back to that of a caller which goes on
  to a function that is not read yet.

  leaves: (file, function) pairs in which no further calls are followed.
  """

  def __init__(self, leaves=()):
    self.files, self.stays = [], []
    self._leaves, self._inside, self._read = leaves, None, set()

  def __call__(self, frame, event, arg):
    if self._inside is not None:
      left = event == "return" and frame is self._inside
      self._inside = None if left else self._inside
    elif event == "call" and (file := _own_file(frame.f_code)):
      code, caller = frame.f_code, frame.f_back
      if code not in self._read and not _imports(frame):
        self._read.add(code)
        while caller and not _own_file(caller.f_code):
          caller = caller.f_back
        for f in (caller and _own_file(caller.f_code), file):
          self.stays += [f] if f and f not in self.stays[-1:] else []
        self.files += [file] if file not in self.files else []
      self._inside = frame if (file, code.co_qualname) in self._leaves else None


def _own_file(code):
  """The path inside the repository of code that a reader follows, or ""."""
  path = code.co_filename.removeprefix(f"{ROOT}/")
  return path if path.startswith((PACKAGE, "experiments", "configs")) else ""


def _imports(frame):
  """Whether a frame runs while one of the files is imported."""
  while frame and not (
    frame.f_code.co_name == "<module>" and _own_file(frame.f_code)
  ):
    frame = frame.f_back
  return frame is not None


def walks() -> dict[str, Walk]:
  """{what was walked: its Walk} of a run of the arm `loss_1e-2`."""
  from experiments import launch
  from moe_jax.training import train_step

  program = "moe_jax/training/program.py"
  leaves = {(program, f) for f in ("check", "build", "Program.__init__")}
  arm, step = Walk(leaves | {("moe_jax/training/loop.py", "run")}), Walk()
  original = train_step.train_step

  def traced(*args, **options):
    sys.setprofile(step)
    try:
      return original(*args, **options)
    finally:
      sys.setprofile(arm)

  argv = "load_balancing --arm=loss_1e-2 --seeds=1 --config.train.num_steps=2"
  argv += " --config.optim.warmup_steps=0 --config.eval.batches_per_domain=1"
  with tempfile.TemporaryDirectory() as folder:
    train_step.train_step = traced
    sys.setprofile(arm)
    try:
      launch.main([*argv.split(), f"--workdir={folder}"])
    finally:
      sys.setprofile(None)
      train_step.train_step = original
  return {"an arm, without its training": arm, "a training step": step}


def main(argv=None) -> int:
  """The command."""
  parser = argparse.ArgumentParser(
    prog="python -m tests.house",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--walk", action="store_true", help="print the walks")
  if parser.parse_args(argv).walk:
    for name, walk in walks().items():
      print(f"{name}: {len(walk.files)} files, {len(walk.stays)} stays")
      print(*walk.files, sep="\n")
    return 0
  _print()
  found = problems()
  for problem in found:
    print(f"beyond the limits: {problem}")
  print(f"{len(found)} problems")
  return 1 if found else 0


if __name__ == "__main__":
  sys.exit(main())
