"""Pieces of HTML: a page that loads nothing, tables, figures and legends.

A plain str is text and is escaped wherever it enters; an `Html` was made here
and is not. The policy of the page forbids scripts and anything from elsewhere,
whatever a file of a run says.
"""

import base64
import html
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

from moe_jax.run.pages import words

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = pathlib.Path(__file__).with_name("style.css")
_DASHES = {"dashes": "7 3", "points": "2 3", "mixed": "8 2 2 2", "floor": "5 4"}


class Html(str):
  """A piece of a page, whose texts are escaped."""


def escape(text) -> Html:
  """Returns an object's text, escaped; an `Html` stays unchanged."""
  if isinstance(text, Html):
    return text
  # A path may hold bytes that are not UTF-8.
  return Html(html.escape(str(text).encode(errors="replace").decode()))


def key(name: str) -> Html:
  """Returns a name such as model.moe.top_k, which may break behind its dots."""
  return Html(re.sub(r"([._/])", r"\1<wbr>", escape(name)))


def joined(parts: Iterable) -> Html:
  """Returns pieces and texts one after another."""
  return Html("\n".join(map(escape, parts)))


def tag(name: str, *parts, **attributes) -> Html:
  """Returns an element.

  Args:
    name: of the element.
    *parts: its content, pieces or texts.
    **attributes: by name; `kind` is the attribute "class".
  """
  if "kind" in attributes:
    attributes = {"class": attributes.pop("kind")} | attributes
  words = "".join(f' {k}="{escape(v)}"' for k, v in attributes.items())
  return Html(f"<{name}{words}>{joined(parts)}</{name}>")


def linked(text: str) -> Html:
  """Returns a text of `words`, its words in brackets linked to the glossary."""

  def link(match):
    shown, _, word = match[1].partition("|")
    return tag("a", Html(shown), href=f"#{_anchor(word or shown)}")

  return Html(re.sub(r"\[([^\]]+)\]", link, escape(text)))


def table(
  head: Sequence, rows: Iterable[Sequence], *, numeric: bool = False
) -> Html:
  """Returns a table that scrolls in its own box, below a head of column names.

  Args:
    head, rows: cells.
    numeric: whether all columns but the first have numbers, and not texts.
  """
  cells = [tag("tr", *(tag("th", cell) for cell in head))]
  cells += [tag("tr", *(tag("td", cell) for cell in row)) for row in rows]
  made = tag("table", *cells, kind="numbers" if numeric else "texts")
  return tag("div", made, kind="scroll")


def facts(pairs: Mapping[str, str], kind: str = "facts") -> Html:
  """Returns short facts beside each other; a fact without a value is left out.

  Args:
    pairs: {name: fact}.
    kind: "facts", or "tiles" for large numbers.
  """
  items = [
    tag("div", tag("dt", name), tag("dd", value))
    for name, value in pairs.items()
    if value
  ]
  return tag("dl", *items, kind=kind)


def figure(title: str, drawing: Html, about="", legend="") -> Html:
  """Returns a figure with its title above, and below it a text about it.

  Args:
    title, about: texts; "" for no text about it.
    drawing, legend: from `drawing` or `picture`, and `legend`; "": no legend.
  """
  caption = tag("figcaption", about) if about else ""
  return tag("figure", tag("h3", title), legend, drawing, caption)


def bullets(texts: Iterable) -> Html:
  """Returns a list of texts with code in backticks; "" for no texts."""
  code = ((re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(t))) for t in texts)
  items = [tag("li", Html(text)) for text in code]
  return tag("ul", *items) if items else Html("")


def drawing(svg: str, title: str) -> Html:
  """Returns a figure of `curves` or `heat`, with its title for screen readers.

  Args:
    svg: the figure.
    title: its title.
  """
  named = f'<svg role="img" aria-label="{escape(title)}"'
  return Html(svg.replace("<svg", named, 1))


def picture(png: bytes, title: str) -> Html:
  """Returns an image that is part of the page.

  Args:
    png: the bytes of a PNG file.
    title: words for readers who do not see it.
  """
  data = base64.b64encode(png).decode()
  return Html(f'<img src="data:image/png;base64,{data}" alt="{escape(title)}">')


def legend(items: Iterable[tuple]) -> Html:
  """Returns a list of lines, each given by the arguments of `chip`."""
  return tag("ul", *(tag("li", chip(*item)) for item in items), kind="legend")


def chip(label: str, color: str, style: str, dots: bool = False) -> Html:
  """Returns a label behind a short piece of its line.

  Args:
    label: a text.
    color, style, dots: see `plots.Trace`.
  """
  color = color if color.startswith("#") else f"var(--{color})"
  dashes = f' stroke-dasharray="{_DASHES[style]}"' if style in _DASHES else ""
  dot = f'<circle cx="15" cy="6" r="4" fill="{color}"/>' * dots
  return Html(
    f'<svg class="chip" viewBox="0 0 30 12" aria-hidden="true"><path d="M0 6H30" stroke="{color}"'
    f' stroke-width="2.5" fill="none"{dashes}/>{dot}</svg>{escape(label)}'
  )


def details(summary: str, *parts) -> Html:
  """Returns parts that a reader may open.

  Args:
    summary: the text that is always shown.
    *parts: pieces or texts.
  """
  return tag("details", tag("summary", summary), *parts)


def page(title: str, parts: Iterable, refresh: int | None = None) -> str:
  """Returns the text of the whole file.

  Args:
    title: of the window.
    parts: its pieces; the words that they link to are explained at the end.
    refresh: seconds after which a reader's browser loads it again; None: never.
  """
  body = joined(parts)
  reload = f'<meta http-equiv="refresh" content="{refresh}">' * bool(refresh)
  head = joined(
    [
      Html('<meta charset="utf-8">'),
      Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
      Html(
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
      ),
      Html('<link rel="icon" href="data:,">'),
      Html(reload),
      tag("title", title),
      Html(f"<style>\n{_STYLE.read_text(encoding='utf-8')}</style>"),
    ]
  )
  return (
    f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n'
    f"{_glossary(body)}\n</body>\n</html>\n"
  )


def _anchor(word):
  return f"word-{word.replace(' ', '-')}"


def _glossary(body):
  """The words that a page links to, and the words that explain these."""
  used = [w for w in words.GLOSSARY if f'href="#{_anchor(w)}"' in body]
  if not used:
    return ""
  items = [
    joined([tag("dt", w, id=_anchor(w)), tag("dd", f"{words.GLOSSARY[w]}.")])
    for w in used
  ]
  return joined([tag("h2", "Glossary"), tag("dl", *items, kind="words")])
