"""Text of the pages that is made from the code, and links that hold on the site.

Functions of `made` return the Markdown. Between the comments `<!-- made: NAME ARGUMENTS
-->` and `<!-- end -->` it is committed: `python docs/site_pages` writes it. A comment
`<!-- site: NAME ARGUMENTS -->` is replaced by it while the site is built.

The README, CONTRIBUTING, the changelog and the questions' READMEs lie outside of docs/,
and are copied to docs/repository while the site is built.
"""

import functools
import os
import pathlib
import re
import shutil

from site_pages import made

DOCS = pathlib.Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
MIRROR = "repository"
OUTSIDE = (
  "README.md",
  "CONTRIBUTING.md",
  "CHANGELOG.md",
  "experiments/*/README.md",
)
_MARK = re.compile(r"^<!-- site: (\w+) ?([^>]*?) ?-->$", re.M)
_KEPT = re.compile(
  r"^(<!-- made: (\w+) ?([^>]*?) ?-->\n).*?^<!-- end -->$", re.M | re.S
)
# Code, whose brackets are no links, or a link or picture.
_LINK = re.compile(
  r"^```.*?^```$|`[^`\n]+`(?!\])|(!?)\[((?:[^\[\]]|`[^`]*`)*)\]\(([^()\s]+)\)",
  re.M | re.S,
)


@functools.cache
def outside() -> list[str]:
  """Paths of the pages outside of docs/, from the root of the repository."""
  found = [path for pattern in OUTSIDE for path in sorted(ROOT.glob(pattern))]
  return [path.relative_to(ROOT).as_posix() for path in found]


def mirror() -> None:
  """Copies the pages outside of docs/ to docs/repository."""
  clean()
  for path in outside():
    copy = DOCS / MIRROR / path
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(ROOT / path, copy)


def clean() -> None:
  """Removes the copies."""
  shutil.rmtree(DOCS / MIRROR, ignore_errors=True)


def read(app, docname: str, source: list[str]) -> None:
  """Sphinx's event "source-read": changes the text of a page in place."""
  del app
  inside = docname.startswith(f"{MIRROR}/")
  path = docname.removeprefix(f"{MIRROR}/") if inside else f"docs/{docname}"
  text = _MARK.sub(_made, source[0])
  source[0] = linked(text, f"{path}.md", (DOCS / docname).parent)


def _made(mark):
  return getattr(made, mark[1])(*mark[2].split())


def rewritten(text: str) -> str:
  """A page whose committed text is made again."""

  def again(match):
    head, name, arguments = match.groups()
    text = getattr(made, name)(*arguments.split())
    return f"{head}\n{text}\n\n<!-- end -->"

  return _KEPT.sub(again, text)


def linked(text: str, path: str, folder: pathlib.Path) -> str:
  """A page whose links lead to pages of the site.

  A link to a file that is no page becomes its text, with the path behind it.

  Args:
    text: Markdown.
    path: of the page in the repository.
    folder: of the page's copy in docs/, from which pictures are looked up.
  """

  def changed(match):
    picture, words, target = match[1], match[2], match[3]
    if target is None or re.match(r"\w+:|#", target):
      return match[0]
    file, _, anchor = target.partition("#")
    file = (ROOT / path).parent.joinpath(file).resolve()
    if picture:
      return (
        f"![{words}]({pathlib.Path(os.path.relpath(file, folder)).as_posix()})"
      )
    where = file.relative_to(ROOT).as_posix()
    if where in outside():
      where = f"docs/{MIRROR}/{where}"
    if not where.startswith("docs/") or not where.endswith(".md"):
      return words if words.strip("`") == where else f"{words} (`{where}`)"
    anchor = f"#{anchor}" if anchor else ""
    return f"[{words}](/{where.removeprefix('docs/')}{anchor})"

  return _LINK.sub(changed, text)
