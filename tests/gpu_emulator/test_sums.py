"""Sums over lanes repeat bit for bit: no compiler may contract the products that they add.

A sum over lanes adds to each value what another lane holds. Where the value is a product, a compiler may contract product and addition to
one fma, whose product is not rounded; of two lanes that hold the same sum, each then has a last bit of its own.
"""

from collections import defaultdict

import pytest
import torch

from smattn.kernels.tools import jobs
from smattn.testing import assert_within_budget, make_case, run
from tests.gpu_emulator.backend import name_of
from tests.gpu_emulator.compile import compile_kernel, source_of
from tests.gpu_emulator.parser import Register, parse

pytestmark = pytest.mark.promise("compiled code")
CALLS = [(80, torch.float32, 64, 257), (90, torch.bfloat16, 32, 13), (90, torch.float16, 64, 100)]  # in each regime
NAMES = "no unrounded output", "alpha only", "key-only mask"
VARIANTS = (jobs.PLAIN, jobs.FEATURES, jobs.MAP, *(variant for variant in jobs.OTHERS if variant.name in NAMES))



def contracted(ptx):
    """The sums over lanes of a product that is, or may be, contracted: mul.f32 may, and mul.rn.f32 may not."""
    (kernel,) = parse(ptx).values()
    written = defaultdict(list)
    for each in kernel.instructions:
        if each.operands and isinstance(each.operands[0], Register):
            written[each.operands[0]].append(each)
    from_lanes = [each for each in kernel.instructions if each.opcode == "shfl.sync.bfly.b32"]
    exchanged = {each.operands[0] for each in from_lanes}
    products = {each.operands[1] for each in from_lanes if any(by.opcode == "mul.f32" for by in written[each.operands[1]])}
    return [str(each) for each in kernel.instructions if each.opcode == "fma.rn.f32" and each.operands[3] in exchanged
            or each.opcode == "add.f32" and products & set(each.operands)]  # fmt: skip


@pytest.mark.parametrize("arch, dtype, D, Nq", CALLS, ids=str)
@pytest.mark.slow
def test_no_product_in_a_sum_over_lanes_may_be_contracted(arch, dtype, D, Nq):
    sums = 0
    for variant in VARIANTS:
        for kernel, arguments, tile in jobs.record(jobs.Job(arch, dtype, D, Nq, variant, Nk=513)):
            ptx = compile_kernel(source_of(kernel, arguments), arch, tile).ptx
            assert contracted(ptx) == [], (kernel.__name__, variant.name)
            sums += ptx.count("shfl.sync.bfly")
    assert sums > 0


@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=pytest.mark.slow)])
def test_lanes_that_hold_the_same_sum_hold_the_same_bits(arch):
    """In these calls two lanes stored a row's sum of products, each with a last bit of its own, to one address."""
    for case in (
        make_case(1, 2, 257, 33, 64, as_map=True),
        make_case(2, 2, 150, 130, 64, Hkv=1, dtype=torch.bfloat16, with_lse=True, padded=0.3, dropout_p=0.2, mask_dtype=torch.bfloat16),
    ):
        assert_within_budget(run(case, name_of(arch)), case)
