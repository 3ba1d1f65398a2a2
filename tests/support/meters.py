"""Peak memory of a call, beyond what was there before it: three meters, one for each way a backend can be watched."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from smattn import soft_masked_attention
from smattn.testing import Case, plain, run


@dataclass(frozen=True)
class Call:
    """A forward and backward, of soft_masked_attention or of its map: sizes, dtype name, the gradients wanted, how the mask lies in memory.

    Hkv: H unless given. mask: which of M's axes (batch, head, query) it has, the others being of size 1; None: no mask.
    threads: of the CPU, None: torch's choice.
    """

    B: int
    H: int
    Nq: int
    Nk: int
    D: int
    dtype: str = "float32"
    needs: tuple[str, ...] = ("query", "key", "value", "mask", "alpha")
    layout: str = "contiguous"
    options: bool = False  # dropout, padding and a gradient of lse
    Hkv: int | None = None
    mask: tuple[bool, bool, bool] | None = (True, False, True)
    threads: int | None = None
    as_map: bool = False
    logits: bool = False  # in place of the mask

    def case(self, device: str = "cpu") -> Case:
        """Zeros, never written where the system commits memory lazily."""
        dtype, Hkv = getattr(torch, self.dtype), self.Hkv or self.H

        def zeros(*sizes: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.zeros(sizes, dtype=dtype, device=device)

        mask = None
        if self.mask is not None:
            B, H, Nq = (n if has else 1 for n, has in zip((self.B, self.H, self.Nq), self.mask, strict=True))
            mask = zeros(B, H, Nq, self.Nk) if H > 1 else laid_out(zeros, (B, Nq, self.Nk), self.layout)
        return Case(
            query=zeros(self.B, self.H, self.Nq, self.D),
            key=zeros(self.B, Hkv, self.Nk, self.D),
            value=zeros(self.B, Hkv, self.Nk, self.D),
            mask=None if self.logits else mask,
            mask_logits=mask if self.logits else None,
            alpha=None if mask is None else zeros(self.H, dtype=torch.float32),
            dout=zeros(self.B, self.Nq, self.Nk, dtype=torch.float32) if self.as_map else zeros(self.B, self.H, self.Nq, self.D),
            head_weights=zeros(self.H, dtype=torch.float32) if self.as_map else None,
            dlse=zeros(self.B, self.H, self.Nq, dtype=torch.float32) if self.options else None,
            dropout_p=0.1 if self.options else 0.0,
            key_padding_mask=zeros(self.B, self.Nk, dtype=torch.bool) if self.options else None,
            enable_gqa=Hkv != self.H,
        )

    def ceiling(self, results: dict[str, torch.Tensor]) -> float:
        """0.25 * (inputs + outputs + gradients) + 16 MiB."""
        case = self.case()
        inputs = [*case.inputs().values(), case.dout, case.dlse, case.key_padding_mask]
        given = sum(t.numel() * t.element_size() for t in inputs if t is not None)
        return 0.25 * (given + size(results)) + 16 * 2**20


LAYOUTS = ("queries and keys swapped", "every second key", "every second query", "one row for all queries", "one mask for the batch")


def laid_out(zeros: Callable[..., torch.Tensor], shape: tuple[int, int, int], layout: str) -> torch.Tensor:
    B, Nq, Nk = shape
    if layout == "queries and keys swapped":
        return zeros(B, Nk, Nq).mT
    if layout == "every second key":
        return zeros(B, Nq, 2 * Nk)[..., ::2]
    if layout == "every second query":
        return zeros(B, 2 * Nq, Nk)[:, ::2]
    if layout == "one row for all queries":
        return zeros(B, 1, Nk).expand(shape)
    if layout == "one mask for the batch":
        return zeros(1, Nq, Nk).expand(shape)
    return zeros(*shape)


def size(results: dict[str, torch.Tensor]) -> int:
    return sum(t.nbytes for t in results.values())


def extra_on_cuda(call: Call, backend: str) -> tuple[float, float]:
    """(peak - results, ceiling) by torch's CUDA allocator."""
    case = call.case("cuda")
    run(case, backend, call.needs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run(case, backend, call.needs)
    return torch.cuda.max_memory_allocated() - before - size(results), call.ceiling(results)


def peak_allocated(function: Callable[[], Any]) -> tuple[int, Any]:
    """The most bytes that torch's CPU allocator had handed out at once inside function, and what function returned."""
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
    """Triton kernels of this chip's tiles are recorded and not run: what remains is what the launchers allocate, at any size.

    No arguments are kept: the buffers among them are freed where the launchers free them. Registers and shared memory are not in it.
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


def extra_of_launchers(call: Call, arch: int) -> tuple[float, float]:
    """(peak - results, ceiling) of the buffers that the triton launchers allocate."""
    case = call.case()
    with launches_recorded(arch) as recorder:
        peak, results = peak_allocated(lambda: run(case, "triton", call.needs))
    assert recorder.launches
    return peak - size(results), call.ceiling(results)


def run_plainly(case: Case, needs: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """plain() and its gradients: what the meters must find too large."""
    leaves = {name: t.detach().requires_grad_(name in needs) for name, t in case.inputs().items()}
    out = plain(leaves["query"], leaves["key"], leaves["value"], leaves["mask"][:, None], leaves["alpha"])[0]
    grads = torch.autograd.grad(out, [leaves[name] for name in needs], case.dout)
    return {"out": out.detach()} | {f"d{name}": grad for name, grad in zip(needs, grads, strict=True)}


def run_sigmoid_first(case: Case, needs: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """A case of logits on the CPU's kernels as one would without mask_logits: M and its gradient are held."""
    leaves = {name: t.detach().requires_grad_(name in needs) for name, t in case.inputs().items()}
    mask = torch.sigmoid(leaves["mask_logits"])
    out = soft_masked_attention(leaves["query"], leaves["key"], leaves["value"], mask, leaves["alpha"], backend="cpu")
    grads = torch.autograd.grad(out, [leaves[name] for name in needs], case.dout)
    return {"out": out.detach()} | {f"d{name}": grad for name, grad in zip(needs, grads, strict=True)}


def extra_resident(call: Call, backend: str) -> tuple[float, float]:
    """(peak - results, ceiling) of the resident set of a process that does nothing else; backend: or one of OTHERS."""
    fields = json.dumps(call.__dict__)
    result = subprocess.run([sys.executable, __file__, fields, backend], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    extra, ceiling = result.stdout.split()
    return float(extra), float(ceiling)


def _resident(field: str) -> int:
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith(field + ":"))


OTHERS = {"plain": run_plainly, "sigmoid first": run_sigmoid_first}


def main(fields: str, backend: str) -> None:
    call = Call(**json.loads(fields))

    def compute(call: Call, case: Case) -> dict[str, torch.Tensor]:
        other = OTHERS.get(backend)
        return run(case, backend, call.needs) if other is None else other(case, call.needs)

    if call.threads is not None:
        torch.set_num_threads(call.threads)
    warm_up = replace(call, Nq=4, Nk=64)
    compute(warm_up, warm_up.case())
    case = call.case()
    for tensor in (*case.inputs().values(), case.dout):
        tensor.sum()  # inputs are resident before the measurement
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # the high-water mark starts again from what is resident now
    before = _resident("VmRSS")
    results = compute(call, case)
    print(_resident("VmHWM") - before - size(results), call.ceiling(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
