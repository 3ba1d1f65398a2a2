"""Clips for the tests of examples/vos, written once for all of them."""

from __future__ import annotations

import pytest

from examples.vos import synthetic
from examples.vos.config import Config

TINY = Config(width=16, heads=2, encoder_layers=1, decoder_layers=1, batch=2, steps=6, warmup=2, dropout=0.1)


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    synthetic.write_clips(root, train=3, val=1, frames=5, height=40, width=48)
    return root
