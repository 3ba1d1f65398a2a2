"""Pictures for the tests of examples/wsss, written once for all of them, and a copy that a test may break."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from examples.wsss import synthetic
from examples.wsss.config import Config

TINY = Config(size=32, width=24, depth=2, heads=3, batch=4, steps=6, warmup=2)


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    synthetic.write_scenes(root, train=8, val=3, side=32)
    return root


@pytest.fixture
def data(written, tmp_path):
    """A copy that a test may break."""
    return Path(shutil.copytree(written, tmp_path / "data"))
