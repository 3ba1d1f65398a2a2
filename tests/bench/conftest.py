"""What several tests of the benchmark use."""

import pytest

from smattn.kernels import tiles


@pytest.fixture
def table(monkeypatch):
    """A copy of the table of tiles that a test may change."""
    copy = dict(tiles.TABLE)
    monkeypatch.setattr(tiles, "TABLE", copy)
    yield copy
    tiles.find.cache_clear()
