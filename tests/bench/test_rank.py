"""The ranking of tiles by predicted cost, with costs made up."""

import math

import pytest

from bench.gpu import rank
from bench.gpu.cells import Cell
from smattn.kernels.tiles import Tile

pytestmark = [pytest.mark.promise("benchmarks"), pytest.mark.usefixtures("table")]
CELL = Cell("dq", 2, 64)


def test_the_present_tile_comes_first_and_there_are_six_others_at_most():
    now = Tile(64, 64, 4, 1, tma=True)
    for cell in (CELL, CELL._replace(head=256)):
        assert rank.candidates(cell, now)[0] == now and 2 <= len(rank.candidates(cell, now)) <= 7
    assert {tile.block_m for tile in rank.candidates(Cell("few_16", 2, 64), Tile(16, 64, 4, 1))} == {16}


def test_a_tile_is_judged_by_the_kernel_that_takes_it():
    names = {"forward": "forward", "split_dq": "dq", "split_64": "partial", "few_16": "few_queries"}
    assert {kernel: rank.launched(kernel) for kernel in names} == names


def test_a_tile_has_to_be_cheaper_by_a_margin():
    now, other = Tile(64, 64, 4, 1), Tile(64, 64, 4, 2)
    assert rank.cheapest({now: 101.0, other: 100.0}, now) == now
    assert rank.cheapest({now: 103.0, other: 100.0}, now) == other
    assert rank.cheapest({now: math.inf, other: 100.0}, now) == other
    assert rank.cheapest({now: math.inf, other: math.inf}, now) == now


def test_a_search_goes_on_where_it_stopped(tmp_path):
    asked, notes = [], tmp_path / "rank.jsonl"

    def stopping(cell, arch, tile):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(tile)
        return 900.0

    with pytest.raises(KeyboardInterrupt):
        rank.rank(CELL, 90, notes, stopping)
    more = []
    best = rank.rank(CELL, 90, notes, lambda cell, arch, tile: more.append(tile) or (500.0 if tile.block_n == 32 else math.inf))
    assert not set(asked) & set(more) and asked + more == rank.candidates(CELL, asked[0])
    assert best.block_n == 32 and rank.present(CELL, 90) == best
    assert rank.rank(CELL, 90, notes, stopping) == best, "all is noted"
