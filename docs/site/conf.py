"""The documentation as a site: `make site` builds it into build/site.

The pages are those of docs/, README, CONTRIBUTING and CHANGELOG of the root, and the reference of
the API, which is made from docstrings. Pages are written to be read on a code host too and link to
../README.md and the like; on the site such links lead to the pages that include these files.
"""

import re
from typing import Any

import reptrt

project = "reptrt"
author = "the reptrt developers"
version = release = reptrt.__version__
root_doc = "site/index"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
html_theme = "furo"
html_title = f"reptrt {release}"
html_show_sphinx = False
html_show_copyright = False
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_custom_sections = [("Options", "params_style")]

_PAGES = {"README": "index", "CONTRIBUTING": "contributing", "CHANGELOG": "changelog"}
_IN_REPOSITORY = ("LICENSE", "examples/classify.ipynb")  # files that are no pages
_LINK = re.compile(r"\[(?P<text>[^]]*)\]\((?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")


def _moved(link: re.Match[str]) -> str:
    """Return a link as the site has it; a file that the site has not becomes plain text."""
    name = link["path"].removeprefix("../")
    if name in _IN_REPOSITORY:
        return f"{link['text']} (`{name}`)"
    page = _PAGES.get(name.removesuffix(".md"))
    return f"[{link['text']}](/site/{page}.md{link['anchor'] or ''})" if page else link[0]


def _read(app: Any, page: str, source: list[str]) -> None:
    source[0] = _LINK.sub(_moved, source[0])


def _include(app: Any, path: Any, page: str, source: list[str]) -> None:
    _read(app, page, source)


def _docstring(app: Any, what: str, name: str, of: Any, options: Any, lines: list[str]) -> None:
    """Let |x| be an absolute value, not a substitution."""
    lines[:] = [line.replace("|", r"\|") for line in lines]


def setup(app: Any) -> None:
    """Register what is done to pages and docstrings."""
    app.connect("source-read", _read)
    app.connect("include-read", _include)
    app.connect("autodoc-process-docstring", _docstring)
