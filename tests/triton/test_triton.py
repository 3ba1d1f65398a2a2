"""The Triton backend's launches: which passes run, and that nothing is launched twice."""

from dataclasses import replace
from time import perf_counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import smattn
from smattn.call import Needs, make_call
from smattn.testing import make_case, run
from tests.support.expected import BACKENDS, INTERPRETED
from tests.support.meters import launches_recorded
from tests.support.zero_calls import ZeroCall

if "triton" not in BACKENDS:
    pytest.skip("triton is not expected here", allow_module_level=True)

from smattn.kernels import backend  # noqa: E402
from smattn.kernels.tools import jobs  # noqa: E402

pytestmark = pytest.mark.promise("Triton kernels")


def backward_passes(Nq, needs, device, arch=90, as_map=False):
    """The names of the kernels that a backward launches, in order, with the tiles of a real chip."""
    call = ZeroCall(1, 2, Nq, 256, 32, needs=needs, as_map=as_map)
    with launches_recorded(arch) as forward_alone:
        run(call.case(device), "triton", needs=())
    with launches_recorded(arch) as recorder:
        run(call.case(device), "triton", needs=needs)
    names = [jobs.name_of(kernel) for kernel, *_ in recorder.launches]
    return names[len(forward_alone.launches) :]


@pytest.mark.promise("only what is asked")
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


@pytest.mark.promise("only what is asked")
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


def test_few_queries_of_a_map(device):
    assert backward_passes(13, ("query", "key", "mask", "alpha"), device, as_map=True) == ["map_means", "map_rows", "few_queries", "reduce"]


@pytest.mark.parametrize("Nq", [13, 1045])
def test_a_map_has_no_gradient_of_value_even_where_every_gradient_is_wanted(Nq):
    """Ahead-of-time compilation wants them all, and must compile the kernels that calls launch."""
    passes = [arguments for _, arguments, _ in jobs.record(jobs.Job(90, torch.float16, 64, Nq, jobs.MAP)) if "NEED_DV" in arguments]
    assert [(arguments["NEED_DK"], arguments["NEED_DV"]) for arguments in passes] == [(True, False)]


ALLOCATIONS = {"aten.empty.memory_format", "aten.empty_like.default", "aten.view.dtype", "aten.detach.default"}


