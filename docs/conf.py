"""The site of these pages: python -m sphinx -W --keep-going -b html docs build/docs

The pages are plain Markdown that reads as well without the site. What is made while it
is built stands in docs/site_pages: tables from the code in the place of comments
`<!-- site: ... -->`, links out of this folder, and docstrings of the package.
"""

import pathlib
import sys

sys.path[:0] = [
  str(pathlib.Path(__file__).parent),  # The package `site_pages`.
  str(pathlib.Path(__file__).parents[1]),
]

from site_pages import docstrings, pages  # noqa: E402

import moe_jax  # noqa: E402

project = "moe_jax"
author = "The moe_jax authors"
version = release = moe_jax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 4
smartquotes = False  # Two hyphens begin a flag.
exclude_patterns = ["site_pages"]

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "none"  # Names end in their shapes; options are long.
autodoc_preserve_defaults = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = "moe_jax"
html_static_path = ["site_pages/static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
highlight_language = "text"
pygments_style = "friendly"


def setup(app):
  """Connects what docs/site_pages does to the build."""
  app.connect("builder-inited", lambda app: pages.mirror())
  app.connect("build-finished", lambda app, exception: pages.clean())
  app.connect("source-read", pages.read)
  app.connect("autodoc-skip-member", docstrings.skip)
  # Before napoleon, which reads what this leaves.
  app.connect("autodoc-process-docstring", docstrings.plain, priority=400)
  app.connect("doctree-resolved", docstrings.dashes)
