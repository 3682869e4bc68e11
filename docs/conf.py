"""How Sphinx makes the user guide (`make docs`) of plain Markdown pages."""

from __future__ import annotations

import re
from typing import Any

project = "fakefs"
project_copyright = "fakefs contributors"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 3  # as forges number them: page.md#heading
html_theme = "alabaster"
html_theme_options = {
    "description": "A Linux kernel's tracefs as a directory",
    "fixed_sidebar": True,
    "page_width": "72rem",
}
html_copy_source = False
suppress_warnings = ["misc.highlighting_failure"]  # Pygments does not know `> ` inside of quotes


def setup(app: Any) -> None:
    """Called with the sphinx.application.Sphinx. Its type is not named: only `make docs` installs Sphinx."""
    app.connect("source-read", _add_contents)


def _add_contents(app: Any, page: str, source: list[str]) -> None:
    """Give the index the table of contents that its list of links is to a reader of plain Markdown."""
    if page == "index":
        pages = re.findall(r"(?m)^- \[[^]]*\]\(([\w-]+)\.md\)", source[0])
        source[0] += "\n".join(["\n```{toctree}", ":hidden:", "", *pages, "```", ""])
