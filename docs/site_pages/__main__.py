"""Writes what pages have from the code, and is committed: python docs/site_pages"""

import pathlib
import sys

DOCS = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

from site_pages import pages  # noqa: E402

for path in sorted(DOCS.glob("*.md")):
  text = path.read_text()
  if (new := pages.rewritten(text)) != text:
    path.write_text(new)
    print(f"{path.relative_to(DOCS.parent)} is written")
