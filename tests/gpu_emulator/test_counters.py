"""What the kernels execute beside what they have to: tensor operations, exponentials and loads."""

import pytest
import torch

from smattn.testing import assert_within_budget, make_case, run
from tests.gpu_emulator.emulate import HEAD, Key, Total, add_up, rows
from tests.support.emulated_triton import ROWS, backend

pytestmark = [pytest.mark.promise("compiled code"), pytest.mark.slow]
FLOPS, BYTES = HEAD.index("flops_over_needed"), HEAD.index("bytes_a_load")


@pytest.mark.parametrize("arch", backend.CHIPS)
def test_tensor_operations_executed_over_needed(arch, capsys):
    """Sizes that fill every tile, so that what is above 1 is computed more than once. A 16-bit mask that is aligned need not be loaded
    element by element; where it is, the line says so."""
    totals: dict[Key, Total] = {}
    row = ROWS[arch]
    row.detailed = True
    try:
        for D, mask_dtype in ((64, torch.float16), (128, torch.float32)):
            row.counts.clear()
            case = make_case(1, 1, 256, 128, D, dtype=torch.float16, mask_dtype=mask_dtype)
            assert_within_budget(run(case, backend.name_of(arch)), case)
            add_up(totals, arch, row.counts)
    finally:
        row.detailed = False
    with capsys.disabled():
        print("\n" + "  ".join(HEAD))
        for key, line in zip(sorted(totals), rows(totals), strict=True):
            single = totals[key].counts.element_loads
            figures = "  ".join(f"{text:>{len(name)}}" for text, name in zip(line, HEAD, strict=True))
            print(f"{figures}  {single} loads of single elements")
    executed = {line[0]: float(line[FLOPS]) for line in rows(totals)}
    assert set(executed) == {"forward", "dkdv", "dq", "dmask"}
    assert all(1 <= ratio <= 1.13 for ratio in executed.values()), "dM's pass has a product of zeros for its one head"
    assert all(2 <= float(line[BYTES]) <= 512 for line in rows(totals))
