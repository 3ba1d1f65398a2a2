"""The Triton backend's launches: which passes run, and that nothing is launched twice."""

import pytest
from expected import BACKENDS
from meters import Call, launches_recorded

from smattn.testing import run

pytestmark = pytest.mark.skipif("triton" not in BACKENDS, reason="triton is not expected here")


def backward_passes(Nq, needs, device, arch=90, as_map=False):
    """Names of the kernels that a backward launches beside the forward's, at the tiles of a real chip."""
    call = Call(1, 2, Nq, 256, 32, needs=needs, as_map=as_map)
    with launches_recorded(arch) as forward_alone:
        run(call.case(device), "triton", needs=())
    with launches_recorded(arch) as recorder:
        run(call.case(device), "triton", needs=needs)
    names = [kernel.__name__.strip("_").removesuffix("_kernel") for kernel, *_ in recorder.launches]
    return names[len(forward_alone.launches) :]


@pytest.mark.parametrize(
    "needs, absent",
    [
        (("mask", "alpha"), {"dkdv", "dq"}),
        (("mask",), {"dkdv", "dq"}),
        (("query",), {"dkdv", "dmask"}),
        (("key", "value"), {"dq", "dmask"}),
        (("query", "key", "value"), {"dmask"}),
        ((), {"dkdv", "dq", "dmask", "delta"}),
    ],
    ids=lambda names: " ".join(sorted(names)) or "none",
)
def test_passes_that_no_gradient_needs_are_not_launched(device, needs, absent):
    passes = backward_passes(1045, needs, device)
    assert absent & set(passes) == set()
    assert len(passes) == len(set(passes)) and bool(passes) == bool(needs)
    everything = backward_passes(1045, ("query", "key", "value", "mask", "alpha"), device)
    assert {"dkdv", "dq", "dmask", "delta"} <= set(everything)


@pytest.mark.parametrize(
    "needs, passes",
    [
        (("head_weights",), {"map_means", "map_rows"}),
        (("mask", "head_weights"), {"map_means", "map_rows", "dmask"}),
        (("query",), {"map_means", "map_rows", "dq"}),
        (("key",), {"map_means", "map_rows", "dkdv"}),
        (("alpha",), {"map_means", "map_rows", "dq"}),
        ((), set()),
    ],
    ids=lambda names: " ".join(sorted(names)) or "none",
)
def test_a_map_takes_the_passes_of_attention_that_its_gradients_need(device, needs, passes):
    assert sorted(backward_passes(1045, needs, device, as_map=True)) == sorted(passes)


def test_few_queries_take_one_pass(device):
    assert "dq" not in backward_passes(13, ("query", "key", "value", "mask", "alpha"), device)
    assert "few_queries" in backward_passes(13, ("query", "key", "value", "mask", "alpha"), device)
    assert backward_passes(13, ("query", "key", "mask", "alpha"), device, as_map=True) == ["map_means", "map_rows", "few_queries", "reduce"]
