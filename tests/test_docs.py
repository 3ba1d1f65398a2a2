"""README.md and docs/: every block of Python runs, and every link within the repository leads somewhere."""

import re
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

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)


def blocks():
    for page in PAGES:
        text = page.read_text()
        for found in BLOCK.finditer(text):
            line = text[: found.start()].count("\n") + 1  # of the fence
            yield pytest.param(page, line, found[1], id=f"{page.relative_to(ROOT)}:{line}")


@pytest.mark.parametrize("page, line, code", list(blocks()))
def test_a_block_of_code_runs(page, line, code, monkeypatch):
    torch.manual_seed(0)
    module = types.ModuleType("block")
    monkeypatch.setitem(sys.modules, "block", module)  # where Dynamo looks for the names of its functions
    exec(compile("\n" * line + code, str(page), "exec"), vars(module))  # an error names the page and its line
    assert not torch.distributed.is_initialized()  # it leaves nothing behind


def test_every_page_but_one_has_code():
    assert {block.values[0].name for block in blocks()} == {page.name for page in PAGES} - {"CONTRIBUTING.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    within = [link for link in links if "://" not in link]
    assert [link for link in within if not (page.parent / link).exists()] == []


@pytest.mark.slow
def test_the_api_reference_has_every_public_name(tmp_path):
    """`make docs`, which must list the modules that there are."""
    command = re.search(r"^\t\$\(BIN\)/pdoc (.*) --output-directory build/docs$", (ROOT / "Makefile").read_text(), re.M)[1]
    subprocess.run([sys.executable, "-m", "pdoc", *command.split(), "--output-directory", tmp_path], check=True, cwd=ROOT)
    for module in (smattn, smattn.nn, smattn.testing, smattn.distributed, smattn.integrations):
        page = (tmp_path / f"{module.__name__.replace('.', '/')}.html").read_text()
        names = [name for name in module.__all__ if not isinstance(getattr(module, name), types.ModuleType)]
        assert names and [name for name in names if f'id="{name}"' not in page] == []
