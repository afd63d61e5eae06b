"""Tests which module may import which, and what is never committed."""

import ast
import importlib
import re
import subprocess
import sys
import types

import pytest

from tests import house
from tests.house import ROOT

OUTSIDE = {"benchmarks", "configs", "experiments", "tests"}
# Slow to import: inside of functions only. A builder of TFDS must be a class of
# it, so datasets may, and nobody imports a dataset before it is asked for.
SLOW = {"grain", "matplotlib", "orbax", "tensorflow_datasets"}
MODULES = house.modules()


def test_imports_go_one_way():
  assert not house.imports_up()
  assert not house.cycles()


def test_every_folder_is_a_room():
  folders = {m.path.parent.name for m in MODULES.values()}
  tops = {p.name for p in (ROOT / "moe_jax").iterdir() if p.is_dir()}
  assert folders
  assert tops - {"__pycache__", "launch"} <= set(house.ROOMS), tops


@pytest.mark.parametrize("module", MODULES)
def test_the_package_does_not_know_what_is_built_on_it(module):
  roots = {name.split(".")[0] for name in house.imports(MODULES[module])}
  assert not roots & OUTSIDE


@pytest.mark.parametrize("module", MODULES)
def test_slow_packages_are_imported_when_they_are_needed(module):
  if module.startswith("moe_jax.data.datasets."):
    return
  seen, stack = set(), [module]
  while stack:
    name = stack.pop()
    if name in seen:
      continue
    seen.add(name)
    found = house.imports(MODULES[name], top_level=True)
    slow = {n.split(".")[0] for n in found} & SLOW
    assert not slow, (
      f"importing {module} imports {sorted(slow)} in {name}; move the import"
      " into the function that needs it"
    )
    stack.extend(found & set(MODULES))


@pytest.mark.parametrize("folder", ["moe_jax", *sorted(OUTSIDE)])
def test_names_of_our_modules_exist(folder):
  """`module.name`, wherever a file imports a module of ours."""
  for path in sorted((ROOT / folder).rglob("*.py")):
    nodes = [*ast.walk(ast.parse(path.read_text()))]
    ours = {}
    for node in nodes:
      top = getattr(node, "module", None) or ""
      if top.split(".")[0] in {"moe_jax", *OUTSIDE}:
        ours |= {a.asname or a.name: _member(top, a.name) for a in node.names}
    # A local variable may have the name of a module.
    for node in nodes:
      if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        ours.pop(node.id, None)
      elif isinstance(node, ast.arg):
        ours.pop(node.arg, None)
    for node in nodes:
      if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        module = ours.get(node.value.id)
        if isinstance(module, types.ModuleType):
          text = f"{path}:{node.lineno}: {node.value.id}.{node.attr}"
          assert hasattr(module, node.attr), text


def _member(module, name):
  found = importlib.import_module(module)
  if hasattr(found, name):
    return getattr(found, name)
  return importlib.import_module(f"{module}.{name}")


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
