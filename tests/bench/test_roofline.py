"""The estimate of what bounds each kernel, checked by hand where that is easy."""

import inspect

import pytest

from bench.gpu import roofline
from bench.gpu.roofline import CHIPS, Estimate, counted, estimate, main, passes, predicted
from smattn.kernels.primitives import softmax
from smattn.testing import WORKLOADS

pytestmark = pytest.mark.promise("benchmarks")
H200 = next(chip for chip in CHIPS if chip.name == "H200")


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
@pytest.mark.parametrize("name", WORKLOADS)
def test_backward_is_five_or_seven_products_for_few_queries_and_nine_for_many(name, chip):
    forward, keeping, *backward = passes(WORKLOADS[name], chip.arch)
    assert (forward.products, keeping.products) == (2, 2)
    assert sum(p.products for p in backward) == {1: 5, 2: 7, 3: 9}[len(backward)]
    assert (len(backward) == 3) == (WORKLOADS[name].Nq > 128)
    assert all(p.memory > 0 and p.l2 >= forward.memory for p in (forward, keeping, *backward))


def test_few_queries_by_hand():
    """hodor_infer has 8 heads, 13 queries, 7424 keys and head size 32."""
    w = WORKLOADS["hodor_infer"]
    forward, keeping, _ = passes(w, H200.arch)
    time = estimate(w, H200, forward)
    assert time.matmul == pytest.approx(1e6 * 4 * 8 * 13 * 7424 * 32 / 989e12)
    assert time.memory == pytest.approx(1e6 * 2 * (8 * 2 * 32 * (13 + 7424) + 13 * 7424) / 4.8e12)
    assert time.limiter() == "memory"
    kept = estimate(w, H200, keeping)
    assert kept.matmul == time.matmul
    assert kept.memory - time.memory == pytest.approx(1e6 * 2 * 8 * 13 * 32 / 4.8e12)


def test_the_products_of_forward_are_those_of_the_kernel():
    """The loop over keys has Q K^T and P V, whether or not its remainder is kept. P times ones sums P, which is no more than is needed."""
    products = [line for line in inspect.getsource(softmax.attend.fn).splitlines() if "matmul(" in line or " dot(" in line]
    assert len(products) == 3 and sum("dot(p, ones," in line for line in products) == 1


def test_a_remainder_that_is_not_kept_costs_nothing(monkeypatch):
    monkeypatch.setattr(roofline, "queries_with_remainder", lambda problem: 0)
    for w in WORKLOADS.values():
        forward, keeping, *_ = passes(w, H200.arch)
        assert keeping[1:] == forward[1:]


def test_the_limiter_is_the_longest():
    assert [Estimate(*(2.0 if i == j else 1.0 for j in range(4))).limiter() for i in range(4)] == ["matmul", "exp2", "memory", "l2"]


def a_table(path):
    path.write_text(
        "# triton\nkernel,arch,dtype,D,Nk,variant,issue,exp2,tensor,passes\n"
        "dkdv,90,bfloat16,64,4096,bfloat16 mask,600,256,512,1000\ndkdv,90,float16,64,4096,bfloat16 mask,1,1,1,1\n"
        "dkdv,90,bfloat16,64,1045,bfloat16 mask,700,256,512,2000\ndelta,90,bfloat16,64,4096,bfloat16 mask,,,,\n"
    )
    return counted(path)


def test_a_prediction_by_hand(tmp_path):
    loops = a_table(tmp_path / "table.csv")
    found = {(name, p.name): predicted(w, H200, p, loops) for name, w in WORKLOADS.items() for p in passes(w, H200.arch)}
    blocks = 4 * 8 * 64 * 64
    assert found["self4k", "dkdv"] == pytest.approx(1e6 * (600 + 512) * blocks / (132 * 1.83e9)), "issue and tensor cores in turn"
    blocks = 4 * 12 * 17 * 17
    assert found["vit_cls", "dkdv"] == pytest.approx(1e6 * 2000 * blocks / (132 * 1.83e9)), "shared memory is what takes longest"
    assert {name for (name, _), time in found.items() if time is not None} == {"self4k", "vit_cls", "vit_cls_d48"}


def test_every_workload_has_its_rows(capsys, monkeypatch, tmp_path):
    loops = a_table(tmp_path / "table.csv")
    monkeypatch.setattr(roofline, "counted", lambda: loops)
    main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + sum(len(list(passes(w, chip.arch))) for w in WORKLOADS.values() for chip in CHIPS)
    assert all(set(line.split()[-2:]) & set(Estimate._fields) for line in lines[1:])
