"""Repeatable: a call gives the same bits from run to run, whatever lay in memory before."""

from contextlib import contextmanager

import pytest
import torch

from smattn.testing import make_case, run

pytestmark = pytest.mark.promise("repeatable")
OPTIONS = [
    {},
    {"dropout_p": 0.3, "padded": 0.3, "with_lse": True},
    {"mask_shape": (1, 2, 1, None)},
    {"mask_shape": (1, 1, None), "padded": 0.3},
    {"mask": None},
]
SIZES = [(5, 97, 8), (131, 40, 8), (13, 97, 33)]


@contextmanager
def poisoned_memory():
    """Inside the block every uninitialised tensor is filled with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def a_case(size, options, device, dtype=torch.float32):
    Nq, Nk, D = size
    if "mask_shape" in options:
        options = options | {"mask_shape": (*options["mask_shape"][:-1], Nk)}
    return make_case(1, 2, Nq, Nk, D, device=device, dtype=dtype, rng=5, **options)


def differing(a, b):
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_same_bits_over_poisoned_memory(backend, device, size, options):
    case = a_case(size, options, device)
    first = run(case, backend)
    with poisoned_memory():
        assert torch.empty(1000, device=device).isnan().all()  # memory is poisoned indeed
        poisoned = run(case, backend)
    assert differing(first, poisoned) == []


@pytest.mark.parametrize("size", [(13, 300, 33), (131, 40, 8), (150, 7, 8)], ids=str)
def test_the_same_bits_whether_or_not_a_gradient_is_wanted(backend, dtype, device, size):
    case = a_case(size, OPTIONS[1], device, dtype)
    alone, trained = run(case, backend, needs=()), run(case, backend)
    assert alone.keys() == {"out", "lse"} and "dquery" in trained
    assert differing(alone, trained) == []


@pytest.mark.parametrize("size", SIZES[:2], ids=str)
def test_the_same_bits_every_time(backend, device, size):
    case = a_case(size, OPTIONS[1], device)
    first = run(case, backend)
    assert [differing(first, run(case, backend)) for _ in range(2)] == [[], []]


@pytest.mark.parametrize("size", SIZES[:2], ids=str)
def test_the_same_bits_in_every_dtype(backend, dtype, device, size):
    case = a_case(size, OPTIONS[1], device, dtype)
    first = run(case, backend)
    with poisoned_memory():
        assert differing(first, run(case, backend)) == []


def test_maps_repeat_over_poisoned_memory(map_backend, device):
    case = make_case(2, 4, 5, 97, 8, Hkv=2, as_map=True, padded=0.3, device=device)
    first = run(case, map_backend)
    assert differing(first, run(case, map_backend)) == []
    with poisoned_memory():
        assert differing(first, run(case, map_backend)) == []


def test_uninitialised_memory_would_be_seen(device):
    """The poison works: a tensor that is never written differs under it."""
    with poisoned_memory():
        assert torch.empty(4096, device=device).isnan().all()
        assert torch.empty(4096, dtype=torch.float16, device=device).isnan().all()


@pytest.mark.parametrize("threads", [2, 3])
def test_bits_do_not_depend_on_the_number_of_threads(fused_backend, device, threads):
    case = make_case(1, 2, 13, 300, 16, Hkv=1, with_lse=True, dropout_p=0.2, padded=0.2, device=device)
    first = run(case, fused_backend)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert differing(first, run(case, fused_backend)) == []
    finally:
        torch.set_num_threads(before)
