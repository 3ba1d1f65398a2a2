"""The CUDA C++ kernels as nvcc compiles them, through the public calls: tests/cuda/test_cuda_compiled.py runs these."""

import pytest
import torch

from smattn.testing import assert_within_budget, make_case, run
from tests.gpu_emulator import cuda_backend
from tests.gpu_emulator.problems import LAYOUTS, check, check_tf32, laid_out, some
from tests.support.compiled_cuda import ROW

pytestmark = [pytest.mark.promise("compiled code"), pytest.mark.slow]
NAME = cuda_backend.NAME
HALF = torch.float16


def checked(case):
    """The kernels that ran, inside the budget."""
    ROW.counts.clear()
    assert_within_budget(run(case, NAME), case)
    return {name: counts for name, counts in ROW.counts}


@pytest.mark.parametrize("D", [24, 128, 256])
def test_every_tile_for_few_and_for_many_queries(D):
    """Tiles are by the head size, for which tensor cores multiply and asynchronous copies load."""
    for Nq, Nk in ((13, 1100), (145, 70)):
        launched = checked(make_case(1, 2, Nq, Nk, D, dtype=HALF, with_lse=True))
        assert {"Forward", "BackwardRows", "BackwardKeys", "BackwardQueries"} <= set(launched)
        assert ("ForwardMerge" in launched) == (Nk > 1000)
        assert all(launched["Forward"].instructions[unit] for unit in ("tensor", "exp2", "wait"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout):
    case = make_case(2, 2, 45, 70, 24, dtype=HALF)
    placed = {name: laid_out(getattr(case, name), layout) for name in ("query", "key", "value", "dout")}
    copies = [opcode for opcode in checked(case.with_inputs(placed))["Forward"].opcodes if "cp.async.cg" in opcode]
    assert bool(copies) == (layout != "misaligned")


def test_rows_that_end_inside_of_16_bytes():
    """Copies read the beginning only, and behind it lies NaN."""
    case = make_case(1, 2, 45, 70, 20, dtype=HALF)
    parts = {name: getattr(case, name) for name in ("query", "key", "value", "dout")}
    wide = {name: torch.full((*part.shape[:-1], 24), torch.nan, dtype=HALF)[..., :20].copy_(part) for name, part in parts.items()}
    assert any("cp.async.cg" in opcode for opcode in checked(case.with_inputs(wide))["Forward"].opcodes)


@pytest.mark.parametrize("D", [32, 64])
def test_tf32(D):
    ROW.counts.clear()
    check_tf32(make_case(1, 2, 40, 70, D, with_lse=True), ROW)
    products = {opcode for _, counts in ROW.counts for opcode in counts.opcodes if opcode.startswith("mma")}
    assert products == {"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"}


@pytest.mark.parametrize("seed", range(3))
def test_drawn_problems(seed):
    for drawn, case in some(2000 + seed, 3):
        ROW.counts.clear()
        check(drawn, case, NAME, ROW)
        assert ROW.counts
