"""Docstrings of this project as reStructuredText, which autodoc reads.

They are plain text: `name` is code, fields of a class and options are lines such as
`name: what it is`, and what is indented is a formula. Sections such as `Args:` are left
to napoleon.
"""

import re

from docutils import nodes

# Members that libraries add to a class.
ADDED = {"replace", "parent", "name", "scope"}
SECTIONS = ("Args:", "Returns:", "Raises:")
_FIELD = re.compile(r"(\**\w+(?:, \**\w+)*)(?:: ?| {3,})")


def skip(app, what, name, obj, skipped, options):
  """Sphinx's event "autodoc-skip-member": True leaves a member out."""
  del app, what, options
  is_field = type(obj).__name__ in ("_tuplegetter", "member_descriptor")
  return True if name in ADDED or is_field else skipped


def plain(app, what, name, obj, options, lines: list[str]) -> None:
  """Sphinx's event "autodoc-process-docstring": changes the lines in place."""
  del app, name, obj, options
  blocks = re.split(r"\n\s*\n", "\n".join(lines).strip("\n"))
  lines[:] = []
  for block in blocks:
    lines += [*_block(block.split("\n"), what), ""]


def dashes(app, doctree, docname) -> None:
  """Sphinx's event "doctree-resolved": a dash after the name of a parameter.

  Sphinx writes two hyphens, which smart quotes would make one; but they would
  also take the hyphens of flags.
  """
  del app, docname
  for text in [t for t in doctree.findall(nodes.Text) if t == " -- "]:
    text.parent.replace(text, nodes.Text(" – "))


def _block(lines, what):
  """A paragraph, a list, a formula or a section."""
  if lines[0] == "Returns:":
    return _returns(_entries(lines[1:]))
  if lines[0] == "Attributes:":
    return [f"- {_field(entry)}" for entry in _entries(lines[1:])]
  if lines[0] in SECTIONS:
    return [lines[0], *(f"  {_argument(e)}" for e in _entries(lines[1:]))]
  depth = min(len(line) - len(line.lstrip()) for line in lines)
  lines = [line[depth:] for line in lines]
  fields = sum(bool(_FIELD.match(line)) for line in lines)
  if _FIELD.match(lines[0]) and (fields > 1 or what == "class" or depth):
    return [f"- {_field(entry)}" for entry in _entries(lines)]
  if depth:
    return ["::", "", *(f"  {line}" for line in lines)]
  return [escaped(" ".join(line.strip() for line in lines))]


def _entries(lines):
  """Each entry of a list as one line: deeper lines go on with the one before."""
  depth = min(len(line) - len(line.lstrip()) for line in lines)
  entries = []
  for line in lines:
    if line[depth : depth + 1].strip() or not entries:
      entries.append(line.strip())
    else:
      entries[-1] += f" {line.strip()}"
  return entries


def _returns(entries):
  """A field of reST; napoleon would take what is before a colon for a type."""
  if len(entries) == 1:
    return [f":returns: {escaped(entries[0])}"]
  return [":returns:", *(f"  - {escaped(entry)}" for entry in entries)]


def _argument(entry):
  """`name: what it is` with the name as it is, which napoleon reads."""
  found = _FIELD.match(entry)
  if not found:
    return escaped(entry)
  several = ", " in found[1]  # Napoleon escapes the asterisks of one.
  name = escaped(found[1]) if several else found[1]
  return f"{name}: {escaped(entry[found.end() :])}"


def _field(entry):
  """`name: what it is` with the name as code."""
  found = _FIELD.match(entry)
  if not found:
    return escaped(entry)
  names = ", ".join(f"``{name}``" for name in found[1].split(", "))
  return f"{names}: {escaped(entry[found.end() :])}"


def escaped(text: str) -> str:
  """Text without the markup of reST, but with `code`."""
  # "D." at the beginning would number a list.
  text = re.sub(r"^(\w+[.)])(?=\s|$)", r"\\\1", text)
  made = ""
  for part in re.split(r"(`[^`]+`)", text):
    if part.startswith("`") and len(part) > 1:
      made += ("\\ " if made[-1:].isalnum() else "") + f"`{part}`"
    else:
      glued = made.endswith("``") and part[:1].isalnum()
      made += "\\ " if glued else ""
      made += re.sub(r"(\\(?!\w+[.)])|[*|`]|_(?!\w))", r"\\\1", part)
  return made
