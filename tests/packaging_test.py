"""Tests what a new user meets: README, citation, wheel, commands, constraints."""

import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import time
import venv
import zipfile

import pytest
import yaml

import moe_jax
from moe_jax import __main__ as moe_jax_main
from moe_jax import params
from moe_jax.core.errors import ConfigError
from moe_jax.run import command

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
  """The modules of the commands in tables, under either of their names."""
  cells = "\n".join(cell for row in table_rows() for cell in row)
  named = re.findall(r"`(?:python -m|moe-jax) ([a-z][\w.]*)", cells)
  return [moe_jax_main.COMMANDS.get(name, (name,))[0] for name in named]


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
  fields = ("cff-version", "message", "title", "abstract", "authors", "license")
  for field in fields:
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


def test_every_command_has_a_name():
  files = (ROOT / "moe_jax").glob("[!_]*.py")
  modules = {module for module, _ in moe_jax_main.COMMANDS.values()}
  elsewhere = {"moe_jax.launch.local", "experiments.launch"}
  assert modules == {f"moe_jax.{file.stem}" for file in files} | elsewhere
  ours = {m for m in commands() if not m.startswith(("benchmarks.", "tests."))}
  assert ours - {"moe_jax"} <= modules
  named = re.findall(r"(?:^|`)moe-jax ([a-z]\w*)", README, re.M)
  assert set(named) <= set(moe_jax_main.COMMANDS)


def test_commands_are_listed(capsys):
  assert moe_jax_main.main([]) == 0
  listed = capsys.readouterr().out
  assert moe_jax_main.main(["--help"]) == 0
  assert capsys.readouterr().out == listed
  *_, table = listed.split("\n\n")
  rows = [line.split(maxsplit=1) for line in table.splitlines()]
  assert {name: words for name, words in rows} == {
    name: words for name, (_, words) in moe_jax_main.COMMANDS.items()
  }


def test_an_unknown_command_names_the_nearest_one():
  with pytest.raises(ConfigError, match='no command "trian".*mean "train"'):
    moe_jax_main.main(["trian", "--config=tiny"])


@pytest.mark.parametrize("name", moe_jax_main.COMMANDS)
def test_help_says_how_the_command_was_called(name, monkeypatch, capsys):
  monkeypatch.setattr(command, "called", None)
  monkeypatch.setattr(sys, "path", [*sys.path])
  with pytest.raises(SystemExit) as e:
    moe_jax_main.main([name, "--help"])
  assert not e.value.code
  assert capsys.readouterr().out.startswith(f"usage: moe-jax {name} ")


def test_no_command_is_imported_before_signals_are_handled():
  text = "import sys, moe_jax.__main__; print(*sys.modules)"
  done = subprocess.run(
    [sys.executable, "-c", text], capture_output=True, text=True, check=True
  )
  names = set(done.stdout.split())
  assert not {name.partition(".")[0] for name in names} & (
    SLOW | {"numpy", "ml_collections"}
  )
  assert not {module for module, _ in moe_jax_main.COMMANDS.values()} & names


def repository():
  """The paths of all files that git has, or would add."""
  out = subprocess.run(
    ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT,
    capture_output=True,
    check=True,
    text=True,
  ).stdout
  return {name for name in out.split("\0") if (ROOT / name).is_file()}


