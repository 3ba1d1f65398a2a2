"""The real kernels as compiled code: forward, backward and maps through the public calls, on both chips."""

from itertools import product

import pytest
import torch

from smattn.testing import assert_within_budget, make_case, run
from tests.gpu_emulator.problems import LAYOUTS, check, check_tf32, laid_out, rounded, some
from tests.support.emulated_triton import ROWS, backend

pytestmark = pytest.mark.promise("compiled code")
CASES = {
    "many queries": dict(B=1, H=2, Nq=145, Nk=70, D=64, dtype=torch.float16, with_lse=True),
    "few queries, every option": dict(
        B=2, H=2, Nq=13, Nk=70, D=32, Hkv=1, dtype=torch.bfloat16, with_lse=True, padded=0.3, dropout_p=0.2, mask_dtype=torch.bfloat16
    ),
}


def launched(arch):
    return {name: counts for name, _, _, counts in ROWS[arch].counts}


FAST = {("many queries", 90), ("few queries, every option", 80)}
PAIRS = [pytest.param(*pair, marks=() if pair in FAST else pytest.mark.slow) for pair in product(CASES, backend.CHIPS)]


@pytest.mark.parametrize("name, arch", PAIRS)
def test_all_results_are_inside_the_budget(name, arch):
    ROWS[arch].counts.clear()
    case = make_case(**CASES[name])
    assert_within_budget(run(case, backend.name_of(arch)), case)
    many = {"forward", "delta", "dkdv", "dq", "dmask"}
    assert set(launched(arch)) == (many if name == "many queries" else {"forward", "few_queries", "reduce"})


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_the_copies_it_takes(layout):
    """On sm_90 tensor copies bring keys and values where they are aligned, and pointers where they are not."""
    case = make_case(2, 2, 145, 70, 64, dtype=torch.float16)
    placed = {name: laid_out(getattr(case, name), layout) for name in ("query", "key", "value", "dout")}
    ROWS[90].counts.clear()
    assert_within_budget(run(case.with_inputs(placed), backend.name_of(90)), case)
    by_tensor_copies = {name for name, counts in launched(90).items() if any("cp.async.bulk.tensor" in opcode for opcode in counts.opcodes)}
    assert by_tensor_copies == (set() if layout == "misaligned" else {"forward", "dkdv", "dq", "dmask"})


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_drawn_problems(seed):
    """A specialisation each, two problems of it."""
    for drawn, case in some(1000 + seed, 2, every=1):
        check(drawn, case, backend.name_of(drawn.arch), ROWS[drawn.arch])
        assert ROWS[drawn.arch].counts


def test_tf32_is_checked_by_what_forward_itself_saved():
    case = make_case(1, 1, 16, 32, 16)
    case = case.with_inputs({name: rounded(getattr(case, name)) for name in ("query", "key", "value", "dout")})
    check_tf32(case, ROWS[80])

    class Forgetful:
        def forward(self, *arguments, **options):
            out, saved = ROWS[80].forward(*arguments, **options)
            return out, saved._replace(lse=torch.full_like(saved.lse, float("nan")))

        def backward(self, *arguments):
            return ROWS[80].backward(*arguments)

    with pytest.raises(AssertionError):
        check_tf32(case, Forgetful())


@pytest.mark.parametrize("arch", backend.CHIPS)
@pytest.mark.parametrize("sizes", [(0, 2, 5, 7), (1, 2, 0, 7), (1, 2, 5, 0)], ids=str)
def test_empty_sizes_launch_nothing(sizes, arch):
    ROWS[arch].counts.clear()
    B, H, Nq, Nk = sizes
    case = make_case(B, H, Nq, Nk, 16, dtype=torch.float16)
    results = run(case, backend.name_of(arch))
    assert not launched(arch) and all(not tensor.any() for tensor in results.values())


@pytest.mark.slow
@pytest.mark.parametrize("arch", backend.CHIPS)
def test_every_subset_of_gradients(arch):
    """Each gradient by itself, each left out, and none: the same as among all, inside the budget."""
    case = make_case(1, 2, 13, 70, 16, dtype=torch.float16)
    names = set(case.inputs())
    for needs in [*({name} for name in names), *(names - {name} for name in names), set()]:
        results = run(case, backend.name_of(arch), sorted(needs))
        assert set(results) == {"out", *(f"d{name}" for name in needs)}
        assert_within_budget(results, case)
