"""Tests what a new user meets: README, citation, commands, constraints."""

import pathlib
import re
import resource
import subprocess
import sys
import textwrap

import pytest
import yaml

import moe_jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
FOLDERS = {
  "notebooks",
  ".ci",
  "benchmarks",
  "configs",
  "constraints",
  "docs",
  "experiments",
  "moe_jax",
  "tests",
}
SLOW = {"jax", "flax", "grain", "matplotlib", "orbax", "tensorflow_datasets"}


def block_under(comment, text=README):
  """The fenced block right under an HTML comment."""
  found = re.findall(
    rf"^<!-- {re.escape(comment)} -->\n```\w*\n(.*?)^```$", text, re.M | re.S
  )
  assert len(found) == 1, f"{len(found)} fenced blocks under {comment}"
  return found[0]


def table_rows():
  lines = [line for line in README.splitlines() if line.startswith("|")]
  return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def commands():
  cells = [cell for row in table_rows() for cell in row]
  return re.findall(r"`python -m ([\w.]+)", "\n".join(cells))


def tree_paths():
  """The paths of the file tree: two spaces deeper is inside."""
  folders, paths = [], []
  for line in block_under("tree").splitlines():
    depth = (len(line) - len(line.lstrip())) // 2
    folders = folders[:depth] + [line.split()[0]]
    paths.append("".join(folders))
  return paths


def named_paths():
  """Paths in backticks, in tables and text, and the targets of links."""
  paths = re.findall(r"\]\((?!http)([^)#]+)\)", README)
  for span in re.findall(r"`([^`\n]+)`", README):
    for path in re.findall(r"(?<![\w./-])[\w.-]+/[\w./-]*", span):
      if path.split("/")[0] in FOLDERS:
        paths.append(path)
    if re.fullmatch(r"[\w.-]+\.(?:md|cff|cfg)|LICENSE", span):
      paths.append(span)
  return paths


def test_citation():
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  for field in ("cff-version", "message", "title", "authors", "license"):
    assert citation[field], field
  assert all(author.get("name") for author in citation["authors"])
  assert str(citation["version"]) == moe_jax.__version__
  assert f"version = {{{moe_jax.__version__}}}" in README
  assert moe_jax.__version__ in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
  "name, last",
  [
    ("main", "python -m experiments.launch load_balancing --scale=demo"),
    ("test", "python -m pytest"),
  ],
)
def test_the_two_commands(name, last):
  lines = block_under(f"run: {name}").splitlines()
  assert len(lines) == 2
  assert lines[0].startswith("python -m pip install ")
  assert lines[1] == last


def test_constraints_are_names_and_versions():
  files = sorted((ROOT / "constraints").glob("*.txt"))
  assert [f.name for f in files] == ["py311.txt", "py313.txt"]
  for file in files:
    first, *lines = file.read_text().splitlines()
    dotted = f"{file.stem[2]}.{file.stem[3:]}"
    when = rf"# Tested on \d{{4}}-\d\d-\d\d with Python {dotted}\.\d+\."
    assert re.fullmatch(when, first), first
    for line in lines:
      assert re.fullmatch(r"[\w.-]+==[\w.]+", line), f"{file.name}: {line}"


def test_the_file_tree_is_there():
  missing = [p for p in tree_paths() if not (ROOT / p).exists()]
  assert not missing


def test_every_file_of_the_package_is_in_the_tree():
  tree = tree_paths()
  unknown = []
  for path in sorted((ROOT / "moe_jax").glob("**/*.py")):
    name = path.relative_to(ROOT).as_posix()
    inside = f"{path.parent.relative_to(ROOT).as_posix()}/"
    listed = any(p.startswith(inside) and p != inside for p in tree)
    summarised = inside in tree and not listed
    if path.name != "__init__.py" and name not in tree and not summarised:
      unknown.append(name)
  assert not unknown, f"README's file tree lacks {unknown}"


def test_named_paths_are_there():
  missing = [p for p in named_paths() if not (ROOT / p).exists()]
  assert not missing


def test_the_layer_in_the_readme_is_the_layer():
  shown = textwrap.indent(block_under("from: moe_jax/moe/layer.py"), "  ")
  assert shown in (ROOT / "moe_jax/moe/layer.py").read_text()


def test_there_are_commands():
  assert "moe_jax.main" in commands()


@pytest.mark.parametrize("module", commands())
def test_help_is_quick(module):
  """`--help` exits 0 and imports nothing slow, jax least of all."""
  program = f"""
import runpy, sys
sys.argv = ["{module}", "--help"]
try:
  runpy.run_module("{module}", run_name="__main__", alter_sys=True)
except SystemExit as e:
  assert not e.code, f"exit code {{e.code}}"
slow = {SLOW!r} & set(sys.modules)
assert not slow, f"--help imports {{slow}}"
"""
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  done = subprocess.run(
    [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
  )
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  assert done.returncode == 0, done.stderr
  assert "usage" in done.stdout.lower(), done.stdout
  seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
  assert seconds < 1, f"--help takes {seconds:.1f} s of processor time"


def test_the_examples_of_extending(tmp_path):
  """The parts shown in docs/extending.md work together as plugins."""
  import jax
  import jax.numpy as jnp

  from moe_jax.core import registry
  from moe_jax.moe import experts, layer
  from moe_jax.moe.types import Bound, Side

  text = (ROOT / "docs/extending.md").read_text()
  for name in re.findall(r"<!-- file: (\S+) -->", text):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(block_under(f"file: {name}", text))
  plugins = (str(tmp_path),)
  recipe = layer.Recipe(
    num_experts=4,
    router=registry.load("routers", "cosine", plugins=plugins, top_k=2),
    dispatcher=registry.load("dispatchers", "heaviest_first", plugins=plugins),
    experts=experts.build(8),
    bound=Bound(slots=3, expert_buckets=4),
  )
  assert recipe.looking_ahead == ["dispatcher"]

  rng = jax.random.key(0)
  params = {
    "router": recipe.router.init(rng, 16, 4),
    "experts": recipe.experts.init(rng, 4, 16),
  }
  x_GTD = jax.random.normal(rng, (2, 8, 16))
  side = Side(jnp.ones((2, 8), bool))
  _, stats, _ = layer.moe_ffn(recipe, params, {}, x_GTD, side)
  assert stats.kept_E.max() <= 3
  assert stats.count_E.sum() == 2 * 8 * 2

  balancer = registry.load(
    "balancers", "importance", plugins=plugins, coefficient=0.5
  )
  even = stats.replace(prob_E=jnp.ones_like(stats.prob_E))
  loss = balancer.loss({}, even, jnp.zeros(4, jnp.int32), {}).value()
  assert abs(loss - 0.5) < 1e-6
