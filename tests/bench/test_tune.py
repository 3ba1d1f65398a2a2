"""`make tune` without a GPU: the table keeps its form, bad candidates are left out, and only a faster tile wins."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from bench.gpu import cells, tune
from bench.gpu.notes import Notes
from smattn.kernels import tiles
from smattn.kernels.tiles import TABLE, Key, Tile
from smattn.kernels.tools import jobs
from smattn.testing import make_case

pytestmark = pytest.mark.promise("benchmarks")
ROOT = Path(__file__).resolve().parents[2]
LINES = tune.CSV.read_text()
T = Tile
ARCH = 90
CELLS = list(tune.cells(ARCH, heads=[64]))


def test_a_line_is_changed_in_place_and_nothing_else(tmp_path):
    key = next(iter(TABLE))
    path, changed = tmp_path / "tiles.csv", T(16, 32, 4, 1, 128)
    tiles.write(path, TABLE | {key: changed})
    assert tiles.read(path) == TABLE | {key: changed}
    differing = [after for before, after in zip(LINES.splitlines(), path.read_text().splitlines(), strict=True) if before != after]
    assert differing == [f"{key.kernel},{key.call},{key.chip},{key.bytes},{key.head},16,32,4,1,128,0"]


def test_a_line_of_another_chip_comes_after_those_of_its_call(tmp_path):
    first = next(key for key in TABLE if key.call == "plain")
    new, path = first._replace(chip=99), tmp_path / "tiles.csv"
    tiles.write(path, TABLE | {new: TABLE[first]})
    assert tiles.read(path) == TABLE | {new: TABLE[first]}
    order = list(tiles.read(path))
    assert order[order.index(new) - 1][:2] == new[:2] and len(path.read_text().splitlines()) == len(LINES.splitlines()) + 1


def test_every_tile_of_the_table_is_searched_once():
    cells = list(tune.cells(ARCH))
    served = {(kernel, call, size, head) for kernel, call, chip, size, head in TABLE if call in tune.VARIANTS and chip <= ARCH}
    assert len(cells) == len(set(cells)) and {(c.kernel, c.call, c.itemsize, c.head) for c in cells} == served
    of_dq = list(tune.cells(ARCH, ["dq"], [64]))
    assert {c.kernel for c in of_dq} == {"dq"} and [(c.itemsize, c.call) for c in of_dq] == [(2, "plain"), (2, "pointers"), (4, "plain")]
    assert {c.forward for c in cells if c.kernel == "forward"} == {True} and {c.forward for c in cells if c.kernel == "dkdv"} == {False}


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_call_of_every_cell_launches_its_tile(arch, table):
    for cell in tune.cells(arch):
        own = tiles.TABLE.get(cell.key(arch))
        marked = tune.present(cell, arch)._replace(stages=100)
        tune.put(cell, arch, marked)
        launched = [tile for *_, tile in jobs.record(cell.job(arch, training=not cell.forward))]
        assert marked._replace(tma=False) in [tile._replace(tma=False) for tile in launched], cell
        tiles.TABLE.pop(cell.key(arch)) if own is None else tune.put(cell, arch, own)


@pytest.mark.parametrize("cell", CELLS, ids=tune.Cell.text)
def test_the_call_of_a_cell_launches_its_kernel_with_its_tile(cell, table, device):
    """The call that is timed launches the kernel that the tile is for."""
    from smattn.testing import make_case
    from tests.support.meters import launches_recorded

    class Launches(list):
        def append(self, launched):
            super().append((launched[0].__name__, launched[2]))

    odd = tune.present(cell, ARCH)._replace(stages=7)
    tune.put(cell, ARCH, odd)
    dtype = cells.DTYPES[cell.itemsize]
    case = cell.laid_out(make_case(2, 4, min(cell.Nq, 1088), 2048, 64, dtype=dtype, mask_dtype=dtype, device=device))
    call = None
    with launches_recorded(ARCH) as recorder:
        recorder.launches = Launches()
        call = tune.the_pass(cell, case)
        recorder.launches.clear()
        call()
    assert odd in [tile for _, tile in recorder.launches], recorder.launches


def test_the_present_tile_is_a_candidate_and_few_queries_stay_in_one():
    for cell in CELLS:
        now = tune.present(cell, ARCH)
        found = tune.candidates(cell, now)
        assert found[0] == now and 4 < len(found) == len(set(found)) < 120
        assert not cell.kernel.startswith("few") or {tile.block_m for tile in found} == {now.block_m}
        assert {tile.maxnreg for tile in found} == {now.maxnreg}


def test_a_tile_put_is_the_one_taken_and_the_rest_of_the_table_stays(table):
    cell = tune.Cell("forward", 2, 64)
    tune.put(cell, 100, T(16, 16, 4, 1))
    assert table == TABLE | {Key("forward", "plain", 100, 2, 64): T(16, 16, 4, 1)}
    assert tiles.find("forward", "plain", 100, 2, 64) == tune.present(cell, 100) == T(16, 16, 4, 1)
    assert tiles.find("forward", "plain", 80, 2, 64) == TABLE["forward", "plain", 80, 2, 64]


def test_only_what_is_faster_by_the_margin_and_right_is_chosen():
    now, fast, faster, slow = (T(16, n, 4, 1) for n in (16, 32, 64, 128))
    times = {now: 1.0, fast: 0.9, faster: 0.8, slow: 1.2}
    assert tune.chosen(times, now, lambda tile: True) == faster
    assert tune.chosen(times, now, lambda tile: tile != faster) == fast
    assert tune.chosen(times, now, lambda tile: False) == now
    assert tune.chosen({now: 1.0, fast: 0.98}, now, lambda tile: True) == now
    assert tune.chosen({fast: 5.0}, now, lambda tile: True) == fast, "the present one does not even run"


def test_a_search_ends_in_a_line_or_in_nothing(table, monkeypatch):
    cell = tune.Cell("dq", 2, 32)
    now = tune.present(cell, 90)
    best = now._replace(warps=4, stages=2)
    asked = []

    def compiled(cell, arch, tiles, pool):
        return {tile: "spills" * (tile.warps == 8 and tile != now) for tile in tiles}

    def timed(cell, arch, tiles, device, seconds):
        asked.extend(tiles)
        return {tile: 0.5 if tile == best else 1.0 for tile in tiles}

    monkeypatch.setattr(tune, "compiled", compiled)
    monkeypatch.setattr(tune, "timed", timed)
    monkeypatch.setattr(tune, "is_right", lambda *args: True)
    assert tune.tune(cell, 90, "cuda", None, 0.01, here) == best and table == TABLE | {cell.key(90): best}
    assert now in asked and all(tile.warps == 4 for tile in asked if tile != now), "what spills is not timed"
    monkeypatch.setattr(tune, "timed", lambda *args: {now: 0.1, best: 1.0})
    monkeypatch.setattr(tune, "is_right", lambda *args: 1 // 0)

    def raises(function, *args):
        try:
            return function(*args)
        except ZeroDivisionError as error:
            raise RuntimeError("ZeroDivisionError") from error

    assert tune.tune(cell, 90, "cuda", None, 0.01, raises) == best, "what cannot be checked does not take its place"


def here(function, *args):
    return function(*args)


def test_a_tile_that_takes_its_process_down_is_left_out(table):
    cell, tiles, asked = tune.Cell("dq", 2, 32), [T(16, n, 4, 1) for n in (16, 32, 64)], []

    def call(function, sent, timed, cell, arch, tiles, *args):
        assert (function, timed) == (tune.with_table, tune.timed) and sent == TABLE
        asked.append(list(tiles))
        if tiles[1:]:
            raise tune.Lost(str(tiles[1]), "an illegal memory access")
        return {tile: 1.0 for tile in tiles}

    assert tune.survivors(cell, 90, tiles, "cuda", 0.01, call) == {tiles[0]: 1.0}
    assert [len(some) for some in asked] == [3, 2, 1]

    def never(*args):
        raise tune.Lost("timing", "nothing was heard of it for 150 s")

    assert tune.survivors(cell, 90, tiles, "cuda", 0.01, never) == {}


def test_a_search_goes_on_where_the_last_one_ended(table, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tune, "CSV", tmp_path / "tiles.csv")
    tune.CSV.write_text(LINES)
    todo, path, asked = CELLS[:4], tmp_path / "build" / "tune.jsonl", []
    best = {cell: tune.present(cell, ARCH)._replace(stages=9) for cell in todo}

    def tuned(cell):
        asked.append(cell)
        if len(asked) == 3:
            raise KeyboardInterrupt
        tune.put(cell, ARCH, best[cell])
        return best[cell]

    notes = Notes(path, "a chip")
    with pytest.raises(KeyboardInterrupt):
        tune.search(todo, ARCH, notes, tuned, time.monotonic() + 100)
    assert asked == todo[:3] and [name for name, _ in notes.found()] == [cell.text() for cell in todo[:2]]
    with open(path, "a") as file:
        file.write('\n{"of": "a chip", "name": "cut short", "found": {"block_m": 64}\n{"of": "a ch')
    tune.CSV.write_text(LINES)  # a machine may have the notes and not the table
    table.clear()
    table.update(TABLE)
    tiles.find.cache_clear()
    assert tune.search(todo, ARCH, notes, tuned, time.monotonic() + 100) == 0 and asked == [*todo[:3], *todo[2:]]
    assert tiles.read(tune.CSV) == TABLE | {cell.key(ARCH): best[cell] for cell in todo}
    assert all(tune.present(cell, ARCH) == best[cell] for cell in todo)
    assert tune.search(todo, ARCH, notes, None, time.monotonic() + 100) == 0, "all is done"
    other = Notes(path, "another chip")
    assert list(other.found()) == [] and tune.search(todo, ARCH, other, None, time.monotonic() - 1) == 4, "no time"


def test_what_is_timed_is_the_pass_of_the_kernel():
    case = make_case(1, 2, 13, 40, 32)
    forward, backward = (tune.the_pass(tune.Cell(kernel, 4, 32), case) for kernel in ("split_16", "few_16"))
    assert forward().shape == case.query.shape and not forward().requires_grad
    grads = backward()
    assert [g.shape for g in grads] == [t.shape for t in case.inputs().values()]
    assert all(torch.equal(a, b) for a, b in zip(grads, backward(), strict=True))
