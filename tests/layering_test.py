"""Who may import whom, read from the source; and what never gets committed."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# A module imports from earlier levels only. A folder stands for all its files.
LEVELS = (
  "errors hlo progress varying",
  "processes registry types",
  "products",
  "slots exchange metrics grouped_matmul",
  "routers balancers dispatchers experts",
  "layer",
  "parallel",
  "models",
  "losses optim datasets checkpoint signals sources tokenizers writers interop",
  "tokens",
  "mixture",
  "batches config",
  "params run_directory trained",
  "evaluation",
  "train",
  "mesh_check",
  "program",
  "loop shards",
  "evaluate generate main",
  "launch",
)
LEVEL = {part: i for i, parts in enumerate(LEVELS) for part in parts.split()}
# Folders whose files share something. Other files of a folder stand alone.
SHARING = ("dispatchers", "grouped_matmul", "interop", "models")
OUTSIDE = {"benchmarks", "configs", "experiments", "tests"}
# Slow to import: inside of functions only. A builder of TFDS must be a class of
# it, so datasets may, and nobody imports a dataset before it is asked for.
SLOW = {"grain", "matplotlib", "orbax", "tensorflow_datasets"}


def name_of(path):
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(p): p for p in sorted(ROOT.glob("moe_jax/**/*.py"))}


def imports(module, top_level=False):
  """Full names that a module imports; `top_level`: when it is imported."""
  tree = ast.parse(MODULES[module].read_text())
  found, stack = set(), [tree]
  while stack:
    node = stack.pop()
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{module}: imports are absolute"
      for alias in node.names:
        full = f"{node.module}.{alias.name}"
        found.add(full if full in MODULES else node.module)
    function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    if not (top_level and function):
      stack.extend(ast.iter_child_nodes(node))
  return found


def ours(names):
  return {n for n in names if n == "moe_jax" or n.startswith("moe_jax.")}


def part_of(module):
  return module.split(".")[1]


def test_every_module_has_a_level():
  parts = {part_of(m) for m in MODULES if m != "moe_jax"}
  new = sorted(parts - set(LEVEL))
  assert not new, (
    f"moe_jax has {new}, which LEVELS in tests/layering_test.py does not know:"
    " write each into the earliest level that is later than all it imports"
  )
  gone = sorted(set(LEVEL) - parts)
  assert not gone, f"LEVELS in tests/layering_test.py lists {gone}: not there"


@pytest.mark.parametrize("module", MODULES)
def test_imports_come_from_earlier_levels(module):
  known = [m for m in ours(imports(module)) if m != "moe_jax"]
  if module == "moe_jax":
    assert not known, "moe_jax/__init__.py imports nothing, so that it is quick"
    return
  part = part_of(module)
  for other in known:
    if part_of(other) == part and (part in SHARING or other == module):
      continue
    assert LEVEL.get(part_of(other), 99) < LEVEL.get(part, 99), (
      f"{module} imports {other}, which does not come before it in LEVELS of"
      " tests/layering_test.py"
    )


@pytest.mark.parametrize("module", MODULES)
def test_the_package_does_not_know_what_is_built_on_it(module):
  roots = {name.split(".")[0] for name in imports(module)}
  assert not roots & OUTSIDE


@pytest.mark.parametrize("module", MODULES)
def test_slow_packages_are_imported_when_they_are_needed(module):
  if module.startswith("moe_jax.datasets."):
    return
  seen, stack = set(), [module]
  while stack:
    name = stack.pop()
    if name in seen:
      continue
    seen.add(name)
    found = imports(name, top_level=True)
    slow = {n.split(".")[0] for n in found} & SLOW
    assert not slow, (
      f"importing {module} imports {sorted(slow)} in {name}; move the import"
      " into the function that needs it"
    )
    stack.extend(ours(found))


def test_no_file_names_a_place_on_a_machine():
  out = subprocess.run(
    ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT,
    capture_output=True,
    check=True,
    text=True,
  ).stdout
  homes = r"/(?:home|Users|root)/[A-Za-z]"
  here = "|".join(re.escape(f"{p}/") for p in (ROOT, sys.prefix))
  place = re.compile(rf"(?<![\w.-])(?:{homes}|{here})".encode())
  found = []
  for name in filter(None, out.split("\0")):
    path = ROOT / name
    if path.is_file() and (match := place.search(path.read_bytes())):
      found.append(f"{name}: {match[0].decode()}")
  assert not found
