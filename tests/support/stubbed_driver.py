"""Triton's own path to the driver without a GPU: kernels are compiled for sm_90, and what would start them takes notes instead.

It needs a process of its own, in which kernels are not interpreted; tests/triton/test_prepared.py looks at what `main` prints there.
"""

from __future__ import annotations

import json
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from smattn import ops, prepared
from smattn.kernels import backend, chip

ARCH = 90
launched: list[tuple[Any, ...]] = []  # grid and arguments of every launch
launchers: list[Any] = []  # what Triton gave to launch a compiled kernel again, one for each launch of a record


class Launcher:
    """In place of what calls cuLaunchKernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):  # type: ignore[no-untyped-def]
        launched.append(((x, y, z), arguments))


class Driver:
    """As much of a driver as a launch asks for."""

    launcher_cls = Launcher
    utils = SimpleNamespace(
        load_binary=lambda name, *_: (name, name, 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 232448},
    )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)


def install() -> None:
    """From now on Triton launches kernels of sm_90 on tensors in the CPU's memory, and nothing runs."""
    assert not triton.knobs.runtime.interpret
    triton.runtime.driver.set_active(Driver())
    backend.unsupported_reasons = lambda problem: []
    chip._number = lambda device: ARCH  # type: ignore[assignment]
    launcher_of = triton.compiler.CompiledKernel.__getitem__

    def noted(compiled: Any, grid: Any) -> Any:
        launchers.append(launcher_of(compiled, grid))
        return launchers[-1]

    triton.compiler.CompiledKernel.__getitem__ = noted


def arguments_of(Nq: int, Nk: int, D: int, dtype: torch.dtype = torch.float16) -> tuple[ops.ForwardArguments, Any]:
    """A forward, and of its results the backward with all five gradients, uninitialised."""
    B, H = 2, 4
    query, dout = torch.empty(2, B, H, Nq, D, dtype=dtype)
    key, value = torch.empty(2, B, H, Nk, D, dtype=dtype)
    mask, alpha = torch.empty(B, 1, 1, Nq, Nk), torch.empty(H)
    forward = ops.ForwardArguments(query, key, value, mask, None, alpha, None, None, 1.0, 0.0, False, True, True, "triton")

    def backward(out: torch.Tensor, lse: torch.Tensor, remainder: torch.Tensor, *rows: torch.Tensor) -> ops.BackwardArguments:
        saved = (out, remainder, lse, *rows)
        needs = [True, True, True, True, True, False]
        return ops.BackwardArguments(
            dout, None, query, key, value, mask, None, alpha, None, None, *saved, 1.0, 0.0, False, needs, "triton"
        )

    return forward, backward


def form(argument: Any) -> Any:
    """What a launch hands over, with pointers as their addresses, and descriptors by what is in them."""
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    if hasattr(argument, "block_shape"):
        return [argument.base.data_ptr(), list(argument.shape), list(argument.strides), list(argument.block_shape)]
    return argument


def places(arguments: Any, results: Any) -> dict[int, str]:
    """Names of the addresses of a call's inputs and results. Those of its other buffers have none."""
    named = arguments._asdict() | {f"result {i}": tensor for i, tensor in enumerate(results)}
    return {tensor.data_ptr(): name for name, tensor in named.items() if isinstance(tensor, torch.Tensor) and tensor.numel() > 0}


def launches_of(op: Any, arguments: Any) -> tuple[Any, list[Any]]:
    """The op's results and its launches, with a name for each known address and "buffer" for the others."""
    launched.clear()
    launchers.clear()
    results = op(*arguments)
    names = places(arguments, results)

    def named(x: Any) -> Any:
        if isinstance(x, list):
            return [named(x[0]), *x[1:]]
        return names.get(x, "buffer") if isinstance(x, int) and x > 1 << 32 else x

    return results, [[list(grid), [named(form(x)) for x in given]] for grid, given in launched]


def best(function: Any, seconds: float = 1.5) -> float:
    """Microseconds, the least of many."""
    least, end = float("inf"), perf_counter() + seconds
    while perf_counter() < end:
        launched.clear()
        start = perf_counter()
        function()
        least = min(least, perf_counter() - start)
    return 1e6 * least


def report(Nq: int, Nk: int, D: int) -> dict[str, Any]:
    """The launches of three calls of forward and of backward, each on tensors of its own, and what a call takes from the op's entry on."""
    found: dict[str, list[Any]] = {"forward": [], "backward": []}
    forward_again = ops.made_again(ops.compute_forward, ops.ForwardArguments)
    backward_again = ops.made_again(ops.compute_backward, ops.BackwardArguments)
    kept, again_by = [], {name: [] for name in found}
    for _ in range(3):
        forward, backward_of = arguments_of(Nq, Nk, D)
        results, launches = launches_of(forward_again, forward)
        found["forward"].append(launches)
        again_by["forward"] += launchers
        backward = backward_of(*results)
        gradients, launches = launches_of(backward_again, backward)
        found["backward"].append(launches)
        again_by["backward"] += launchers
        kept.append((forward, results, backward, gradients))  # so that no two calls have the same addresses
    forward, _, backward, _ = kept[-1]
    times = {}
    for name, op, again, arguments in (
        ("forward", ops.compute_forward, forward_again, forward), ("backward", ops.compute_backward, backward_again, backward)
    ):  # fmt: skip
        times[name] = best(lambda again=again, arguments=arguments: again(*arguments))
        runs = list(zip(again_by[name], [given for _, given in launched], strict=True))
        times[f"{name}, launches alone"] = best(lambda runs=runs: [run(*given) for run, given in runs])
        record = next(x for key, x in prepared._records.items() if key[0] is op and isinstance(x, prepared.Record))
        times[f"{name}, allocations alone"] = best(lambda record=record: [torch.empty(s, dtype=d, device="cpu") for s, d in record.buffers])
        prepared.switch(False)
        times[f"{name}, made anew"] = best(lambda op=op, arguments=arguments: op(*arguments))
        prepared.switch(True)
        for _ in range(2):
            again(*arguments)
    return {"launches": found, "us": times}


def main() -> None:
    """Print the reports of few and of many queries, by the number of queries."""
    install()
    print(json.dumps({Nq: report(Nq, Nk, D) for Nq, Nk, D in ((13, 9504, 32), (1045, 1045, 64))}))
