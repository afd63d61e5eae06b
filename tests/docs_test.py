"""Documents lead where they say, and docstrings explain what functions take."""

import ast
import importlib
import pathlib
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree

import pytest

import moe_jax
from configs import base
from moe_jax.hf import families
from tests import house
from tests.house import ROOT

sys.path.append(str(ROOT / "docs"))
from site_pages import made, pages  # noqa: E402

ANSWERED = [path.relative_to(ROOT).as_posix() for path in made.answered()]
# Not the README of a question that is still being worked on.
PAGES = {
  page: (ROOT / page).read_text()
  for page in (
    *(f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md"))),
    *(page for page in pages.outside() if not page.startswith("experiments/")),
    *ANSWERED,
  )
}
PACKAGE = ROOT / "moe_jax"
EXPLAINED = sorted(PACKAGE.rglob("*.py"))
_FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
_ENTRY = re.compile(r"^  (\**\w+(?:, \**\w+)*):", re.M)


def prose(text):
  """A page without its blocks of code."""
  return _FENCE.sub("", text)


def anchors(text):
  """The anchors of a page's headings, as they are made of the words."""
  found = {}
  for title in re.findall(r"^#+ (.*)$", prose(text), re.M):
    title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
    slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
    number = found[slug] = found.get(slug, -1) + 1
    yield slug if not number else f"{slug}-{number}"


def links(text):
  """The targets of a page's relative links and pictures."""
  text = re.sub(r"`[^`\n]*`", "", prose(text))
  found = re.findall(r"\]\(([^()\s]+)\)", text)
  return [target for target in found if not re.match(r"\w+:", target)]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
  for target in links(PAGES[page]):
    name, _, anchor = target.partition("#")
    path = (
      (ROOT / page).parent.joinpath(name).resolve() if name else ROOT / page
    )
    assert path.exists(), f"{page} links to {target}"
    if anchor:
      there = set(anchors(path.read_text()))
      assert anchor in there, f"{page} links to {target}; there are {there}"


def test_an_anchor_is_made_of_a_heading():
  text = "# A `b`, (c)\n```\n# not this\n```\n## A b c\n## [X](y) – z\n"
  assert [*anchors(text)] == ["a-b-c", "a-b-c-1", "x--z"]


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
  """Those of the package, configs and tests, but for names such as NAME.py."""
  if page == "CHANGELOG.md":  # What was there when it was written.
    return
  for span in re.findall(r"`([^`\n]+)`", prose(PAGES[page])):
    for path in re.findall(
      r"(?<![\w./-])(?:moe_jax|configs|tests|benchmarks|docs)/[\w./]*\w", span
    ):
      known = (ROOT / path).exists() or any(ROOT.glob(f"{path}*"))
      assert known or re.search("[A-Z]{4}", path), f"{page} names {path}"


@pytest.mark.parametrize("page", PAGES)
def test_named_commands_exist(page):
  for name in re.findall(r"python -m ([\w.]*\w)", PAGES[page]):
    ours = ("moe_jax", "experiments", "benchmarks", "tests")
    if name.split(".")[0] in ours and not name.split(".")[-1].isupper():
      path = ROOT / name.replace(".", "/")
      known = path.with_suffix(".py").exists() or path.is_dir()
      assert known, f"{page} names {name}"


def test_commands_of_claims_have_what_they_name():
  """Configs and their variants, questions and options."""
  blocks = re.findall(r"```bash\n(.*?)```", PAGES["docs/claims.md"], re.S)
  words = shlex.split(" ".join(blocks).replace("\\\n", " "))
  questions = [
    words[i + 1] for i, word in enumerate(words) if word == "experiment"
  ]
  assert len(questions) > 5
  for name in questions:
    assert (ROOT / "experiments" / name / "sweep.py").exists(), name
  configs = [w.partition("=")[2] for w in words if w.startswith("--config=")]
  for file, _, variant in (config.partition(":") for config in configs):
    spec = importlib.import_module(f"configs.{file}")
    assert spec.get_config(*([variant] if variant else [])), file
  for key in (w for w in words if w.startswith("--config.")):
    value = base.get_config()
    for name in key.partition("=")[0].removeprefix("--config.").split("."):
      value = value[name]


def test_every_claim_has_a_source_or_says_that_there_is_none():
  claims = re.split(r"^## ", PAGES["docs/claims.md"], flags=re.M)[1:]
  assert len(claims) > 10
  for claim in claims:
    sourced = re.search(
      r"arxiv\.org/abs/\d{4}\.\d{5}|(?:planning|performance)\.md", claim
    )
    assert sourced or "Unconfirmed" in claim or "no source" in claim, claim
    assert "```bash" in claim or "Unconfirmed" in claim or "limits" in claim


def test_every_page_is_in_the_index():
  listed = set(links(PAGES["docs/index.md"]))
  for page in PAGES:
    name = pathlib.Path(page)
    if page.startswith("docs/") and name.name != "index.md":
      assert name.name in listed, f"docs/index.md does not list {page}"


def test_the_results_list_the_questions_that_are_answered():
  listed = [
    link.removeprefix("../")
    for link in links(PAGES["docs/results.md"])
    if re.fullmatch(r"\.\./experiments/\w+/README\.md", link)
  ]
  assert listed == ANSWERED


def test_a_question_is_answered_by_rows_and_words(tmp_path, monkeypatch):
  for name, text, has_rows in (
    *(("begun", "# Is it?\n", False), ("told", "## Answer\nYes.\n", False)),
    *(("run", "# Is it?\n", True), ("whole", "## Answer\nYes.\n", True)),
  ):
    folder = tmp_path / "experiments" / name
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(text)
    if has_rows:
      (folder / "results.csv").write_text("scale,arm,seed\n")
  monkeypatch.setattr(made, "ROOT", tmp_path)
  assert [path.parent.name for path in made.answered()] == ["whole"]


def test_every_command_is_in_cli():
  """Files with a main program that users call, of the package and beside it."""
  files = [
    *ROOT.glob("moe_jax/*.py"),
    *ROOT.glob("moe_jax/launch/*.py"),
    *ROOT.glob("benchmarks/*.py"),
    *ROOT.glob("experiments/*.py"),
    *(f for page in ANSWERED for f in (ROOT / page).parent.glob("*.py")),
  ]
  for path in files:
    is_script = path.name == "__main__.py"  # Which calls the others.
    if '__name__ == "__main__"' in path.read_text() and not is_script:
      name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
      assert f"<!-- made: command {name} -->" in PAGES["docs/cli.md"], name


@pytest.mark.parametrize("page", ["cli", "configs", "results"])
def test_the_text_from_the_code_is_up_to_date(page):
  text = PAGES[f"docs/{page}.md"]
  assert text.count("<!-- made: ") == text.count("<!-- end -->") > 0
  assert pages.rewritten(text) == text, (
    f"run python docs/site_pages and commit docs/{page}.md"
  )


def test_only_text_between_comments_is_made_again():
  text = "a\n<!-- made: escaped x_y -->\nold\n<!-- end -->\nb\n"
  new = "a\n<!-- made: escaped x_y -->\n\nx\\_y\n\n<!-- end -->\nb\n"
  assert pages.rewritten(text) == pages.rewritten(new) == new


def test_the_table_of_published_models_has_every_family_and_preset():
  section = PAGES["docs/models.md"].split("\n## ")[1]
  rows = [line.split("|")[1:-1] for line in section.splitlines() if "|" in line]
  presets, read = (
    {name for row in rows[2:] for name in re.findall(r"`([\w:-]+)`", row[i])}
    for i in (1, 2)
  )
  assert read == set(families.known())
  known = {path.stem for path in ROOT.glob("configs/[!_]*.py")}
  assert {name.partition(":")[0] for name in presets} == known - {
    *("base", "tiny", "published")
  }


def test_the_options_page_has_every_key():
  rows = {key: (value, meaning) for key, value, meaning in made.config_rows()}
  for key, value in _leaves("", base.get_config().to_dict()):
    assert any(key == k or key.startswith(f"{k}.") for k in rows), key
    if key in rows:
      assert rows[key][0] == repr(value)
  assert rows["model.moe.top_k"] == ("2", "K, experts per token")
  assert rows["model.attention_dropout"] == rows["model.hidden_dropout"]
  described = [meaning for _, meaning in rows.values() if meaning]
  assert len(described) == len(rows), "an option has no comment"


def _leaves(key, value):
  if not isinstance(value, dict) or not value:
    yield key, value
    return
  for name, inner in value.items():
    yield from _leaves(f"{key}.{name}".lstrip("."), inner)


def test_the_drawing_has_the_stages_of_its_page():
  page = PAGES["docs/architecture.md"]
  stages = re.findall(r"^ *\d+\. \*\*([\w ]+)\*\*", page, re.M)
  tree = xml.etree.ElementTree.parse(ROOT / "docs" / "architecture.svg")
  names = [x.text for x in tree.iter() if x.get("class") == "name"]
  assert len(stages) > 10
  assert sorted(stages) == sorted(
    "model" if name == "MoE layer of a model" else name for name in names
  )
  for room in house.ROOMS:
    assert f"| `{room}` |" in page


def test_links_out_of_the_docs_become_words():
  text = (
    "[a](layer.md#nnx) [b](../README.md) [c](../configs/base.py) `[d](e)`\n"
    "![f](../experiments/gating/figures/x.png) [g](https://h.i) [j](#k)\n"
  )
  there = pages.linked(text, "docs/x.md", ROOT / "docs")
  assert there == (
    "[a](/layer.md#nnx) [b](/repository/README.md) c (`configs/base.py`)"
    " `[d](e)`\n![f](../experiments/gating/figures/x.png) [g](https://h.i)"
    " [j](#k)\n"
  )
  copy = ROOT / "docs" / "repository" / "experiments" / "gating"
  there = pages.linked(
    "![f](figures/x.png) [b](../routers/README.md)",
    "experiments/gating/README.md",
    copy,
  )
  assert there == (
    "![f](../../../../experiments/gating/figures/x.png)"
    " [b](/repository/experiments/routers/README.md)"
  )


def test_the_site_has_all_pages_in_its_contents():
  trees = made.contents()
  for page in PAGES:
    name = page.removeprefix("docs/").removesuffix(".md")
    place = name if page.startswith("docs/") else f"{pages.MIRROR}/{name}"
    assert trees.count(f"<{place}>") == (name != "index"), page
  assert trees.count("```{toctree}") == 7


def test_the_site_shows_every_answer():
  text = made.questions()
  assert text.count("\n\n![") == len(ANSWERED)
  assert "## Softmax or sigmoid gates, at the same balance?" in text
  assert "sigmoid − softmax:\n−0.040 ± 0.014" in text
  rows = (ROOT / "experiments" / "gating" / "results.csv").read_text()
  number = rows.count("\ncpu,")
  assert f"Committed: {number} runs at scale `cpu`, of 8 arms." in text


def test_the_site_shows_the_flags_of_commands():
  text = made.command("moe_jax.params")
  assert text.startswith("Counts the parameters of a config.")
  assert "| `--config=FILE[:VARIANT]` | " in text and "; needed |" in text
  assert "one of `f32`, `bf16`, `f16`, `f8`" in text
  assert made._named("python -m moe_jax.main\npython -m tests.pod x") == (
    "moe-jax train\npython -m tests.pod x"
  )
  assert made.escaped("a_b|{c}") == r"a\_b\|\{c\}"


def functions(path):
  """(name, function, docstring of the file) of a file's public functions.

  Methods of its classes are among them, and so is `__call__`.
  """
  tree = ast.parse(path.read_text())
  for node in tree.body:
    inside = node.body if isinstance(node, ast.ClassDef) else [node]
    for function in inside:
      if isinstance(function, ast.FunctionDef) and (
        function.name[0] != "_" or function.name == "__call__"
      ):
        name = f"{path.relative_to(ROOT)}:{function.lineno}: {function.name}"
        yield name, function, ast.get_docstring(tree)


def arguments(function):
  """Names of a function's parameters, as `Args:` names them."""
  args = function.args
  names = [a.arg for a in (*args.posonlyargs, *args.args)]
  names += [f"*{args.vararg.arg}"] if args.vararg else []
  names += [a.arg for a in args.kwonlyargs]
  names += [f"**{args.kwarg.arg}"] if args.kwarg else []
  return [name for name in names if name not in ("self", "cls")]


def raised(function):
  """Names of the errors that a function's own statements raise.

  Those in a `try` are left out: they may be caught there. So are calls of a
  function that makes the error, whose name begins with a small letter.
  """
  stack, names = list(function.body), set()
  while stack:
    node = stack.pop()
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
      names.add(ast.unparse(node.exc.func).rpartition(".")[2])
    if isinstance(node, ast.Try):
      stack += [*node.handlers, *node.orelse, *node.finalbody]
    elif not isinstance(node, ast.FunctionDef | ast.Lambda):
      stack.extend(ast.iter_child_nodes(node))
  return {name for name in names if name[0].isupper()}


def explained(docstring, head):
  """The names in the section below a head line."""
  found = re.search(rf"^{re.escape(head)}\n+((?:  .*\n?|\n)*)", docstring, re.M)
  entries = _ENTRY.findall(found[1]) if found else []
  return [name for entry in entries for name in entry.split(", ")]


@pytest.mark.parametrize(
  "path", EXPLAINED, ids=lambda p: p.relative_to(PACKAGE).as_posix()
)
def test_docstrings_explain_the_arguments(path):
  """Every public function, and public method, has a docstring.

  - With two or more parameters it has a section `Args:` that names each of them
    once. An entry may name several, such as "config, mesh: as in `build`."
  - With one parameter the text may tell about it. If there is a section `Args:`, it
    names this parameter and no other.
  - The options of a part's `build` may stand at the head of its file.
  - Every error of a `raise` in its own body is named.
  """
  for name, function, head in functions(path):
    docstring = ast.get_docstring(function)
    assert docstring, name
    names, wanted = explained(docstring, "Args:"), arguments(function)
    if function.name == "build" and not names:
      names = explained(head, "The options of `build`:")
    alone = len(wanted) == 1 and not names
    assert alone or sorted(names) == sorted(wanted), name
    for error in raised(function):
      assert error in docstring, f"{name} raises {error}"


@pytest.mark.parametrize(
  "path", EXPLAINED, ids=lambda p: p.relative_to(PACKAGE).as_posix()
)
def test_docstrings_begin_with_what_something_is_or_does(path):
  """No docstring leaves out the noun that its first word stands for."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
      docstring = ast.get_docstring(node) or ""
      begin = re.match(r"(Of|What|As|That|Which|How|The same)\b", docstring)
      place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
      assert not begin, f"{place} begins with {begin[0]}"


def test_exported_names_explain_their_arguments():
  for name, place in moe_jax._PLACES.items():
    path = ROOT / f"{place.replace('.', '/')}.py"
    tree = ast.parse(path.read_text())
    (node,) = (x for x in tree.body if getattr(x, "name", None) == name)
    docstring = ast.get_docstring(node)
    if isinstance(node, ast.FunctionDef):
      assert explained(docstring, "Args:") == arguments(node), name
      continue
    fields = [x.target.id for x in node.body if isinstance(x, ast.AnnAssign)]
    told = re.findall(r"^(\w+): ", docstring, re.M)
    plain = {"router", "dispatcher", "experts"}  # Their types say it.
    assert set(fields) - plain == set(told), name


@pytest.mark.long
def test_the_site_has_no_warnings(tmp_path):
  """Needs sphinx, myst-parser and furo, of the extra `test`."""
  command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q"]
  done = subprocess.run(
    [*command, "-b", "html", "docs", str(tmp_path)],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  text = (tmp_path / "api.html").read_text()
  assert 'id="moe_jax.moe.layer.moe_ffn"' in text
  assert "<!-- site:" not in (tmp_path / "api.html").read_text()
