"""How the documentation is built: `nox -s docs`."""

from __future__ import annotations

project = "lab_state"
author = "the lab_state authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"
nitpick_ignore_regex = [("py:.*", r".*")]  # annotations name private types; links in prose are still checked