class Dispatched(TorchDispatchMode):
    """Collects the names of the torch operators that run inside the block."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def few_queries(device, Nq, dtype=torch.float16, options=False, D=32):
    """A call, dO and dL, uninitialised, in the form that a backend takes."""
    B, H, Hkv, Nk = 2, 4, 2 if options else 4, 9504

    def tensor(*sizes, dtype=dtype):
        return torch.empty(sizes, dtype=dtype, device=device)

    call = make_call(
        tensor(B, H, Nq, D), tensor(B, Hkv, Nk, D), tensor(B, Hkv, Nk, D), tensor(B, 1, 1, Nq, Nk, dtype=torch.float32),
        tensor(H, dtype=torch.float32), tensor(B, Nk, dtype=torch.bool) if options else None,
        tensor(1, dtype=torch.int64) if options else None, scale=1.0, dropout_p=0.1 if options else 0.0,
    )  # fmt: skip
    return call, tensor(B, H, Nq, D), tensor(B, H, Nq, dtype=torch.float32) if options else None


@pytest.mark.parametrize("options", [False, True], ids=["plain", "dropout padding gqa lse"])
@pytest.mark.parametrize("Nq, dtype, backward", [
    (1, torch.float16, ["few_queries", "reduce"]), (13, torch.bfloat16, ["few_queries", "reduce"]),
    (32, torch.float32, ["few_queries", "reduce"]), (33, torch.float16, ["dq", "few_queries", "reduce"]),
    (100, torch.float16, ["dq", "few_queries", "reduce"]), (128, torch.float32, ["dq", "few_queries", "reduce"]),
])  # fmt: skip
def test_few_queries_are_two_launches_and_at_most_three_back(device, Nq, dtype, backward, options):
    """Nothing else runs on the device or waits for it, since torch only allocates. So a CUDA graph can hold the launches."""
    names, operators = launches_and_operators(few_queries(device, Nq, dtype, options))
    assert names == ["partial", "merge", *backward]
    assert operators <= ALLOCATIONS


@pytest.mark.parametrize("options", [False, True], ids=["plain", "dropout padding gqa lse"])
@pytest.mark.parametrize("Nq, dtype, D", [(33, torch.float16, 128), (30, torch.float32, 128), (13, torch.float32, 256)])
def test_few_queries_of_wide_heads_are_four_launches_back(device, Nq, dtype, D, options):
    """Where one tile of all queries would spill, a pass for dQ works out delta, and one for dK and dV and one for dM follow."""
    names, operators = launches_and_operators(few_queries(device, Nq, dtype, options, D))
    assert names == ["partial", "merge", "dq", "dkdv", "dmask", "reduce"]
    assert operators <= ALLOCATIONS


ALL = Needs(True, True, True, True, True)


def launches_and_operators(of):
    """The kernels that a forward and backward launch, and the torch operators that they call."""
    call, dout, dlse = of
    with launches_recorded(90) as recorder, Dispatched() as dispatched:
        _, saved = backend.forward(call, save_out=True, save_mbar=True)
        backend.backward(call, saved, dout, dlse, ALL)
    return [jobs.name_of(kernel) for kernel, *_ in recorder.launches], dispatched.names


def interpreted_products(case, monkeypatch):
    """The number of matrix products that all programs of a forward and backward compute."""
    from triton.runtime.interpreter import InterpreterBuilder

    create_dot, taken = InterpreterBuilder.create_dot, []
    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", lambda *operands: taken.append(1) or create_dot(*operands))
        results = run(case, "triton")
    return len(taken), results


@pytest.mark.skipif(not INTERPRETED, reason="counts what the interpreter does")
@pytest.mark.parametrize("as_map", [False, True], ids=["attention", "map"])
@pytest.mark.parametrize("Nq", [13, 131])
def test_a_key_block_of_padding_takes_no_product(device, monkeypatch, Nq, as_map):
    """No pass computes one at the end of the keys. In their middle, passes of backward that own key blocks compute none."""
    case = make_case(1, 1, Nq, 128, 16, as_map=as_map, device=device)
    nothing = torch.zeros(1, 128, dtype=torch.bool, device=device)
    at_end, inside = nothing.clone(), nothing.clone()
    at_end[:, 32:] = inside[:, 32:96] = True  # blocks have 32 keys
    every, _ = interpreted_products(replace(case, key_padding_mask=nothing), monkeypatch)
    first, results = interpreted_products(replace(case, key_padding_mask=at_end), monkeypatch)
    fewer, _ = interpreted_products(replace(case, key_padding_mask=inside), monkeypatch)
    assert 0 < first == every // 4 < every and first < fewer < every
    assert results["dkey"][:, :, :32].any() and not results["dkey"][:, :, 32:].any()


@pytest.mark.slow
def test_python_beside_the_launches_is_short(device, capsys):
    """Calls whose launches do nothing, compared with torch's cheapest call, an allocation. Each of them makes seven or eight.

    Timed are the backend's side of a call with 13 queries and with 100, and whole calls, autograd included.
    """
    limits = {"forward": 40, "backward": 45, "backward, three launches": 60, "whole forward": 110, "whole backward": 150}
    few, dout, _ = few_queries(device, 13)
    more, more_dout, _ = few_queries(device, 100)
    other, _, _ = few_queries(device, 13)
    tensors = (other.query, other.key, other.value, other.mask[:, 0, 0], other.alpha)
    query, key, value, mask, alpha = leaves = [tensor.requires_grad_() for tensor in tensors]
    with launches_recorded(90) as recorder:
        _, saved = backend.forward(few, save_out=True, save_mbar=True)
        _, more_saved = backend.forward(more, save_out=True, save_mbar=True)

        def whole():
            return smattn.soft_masked_attention(query, key, value, mask, alpha, backend="triton")

        graph = whole()
        calls = {
            "allocation": lambda: torch.empty(16, device=device),
            "forward": lambda: backend.forward(few, save_out=True, save_mbar=True),
            "backward": lambda: backend.backward(few, saved, dout, None, ALL),
            "backward, three launches": lambda: backend.backward(more, more_saved, more_dout, None, ALL),
            "whole forward": whole,
            "whole backward": lambda: torch.autograd.grad(graph, leaves, dout, retain_graph=True),
        }
        best = dict.fromkeys(calls, float("inf"))
        for _ in range(1000):
            recorder.launches.clear()
            for name, call in calls.items():
                start = perf_counter()
                call()
                best[name] = min(best[name], perf_counter() - start)
    with capsys.disabled():
        print({name: f"{1e6 * seconds:.1f} us" for name, seconds in best.items()})
    assert {name for name, limit in limits.items() if best[name] > limit * best["allocation"]} == set()