def build(kind, source, folder):
  """Builds the "sdist" or the "wheel" of a folder, with what is installed."""
  program = (
    f"from setuptools import build_meta as b; b.build_{kind}({folder!r})"
  )
  done = subprocess.run(
    [sys.executable, "-c", program], cwd=source, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  """(files of the repository, sdist, wheel that is built from that sdist)."""
  place, files = tmp_path_factory.mktemp("built"), repository()
  for name in files:
    (place / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
    (place / "copy" / name).write_bytes((ROOT / name).read_bytes())
  build("sdist", place / "copy", str(place))
  [sdist] = place.glob("*.tar.gz")
  with tarfile.open(sdist) as archive:
    archive.extractall(place, filter="data")
  build("wheel", place / sdist.name.removesuffix(".tar.gz"), str(place))
  [wheel] = place.glob("*.whl")
  return files, sdist, wheel


@pytest.fixture(scope="module")
def scripts(built, tmp_path_factory):
  """The folder of commands of an environment in which the wheel is installed.

  What the wheel needs is found where these tests find it.
  """
  place = tmp_path_factory.mktemp("installed")
  venv.create(place, symlinks=True)
  [site] = place.glob("lib/python*/site-packages")
  needed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
  (site / "needed.pth").write_text("\n".join(needed))
  pip = [sys.executable, "-m", "pip", "--python", place / "bin" / "python"]
  quiet = ["-q", "--disable-pip-version-check", "--no-index", "--no-deps"]
  subprocess.run([*pip, "install", *quiet, built[-1]], check=True)
  return place / "bin"


def called(scripts, cwd, *args):
  """The finished process of `moe-jax` with some arguments, in a folder."""
  env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
  return subprocess.run(
    [scripts / "moe-jax", *args],
    cwd=cwd,
    env=env,
    capture_output=True,
    text=True,
  )


def test_the_sdist_holds_the_repository(built):
  files, sdist, _ = built
  with tarfile.open(sdist) as archive:
    paths = [member.name for member in archive.getmembers() if member.isfile()]
  names = {path.partition("/")[2] for path in paths}
  names = {n for n in names if not n.startswith("moe_jax.egg-info/")}
  assert names == files | {"PKG-INFO"}


def test_the_wheel_holds_the_package_and_what_it_ships(built):
  files, _, wheel = built
  with zipfile.ZipFile(wheel) as archive:
    names = archive.namelist()
  about = f"moe_jax-{moe_jax.__version__}.dist-info"
  assert f"{about}/licenses/LICENSE" in names
  shipped = re.compile(r"(configs/|experiments/(\w+/)?)\w+\.(py|csv)")
  wanted = {name for name in files if name.startswith("moe_jax/")}
  wanted |= {f"moe_jax/shipped/{n}" for n in files if shipped.fullmatch(n)}
  assert "moe_jax/moe/kernels/gpu/tiles.json" in wanted
  assert "moe_jax/shipped/configs/tiny.py" in wanted
  assert {n for n in names if not n.startswith(f"{about}/")} == wanted


def test_an_installed_wheel_works_outside_of_a_checkout(
  scripts, tmp_path, capsys
):
  done = called(scripts, tmp_path, "--help")
  assert done.returncode == 0 and "  train " in done.stdout, done.stderr
  done = called(scripts, tmp_path, "trian")
  assert done.returncode == 2
  assert done.stderr.startswith('error: there is no command "trian"')
  assert params.main(["--config=configs/tiny.py"]) == 0
  expected = capsys.readouterr().out
  for config in ("tiny", "configs/tiny.py"):
    done = called(scripts, tmp_path, "params", f"--config={config}")
    assert done.stdout == expected, done.stderr
  done = called(scripts, tmp_path, "params", "--config=tinny")
  assert done.returncode == 2
  assert done.stderr.endswith('"tinny"; did you mean "tiny"?\n')


@pytest.mark.long
def test_an_installed_wheel_trains_and_reports(scripts, tmp_path):
  (tmp_path / "own.py").write_text(
    "from configs import tiny\n\n\ndef get_config():\n"
    "  c = tiny.get_config()\n  c.data.dir = 'texts'\n"
    "  c.train.num_steps, c.optim.warmup_steps = 2, 1\n  return c\n"
  )
  (tmp_path / "texts").mkdir()
  for i in range(40):
    text = " ".join(str(n * n) for n in range(i, 99 + i))
    (tmp_path / "texts" / f"{i}.txt").write_text(text)
  flags = ["--config=own.py", "--workdir=run", "--config.data.cache_dir=cache"]
  done = called(scripts, tmp_path, "train", *flags)
  assert done.returncode == 0, done.stderr
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  assert lines and '"step": 2' in lines[-1]
  done = called(scripts, tmp_path, "params", "--config=run/config.json")
  assert done.returncode == 0 and "39,360" in done.stdout, done.stderr

  done = called(scripts, tmp_path, "experiment", "--list")
  assert "load_balancing " in done.stdout, done.stderr
  flags = ["load_balancing", "--scale=cpu", "--report", "--workdir=cpu"]
  done = called(scripts, tmp_path, "experiment", *flags)
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "cpu" / "report" / "table.md").is_file()

  flags = ["--processes=2", "--module=moe_jax", "--", "params", "--config=tiny"]
  done = called(scripts, tmp_path, "launch", *flags)
  assert done.stdout.count("39,360") == 2, done.stderr


@pytest.mark.long
def test_early_signals_leave_no_traceback(scripts, tmp_path):
  """Before the handlers a signal ends Python itself, afterwards the command."""
  codes = []
  for delay in range(24):
    process = subprocess.Popen(
      [scripts / "moe-jax", "params", "--config=base"],
      cwd=tmp_path,
      stderr=subprocess.PIPE,
      text=True,
    )
    time.sleep(delay / 40)
    process.terminate()
    _, said = process.communicate()
    assert "Traceback" not in said
    codes.append(process.returncode)
  assert set(codes) <= {-signal.SIGTERM, 75} and 75 in codes, codes


@pytest.mark.parametrize("module", dict.fromkeys(["moe_jax", *commands()]))
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
