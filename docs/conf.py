"""How the documentation is built: `nox -s docs`."""

from __future__ import annotations

import tomllib
from pathlib import Path

_PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
_REPOSITORY = _PROJECT["urls"]["Repository"]

project = "lab_state"
author = "the lab_state authors"
project_copyright = author
release = version = _PROJECT["version"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
default_role = "code"  # `name` in a docstring is code
html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"lab_state {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_search_scorer = str(Path(__file__).parent / "_static" / "scorer.js")
# Each page has links to the repository, to its own source, and "edit this page".
html_theme_options = {
    "source_repository": _REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
    "footer_icons": [{"name": "Repository", "url": _REPOSITORY, "html": "Repository", "class": ""}],
}
myst_heading_anchors = 3
autoclass_content = "both"  # with the arguments of the constructor
autodoc_typehints = "description"
autodoc_member_order = "bysource"
nitpick_ignore_regex = [("py:.*", r".*")]  # annotations name private types; links in prose are still checked
