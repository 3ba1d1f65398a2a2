"""Every block of Python in README.md and docs/ runs. In every Markdown file, links within the repository lead to a file and a heading."""

import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import smattn
import smattn.distributed
import smattn.integrations
import smattn.testing

pytestmark = pytest.mark.promise("documentation")
ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = {"build", "dist", *(path.name for path in ROOT.glob(".*"))} - {".github"}  # not asked of git: an unpacked sdist has none
MARKDOWN = [page for page in sorted(ROOT.rglob("*.md")) if page.relative_to(ROOT).parts[0] not in OTHERS]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
CODE = re.compile(r"^ *```.*?^ *```$|`[^`\n]*`", re.M | re.S)  # where a pattern of a link or a heading is none
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.M)


def blocks():
    for page in PAGES:
        text = page.read_text()
        for found in BLOCK.finditer(text):
            line = text[: found.start()].count("\n") + 1  # the line of the fence
            yield pytest.param(page, line, found[1], id=f"{page.relative_to(ROOT)}:{line}")


@pytest.mark.parametrize("page, line, code", list(blocks()))
def test_a_block_of_code_runs(page, line, code, monkeypatch):
    torch.manual_seed(0)
    module = types.ModuleType("block")
    monkeypatch.setitem(sys.modules, "block", module)  # Dynamo looks there for the names of functions
    exec(compile("\n" * line + code, str(page), "exec"), vars(module))  # an error names the page and its line
    assert not torch.distributed.is_initialized()  # a block leaves nothing behind


def test_the_pages_that_explain_calls_have_code():
    explain = {ROOT / "README.md", *(ROOT / "docs" / "guide").glob("*.md"), ROOT / "docs" / "design" / "how-it-works.md"}
    assert len(explain) > 5 and explain <= {block.values[0] for block in blocks()}


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of headings: lower case, without punctuation, hyphens for spaces, a number where one is repeated."""
    found: list[str] = []
    for heading in HEADING.findall(re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.M | re.S)):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        found.append(re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-"))
    return {name if count == 0 else f"{name}-{count}" for i, name in enumerate(found) for count in [found[:i].count(name)]}


def test_anchors_are_those_that_github_makes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# The mask's `dtype`: 16-bit\n```\n# a comment\n```\n## A [link](x.md)\n## A link\n")
    assert anchors(page) == {"the-masks-dtype-16-bit", "a-link", "a-link-1"}


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = [link.partition("#") for link in LINK.findall(CODE.sub("", page.read_text())) if "://" not in link]
    missing = [file for file, _, _ in links if not (page.parent / file).exists()]
    to_headings = [(page.parent / file if file else page, anchor) for file, _, anchor in links if anchor]
    assert missing == []
    assert [anchor for target, anchor in to_headings if anchor not in anchors(target)] == []


def test_every_page_can_be_reached_from_the_index():
    """The index itself is reached from the README."""
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in LINK.findall(index.read_text()) if "://" not in link}
    assert set((ROOT / "docs").rglob("*.md")) - {index} <= linked
    assert "](docs/index.md)" in (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_site_is_made_without_a_warning_and_has_every_public_name(tmp_path):
    """By the command of `make docs`."""
    command = re.search(r"^\t\$\(BIN\)/(sphinx-build .*) build/docs$", (ROOT / "Makefile").read_text(), re.M)[1]
    program, *arguments = command.split()
    made = subprocess.run([Path(sys.executable).with_name(program), *arguments, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert (made.returncode, made.stderr) == (0, "")
    page = (tmp_path / "docs" / "reference.html").read_text()
    for module in (smattn, smattn.nn, smattn.testing, smattn.distributed, smattn.integrations):
        names = [name for name in module.__all__ if callable(getattr(module, name)) and name != "Masking"]
        assert names and [name for name in names if f'id="{module.__name__}.{name}"' not in page] == []


def test_every_page_is_in_the_menu_of_the_site():
    conf = runpy.run_path(ROOT / "docs" / "conf.py")
    menu = {f"{page}.md" for pages in conf["MENU"].values() for page in pages}
    assert {str(page.relative_to(ROOT)) for page in MARKDOWN if page.parent.name != "results" and page != ROOT / "README.md"} - menu == {
        "CODE_OF_CONDUCT.md", "SECURITY.md", ".github/pull_request_template.md",
    }  # fmt: skip
