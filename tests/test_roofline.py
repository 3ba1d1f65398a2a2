"""The estimate beside the compiler's table: by hand where that is easy."""

import pytest

from smattn.kernels.roofline import CHIPS, Estimate, estimate, main, passes
from smattn.testing import WORKLOADS

H200 = next(chip for chip in CHIPS if chip.name == "H200")


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
@pytest.mark.parametrize("name", WORKLOADS)
def test_backward_is_five_or_seven_products_for_few_queries_and_nine_for_many(name, chip):
    forward, *backward = passes(WORKLOADS[name], chip.arch)
    assert forward.products == 2
    assert sum(p.products for p in backward) == {1: 5, 2: 7, 3: 9}[len(backward)]
    assert (len(backward) == 3) == (WORKLOADS[name].Nq > 128)
    assert all(p.memory > 0 and p.l2 >= forward.memory for p in (forward, *backward))


def test_few_queries_by_hand():
    """hodor_infer: 8 heads, 13 queries, 7424 keys, head size 32."""
    w = WORKLOADS["hodor_infer"]
    forward, _ = passes(w, H200.arch)
    time = estimate(w, H200, forward)
    assert time.matmul == pytest.approx(1e6 * 4 * 8 * 13 * 7424 * 32 / 989e12)
    assert time.memory == pytest.approx(1e6 * 2 * (8 * 2 * 32 * (13 + 7424) + 13 * 7424) / 4.8e12)
    assert time.limiter() == "memory"


def test_the_limiter_is_the_longest():
    assert [Estimate(*(2.0 if i == j else 1.0 for j in range(4))).limiter() for i in range(4)] == ["matmul", "exp2", "memory", "l2"]


def test_every_workload_has_its_rows(capsys):
    main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + sum(len(list(passes(w, chip.arch))) for w in WORKLOADS.values() for chip in CHIPS)
    assert all(line.split()[-1] in Estimate._fields for line in lines[1:])
