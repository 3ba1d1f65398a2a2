"""The rule by which tiles of scores could be left out is sound, and the committed table says how few they are."""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smattn.testing import assert_within_budget, make_case, run

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import tile_skipping

KEYS = 16


@pytest.mark.parametrize("alpha", [32.0, 200.0])
def test_what_the_bound_leaves_out_changes_nothing_beyond_rounding(alpha):
    case = make_case(1, 2, 24, 400, 16, mask="blob", rng=4)
    case = replace(case, alpha=torch.tensor([alpha, alpha / 2]))
    left_out = torch.stack([tile_skipping.below_the_line(case, h, KEYS, 2.0**-24)[0] for h in range(2)])
    assert 0.1 < left_out.double().mean() < 0.95
    masked = case.mask[:, None].masked_fill(left_out.repeat_interleave(KEYS, 2)[None], float("-inf"))  # (1, 2, 24, 400)
    names = ("query", "key", "value")
    skipped = run(replace(case, mask=masked), "cpu", names)
    assert_within_budget(skipped, case)
    assert not torch.equal(skipped["dkey"], run(case, "cpu", names)["dkey"])  # something was left out


def test_the_bound_never_finds_more_than_there_is():
    case = make_case(1, 1, 24, 400, 16, mask="blob", rng=5)
    bound, best = tile_skipping.below_the_line(case, 0, KEYS, 2.0**-24)
    assert best[bound].all() and best.sum() > bound.sum()


def test_the_committed_table_is_what_the_command_writes():
    with tile_skipping.RESULTS.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["workload"] for row in rows} == set(tile_skipping.NAMES)
    fresh = list(tile_skipping.measure("hodor_infer"))
    assert len(fresh) > 0
    for row, again in zip((r for r in rows if r["workload"] == "hodor_infer"), fresh, strict=True):
        assert (row["queries"], row["output"]) == (str(again["queries"]), again["output"])
        for column in ("bound", "best"):
            assert float(row[column]) == pytest.approx(again[column], abs=0.002)
