"""The table of tiles: every row is found, none repeats another, and every kernel that may be launched has a tile."""

from itertools import product

import pytest
import torch

from smattn.call import Problem
from smattn.kernels.chip import INTERPRETER
from smattn.kernels.tiles import CHIPS, HEAD_SIZES, PATH, TABLE, Key, Tile, call_of, find, read, tile, write

pytestmark = pytest.mark.promise("Triton kernels")
KERNELS = {key.kernel for key in TABLE}
CALLS = {key.call for key in TABLE}


def test_the_file_is_as_the_program_writes_it(tmp_path):
    write(tmp_path / "tiles.csv", TABLE)
    assert (tmp_path / "tiles.csv").read_text() == PATH.read_text() and read(PATH) == TABLE


def test_the_table_holds_tiles_that_can_be():
    for key, (block_m, block_n, warps, stages, maxnreg, _) in TABLE.items():
        assert key.chip in CHIPS and key.bytes in (2, 4) and key.head in HEAD_SIZES and key.call in {"plain", "pointers", *CALLS}
        assert block_m in (16, 32, 64, 128) and block_n in (16, 32, 64, 128) and warps in (4, 8) and 1 <= stages <= 3
        assert maxnreg is None or maxnreg * 32 * warps <= 65536, key


def everything():
    """The tile that every call of every kernel finds."""
    find.cache_clear()
    kinds = ("plain", "extras", "map", "ragged", "small")
    calls = product(sorted(KERNELS), kinds, (80, 86, 90, 100, 942), (2, 4), HEAD_SIZES, (False, True))
    return {call: find(*call) for call in calls}


def test_no_line_says_what_the_others_would(monkeypatch):
    found = everything()
    for key in list(TABLE):
        own = TABLE.pop(key)
        try:
            assert everything() != found, key
        finally:
            TABLE[key] = own
    find.cache_clear()


@pytest.mark.parametrize(
    "arch, chip",
    [(80, 80), (86, 86), (87, 80), (89, 86), (90, 90), (100, 100), (103, 100), (120, 86), (121, 86), (910, 942), (942, 942), (950, 942)],
    ids=str,
)
def test_a_chip_takes_the_lines_of_the_newest_one_before_it(monkeypatch, arch, chip):
    lines = {Key("k", "plain", chip, 2, 64): Tile(chip, 16, 4, 1) for chip in CHIPS}
    monkeypatch.setattr("smattn.kernels.tiles.TABLE", lines)
    for expected in CHIPS[chip]:
        find.cache_clear()
        assert find("k", "plain", arch, 2, 33) == Tile(expected, 16, 4, 1)
        del lines["k", "plain", expected, 2, 64]
    find.cache_clear()
    assert find("k", "plain", arch, 2, 33) is None
    find.cache_clear()


def test_the_kind_of_call_goes_before_pointers_and_pointers_before_plain(monkeypatch):
    lines = {Key("k", call, 90, 2, 64): Tile(16, 16, 4, i, tma=True) for i, call in enumerate(("extras", "pointers", "plain"))}
    monkeypatch.setattr("smattn.kernels.tiles.TABLE", lines | {Key("k", "map", 80, 2, 64): Tile(16, 16, 4, 9)})
    find.cache_clear()
    assert [find("k", call, 90, 2, 64).stages for call in ("extras", "plain", "map")] == [0, 2, 2], "own plain lines before older ones"
    assert [find("k", call, 90, 2, 64, pointers=True) for call in ("extras", "plain")] == [Tile(16, 16, 4, 0), Tile(16, 16, 4, 1)]
    find.cache_clear()


def problem(Nq, D=64, **more):
    return Problem(1, 2, 2, Nq, 64, D, D, torch.float16, None, None, "cuda", **more)


@pytest.mark.parametrize("Nq, few, split", [(1, 16, 16), (16, 16, 16), (17, 32, 32), (64, 64, 64), (65, 128, 64), (128, 128, 64)])
def test_few_queries_have_a_block_that_holds_them(Nq, few, split):
    assert tile("few", problem(Nq), 90).block_m == tile("few", problem(Nq), INTERPRETER).block_m == few
    assert tile("split", problem(Nq), 90) == find(f"split_{split}", "plain", 90, 2, 64)


@pytest.mark.parametrize(
    "B, Nq, Nk, more, kind",
    [
        (4, 4096, 4096, {}, "plain"),
        (1, 1024, 1024, {}, "small"),
        (4, 1045, 1045, {}, "ragged"),
        (1, 1024, 1000, {}, "ragged"),
        (4, 1045, 1045, {"has_padding": True}, "extras"),
    ],
    ids=str,
)
def test_the_kind_of_a_call(B, Nq, Nk, more, kind):
    shape = Problem(B, 8, 8, Nq, Nk, 64, 64, torch.float16, torch.float16, (B, 1, 1, Nq, Nk), "cuda", **more)
    assert call_of(shape) == kind
    assert tile("forward", shape, 90) == find("forward", kind, 90, 2, 64)


def test_where_the_table_has_no_tile_it_is_said():
    with pytest.raises(LookupError, match="no tile of few_128 for Problem"):
        tile("few", problem(128, D=128), 90)
