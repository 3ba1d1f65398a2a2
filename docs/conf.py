"""The documentation as a site, by `make docs`. Sphinx reads the repository as it is, so that links mean there what they mean here."""

import importlib.metadata

project, author, release = "smattn", "The smattn authors", importlib.metadata.version("smattn")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "bench/results/*.md", "docs/**.md", "examples/**.md", "tests/README.md"]
suppress_warnings = ["toc.not_included"]  # the benchmark's reports are linked from pages and not in the menu
html_theme = "furo"
html_title = "smattn"
myst_heading_anchors = 4  # named as GitHub names them
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings have shapes and dtypes
napoleon_numpy_docstring = False
MENU = {
    "Guide": [
        "docs/index", "docs/guide/alpha-and-masks", "docs/guide/migrating", "docs/guide/composing", "docs/guide/pair-bias",
        "docs/guide/lengths-and-order", "docs/guide/performance", "docs/guide/support", "docs/measured",
    ],
    "Reference": ["docs/reference"],
    "Examples": ["examples/README", "examples/vos/README", "examples/wsss/README"],
    "Design": [
        "docs/design/how-it-works", "docs/design/architecture", "docs/design/gpu-compiler", "docs/design/tiles",
        "docs/design/emulation", "docs/design/hopper", "docs/design/tile-skipping",
    ],
    "Project": ["CONTRIBUTING", "tests/README", "CHANGELOG"],
}  # fmt: skip


def add_menu(app, page, text):
    """Add to the first page, README.md, the menu that it has on the site alone."""
    if page == root_doc:
        for caption, pages in MENU.items():
            text[0] += "\n".join(["\n```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```\n"])


def setup(app):
    app.connect("source-read", add_menu)
