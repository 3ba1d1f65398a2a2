"""Two ways to make one call: that they are two, with kernels interpreted on small cases."""

import pytest
import torch

from bench.gpu import comparisons
from bench.gpu.cells import Cell
from smattn import prepared
from smattn.kernels import backward_dmask
from smattn.testing import make_case
from tests.support.expected import BACKENDS, DEVICE

pytestmark = pytest.mark.promise("benchmarks")
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="the passes are Triton's")


@pytest.fixture
def small_cases(monkeypatch):
    def case(cell, device):
        return make_case(1, 2, 131, 64, 16, dtype=torch.bfloat16, mask_dtype=torch.bfloat16, device=device)

    monkeypatch.setattr(Cell, "case", case)


@needs_triton
def test_m_is_pinned_in_one_pass_and_not_in_the_other(small_cases, monkeypatch):
    pinned, launch = [], backward_dmask.launch

    def noted(kernel, programs, arguments, tile):
        pinned.append(arguments["PINNED_MASK"])
        launch(kernel, programs, arguments, tile)

    monkeypatch.setattr(backward_dmask, "launch", noted)
    passes = comparisons.pinned_or_not(DEVICE)
    results = [passes[name]() for name in ("pinned", "not pinned", "pinned")]
    assert pinned == [True, False, True]
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[2], strict=True))


@needs_triton
@pytest.mark.parametrize("kernel", ["forward", "dq"])
def test_one_key_fewer(small_cases, kernel):
    passes = comparisons.even_or_odd(kernel, DEVICE)
    shapes = [[x.shape for x in result] if isinstance(result := call(), tuple) else result.shape for call in passes.values()]
    if kernel == "forward":
        assert shapes == [(1, 2, 131, 16)] * 2
    else:
        assert [shape[1][2] for shape in shapes] == [64, 63]


def test_python_is_timed_with_and_without_records(monkeypatch):
    monkeypatch.setattr(comparisons, "REPEATS", 2)
    modes, waits = [], []
    taken = comparisons.of_the_host(lambda: modes.append(prepared._is_on), lambda: waits.append(None))
    assert list(taken) == ["repeated", "made anew"] and all(ms > 0 for ms in taken.values())
    assert modes.count(True) == modes.count(False) == len(modes) / 2 and len(waits) == 4
    assert prepared._is_on


def test_a_line_has_both_and_their_ratio():
    assert comparisons.line("Which?", {"this": 1.0, "that": 2.5}) == "Which? this 1.0000 ms; that 2.5000 ms. 2.50 times"
