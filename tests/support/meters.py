"""The peak of memory during a call, beyond what was there before: three meters, one for each way to watch a backend."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from smattn import soft_masked_attention
from smattn.testing import Case, plain, run
from tests.support.zero_calls import ZeroCall


def size(results: dict[str, torch.Tensor]) -> int:
    return sum(t.nbytes for t in results.values())


def extra_on_cuda(call: ZeroCall, backend: str) -> tuple[float, float]:
    """(peak - results, ceiling) by torch's CUDA allocator."""
    case = call.case("cuda")
    run(case, backend, call.needs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run(case, backend, call.needs)
    return torch.cuda.max_memory_allocated() - before - size(results), call.ceiling(results)


def peak_allocated(function: Callable[[], Any]) -> tuple[int, Any]:
    """The most bytes that torch's CPU allocator had handed out at once while `function` ran, and what it returned."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = now = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, result


@contextmanager
def launches_recorded(arch: int):
    """Inside the block Triton's launches, with this chip's tiles, are recorded and not run. What remains is what the launchers allocate.

    The record keeps no arguments, so that buffers are freed where the launchers free them. It knows nothing of registers and shared memory.
    """
    from smattn.kernels import launch

    class Kernels(list):
        def append(self, launched):
            super().append(launched[:1])

    recorder = launch.Recorder(arch, Kernels())
    launch.record(recorder)
    try:
        yield recorder
    finally:
        launch.record(None)


def extra_of_launchers(call: ZeroCall, arch: int) -> tuple[float, float]:
    """(peak - results, ceiling) of the buffers that Triton's launchers allocate."""
    case = call.case()
    with launches_recorded(arch) as recorder:
        peak, results = peak_allocated(lambda: run(case, "triton", call.needs))
    assert recorder.launches
    return peak - size(results), call.ceiling(results)


def run_plainly(case: Case, needs: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """plain() and its gradients, which the meters must find too large."""
    leaves = {name: t.detach().requires_grad_(name in needs) for name, t in case.inputs().items()}
    out = plain(leaves["query"], leaves["key"], leaves["value"], leaves["mask"][:, None], leaves["alpha"])[0]
    grads = torch.autograd.grad(out, [leaves[name] for name in needs], case.dout)
    return {"out": out.detach()} | {f"d{name}": grad for name, grad in zip(needs, grads, strict=True)}


def run_sigmoid_first(case: Case, needs: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """A case of logits on the CPU kernels without mask_logits, which holds M and its gradient."""
    leaves = {name: t.detach().requires_grad_(name in needs) for name, t in case.inputs().items()}
    mask = torch.sigmoid(leaves["mask_logits"])
    out = soft_masked_attention(leaves["query"], leaves["key"], leaves["value"], mask, leaves["alpha"], backend="cpu")
    grads = torch.autograd.grad(out, [leaves[name] for name in needs], case.dout)
    return {"out": out.detach()} | {f"d{name}": grad for name, grad in zip(needs, grads, strict=True)}


OTHERS = {"plain": run_plainly, "sigmoid first": run_sigmoid_first}


def extra_resident(call: ZeroCall, backend: str) -> tuple[float, float]:
    """(peak - results, ceiling) of the resident set of a process that does nothing else. backend may also be one of OTHERS."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_extra_resident_here, call, backend).result()


def _extra_resident_here(call: ZeroCall, backend: str) -> tuple[float, float]:
    def compute(call: ZeroCall, case: Case) -> dict[str, torch.Tensor]:
        other = OTHERS.get(backend)
        return run(case, backend, call.needs) if other is None else other(case, call.needs)

    if call.threads is not None:
        torch.set_num_threads(call.threads)
    warm_up = replace(call, Nq=4, Nk=64)
    compute(warm_up, warm_up.case())
    case = call.case()
    for tensor in (*case.inputs().values(), case.dout):
        tensor.sum()  # makes the inputs resident before the measurement
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # the high-water mark starts again from what is resident now
    before = _resident("VmRSS")
    results = compute(call, case)
    return _resident("VmHWM") - before - size(results), call.ceiling(results)


def _resident(field: str) -> int:
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith(field + ":"))
