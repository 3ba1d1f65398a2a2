"""The rule by which tiles of scores could be left out is sound, kernels that follow it keep the budget, and the tables are of today."""

import csv
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from expected import DEVICE

from smattn import reference
from smattn.testing import assert_within_budget, blob_mask, make_case, run

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import peers
import skipping
import skipping_kernel
import tile_skipping

KEYS = 16
FULL_AND_KEY_ONLY = pytest.mark.parametrize("queries", [70, 1], ids=["full", "key-only"])  # of the mask
TOO_MUCH = 1e4  # of a row's weights: what no budget forgives


def odd_case(queries, dtype=torch.float32, B=2, Nq=70, Nk=301, device="cpu"):
    """Neighbouring queries look at one object; sizes are no multiples of anything, two heads share their keys."""
    case = make_case(B, 4, Nq, Nk, 24, Dv=20, Hkv=2, dtype=dtype, mask=None, with_lse=True, device=device)
    mask = blob_mask(B, 1, Nk, torch.Generator().manual_seed(1)) * torch.linspace(0.9, 1, 1 if queries == 1 else Nq)[:, None]
    return replace(case, mask=mask.to(device), alpha=torch.tensor([64.0, 32.0, 48.0, 16.0], device=device))


@FULL_AND_KEY_ONLY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_triton_kernel_that_skips_is_within_the_budget(queries, dtype):
    case, u = odd_case(queries, dtype, 1, 37, 150, DEVICE), 2.0**-24 if dtype == torch.float32 else 2.0**-9
    results, share = skipping_kernel.forward(case, 16, 16, u)
    assert 0.1 < share < 0.9
    assert_within_budget(results, case)
    in_order, less = skipping_kernel.forward(case, 16, 16, u, ordered=False)
    assert less < share
    assert_within_budget(in_order, case)
    everything, none = skipping_kernel.forward(case, 16, 16, 1e-300)
    assert none == 0
    assert_within_budget(everything, case)
    with pytest.raises(AssertionError, match="out: "):
        assert_within_budget(skipping_kernel.forward(case, 16, 16, TOO_MUCH)[0], case)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return skipping.Study(str(tmp_path_factory.mktemp("study")))


COMPILED = pytest.mark.skipif("avx512" not in peers.cpu_kernels(), reason="the study is compiled for AVX-512")


@pytest.mark.slow
@COMPILED
@FULL_AND_KEY_ONLY
@pytest.mark.parametrize("u", [2.0**-24, 2.0**-9])
def test_no_weight_below_the_line_is_above_its_share(study, queries, u):
    case = odd_case(queries)
    double = replace(case, query=case.query.double(), key=case.key.double())
    exact = reference.softmax(double.problem(), double.query, double.key, double.mask_or_logits().double(), double.alpha.double(), None)
    *_, keys = study.blocking(case)
    bounds = study.prepare(case).bounds.mT.repeat_interleave(keys, 3)[..., :301]  # (B, H, Nq, Nk)
    assert (exact.s <= bounds * 1.00001).all()
    weights = exact.p[bounds + math.log(301 / u) <= exact.lse[..., None]]
    assert weights.numel() > 0 and weights.max() <= u / 301 * 1.001


@pytest.mark.slow
@COMPILED
@FULL_AND_KEY_ONLY
@pytest.mark.parametrize("dtype", skipping.brgemm.dtypes())
def test_the_cpu_kernels_that_skip_are_within_the_budget(study, queries, dtype):
    case, u = odd_case(queries, dtype), tile_skipping.ROUNDING[skipping.name_of(dtype)]
    prepared = study.prepare(case)
    rows, skipped = study.forward(case), study.forward(case, prepared, u)
    assert 0.1 < study.share(case) < 0.9
    assert_within_budget({name: rows[name] for name in ("out", "lse")}, case)
    assert_within_budget({name: skipped[name] for name in ("out", "lse")}, case)
    with pytest.raises(AssertionError, match="out: .*\n.*lse: "):
        assert_within_budget({name: tensor for name, tensor in study.forward(case, prepared, TOO_MUCH).items() if name != "mbar"}, case)
    if dtype != torch.float32:
        return
    of_out = replace(case, dlse=None)
    assert_within_budget(study.backward(case, rows), of_out)
    assert_within_budget(study.backward(case, skipped, prepared, u), of_out)
    assert 0.1 < study.share(case) < 0.9
    with pytest.raises(AssertionError, match="dquery: .*\n.*dkey: .*\n.*dvalue: "):
        assert_within_budget(study.backward(case, skipped, prepared, TOO_MUCH), of_out)


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


def test_the_committed_timings_say_where_they_were_taken_and_what_was_left_out():
    with skipping.RESULTS.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["workload"] for row in rows} == set(skipping.NAMES) and {row["mask"] for row in rows} == set(skipping.MASKS)
    assert all(re.fullmatch(r".+, 1 thread, AVX512", row["device"]) for row in rows)
    assert all(float(row["low"]) <= float(row["speedup"]) <= float(row["high"]) and float(row["ms"]) > 0 for row in rows)


def test_the_guide_says_what_the_timings_say():
    with skipping.RESULTS.open() as file:
        rows = list(csv.DictReader(file))
    lines = (skipping.HERE.parent / "docs" / "how-it-works.md").read_text().splitlines()
    for what, mask, alpha in (
        ("a blob for each query, the usual alphas", "blob", "mix"),
        ("one blob for all queries, 16", "key-only", "16.0"),
        ("one blob for all queries, 64", "key-only", "64.0"),
        ("the affinities of a segmented picture, 64", "objects", "64.0"),
    ):
        of_line = [row for row in rows if (row["mask"], row["alpha"]) == (mask, alpha)]
        left_out, speedup, prepared = ([float(row[column]) for row in of_line] for column in ("left_out", "speedup", "prepared"))
        ranges = [f"{min(left_out):.0%} to {max(left_out):.0%}".replace("% to", " to").replace("%", " %")]
        ranges += [f"{min(column):.2f} to {max(column):.2f}" for column in (speedup, prepared)]
        assert f"| {what} | {' | '.join(ranges)} |" in lines


@pytest.mark.slow
@COMPILED
def test_the_committed_timings_are_of_what_is_left_out_today(study):
    with skipping.RESULTS.open() as file:
        committed = {tuple(row[name] for name in skipping.ABOUT): row for row in csv.DictReader(file) if row["direction"] == "forward"}
    for about, case in skipping.cases("hodor_infer"):
        study.forward(case, study.prepare(case), tile_skipping.ROUNDING[str(about["dtype"])])
        assert float(committed[tuple(map(str, about.values()))]["left_out"]) == pytest.approx(study.share(case), abs=0.002)


@pytest.mark.slow
def test_the_committed_shares_of_the_triton_kernel_are_what_it_leaves_out():
    with skipping.TRITON_RESULTS.open() as file:
        rows = list(csv.DictReader(file))
    about, case = next(found for found in skipping.cases("hodor_infer") if found[0]["mask"] == "key-only" and found[0]["alpha"] == 64.0)
    row = next(row for row in rows if all(row[name] == str(value) for name, value in about.items()))
    _, share = skipping_kernel.forward(case, *skipping.TRITON_TILE, tile_skipping.ROUNDING[row["dtype"]])
    assert share > 0 and float(row["by_mask"]) == pytest.approx(share, abs=0.002)
