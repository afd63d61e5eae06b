"""Pieces of HTML: a page that loads nothing, tables, figures and legends.

A plain str is text and is escaped wherever it enters; `Html` is what was made here.
The policy of the page forbids scripts and anything from elsewhere, whatever a file
of a run says.
"""

import base64
import html
import re
from collections.abc import Iterable, Mapping, Sequence

from moe_jax.run.pages import style, words

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_DASHES = {"dashes": "7 3", "points": "2 3", "mixed": "8 2 2 2", "floor": "5 4"}


class Html(str):
  """A piece of a page, whose texts are escaped."""


def escape(text) -> Html:
  """A text, or what str() makes of another object; `Html` as it is."""
  if isinstance(text, Html):
    return text
  # A path may hold bytes that are no text.
  return Html(html.escape(str(text).encode(errors="replace").decode()))


def key(name: str) -> Html:
  """A name such as model.moe.top_k, which may break behind its dots."""
  return Html(re.sub(r"([._/])", r"\1<wbr>", escape(name)))


def joined(parts: Iterable) -> Html:
  """Pieces and texts one after another."""
  return Html("\n".join(map(escape, parts)))


def tag(name: str, *parts, **attributes) -> Html:
  """An element; the attribute "class" is `kind`."""
  if "kind" in attributes:
    attributes = {"class": attributes.pop("kind")} | attributes
  words = "".join(f' {k}="{escape(v)}"' for k, v in attributes.items())
  return Html(f"<{name}{words}>{joined(parts)}</{name}>")


def linked(text: str) -> Html:
  """A text of `words`, whose words in brackets become links to the glossary."""

  def link(match):
    shown, _, word = match[1].partition("|")
    return tag("a", Html(shown), href=f"#{_anchor(word or shown)}")

  return Html(re.sub(r"\[([^\]]+)\]", link, escape(text)))


def table(
  head: Sequence, rows: Iterable[Sequence], *, numeric: bool = False
) -> Html:
  """A table that scrolls in its own box, below a head that names its columns.

  Args:
    head, rows: cells.
    numeric: whether all columns but the first have numbers, and not texts.
  """
  cells = [tag("tr", *(tag("th", cell) for cell in head))]
  cells += [tag("tr", *(tag("td", cell) for cell in row)) for row in rows]
  made = tag("table", *cells, kind="numbers" if numeric else "texts")
  return tag("div", made, kind="scroll")


def facts(pairs: Mapping[str, str], kind: str = "facts") -> Html:
  """Short facts beside each other; one without a value is left out.

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
  """A figure with its title above, and below it what it shows."""
  caption = tag("figcaption", about) if about else ""
  return tag("figure", tag("h3", title), legend, drawing, caption)


def bullets(texts: Iterable) -> Html:
  """A list of texts with code in backticks; "" without any."""
  code = ((re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(t))) for t in texts)
  items = [tag("li", Html(text)) for text in code]
  return tag("ul", *items) if items else Html("")


def drawing(svg: str, title: str) -> Html:
  """A figure of `curves` or `heat`, with its title for readers who hear it."""
  named = f'<svg role="img" aria-label="{escape(title)}"'
  return Html(svg.replace("<svg", named, 1))


def picture(png: bytes, title: str) -> Html:
  """An image that is part of the page."""
  data = base64.b64encode(png).decode()
  return Html(f'<img src="data:image/png;base64,{data}" alt="{escape(title)}">')


def legend(items: Iterable[tuple]) -> Html:
  """A list of lines, each by the arguments of `chip`."""
  return tag("ul", *(tag("li", chip(*item)) for item in items), kind="legend")


def chip(label: str, color: str, style: str, dots: bool = False) -> Html:
  """A label behind a short piece of its line, see `plots.Trace`."""
  color = color if color.startswith("#") else f"var(--{color})"
  dashes = f' stroke-dasharray="{_DASHES[style]}"' if style in _DASHES else ""
  dot = f'<circle cx="15" cy="6" r="4" fill="{color}"/>' * dots
  return Html(
    f'<svg class="chip" viewBox="0 0 30 12" aria-hidden="true"><path d="M0 6H30" stroke="{color}"'
    f' stroke-width="2.5" fill="none"{dashes}/>{dot}</svg>{escape(label)}'
  )


def details(summary: str, *parts) -> Html:
  """Parts that a reader may open."""
  return tag("details", tag("summary", summary), *parts)


def page(title: str, parts: Iterable, refresh: int | None = None) -> str:
  """The whole file.

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
      Html(f"<style>{style.CSS}</style>"),
    ]
  )
  return (
    f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n'
    f"{_glossary(body)}\n</body>\n</html>\n"
  )


def _anchor(word):
  return f"word-{word.replace(' ', '-')}"


def _glossary(body):
  """The words that a page links to, and those that explain them."""
  used = [w for w in words.GLOSSARY if f'href="#{_anchor(w)}"' in body]
  if not used:
    return ""
  items = [
    joined([tag("dt", w, id=_anchor(w)), tag("dd", f"{words.GLOSSARY[w]}.")])
    for w in used
  ]
  return joined([tag("h2", "Glossary"), tag("dl", *items, kind="words")])
