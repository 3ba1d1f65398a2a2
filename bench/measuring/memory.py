"""Peak memory of a call: what its process grows by at the highest point, less the outputs and gradients that the call returns.

That is whatever a call needs besides its inputs and results. On a GPU torch.cuda.max_memory_allocated tells, after a first call: scratch
that a contestant keeps from one call to the next does not count there. On a CPU the kernel's high-water mark of resident memory (VmHWM,
reset through /proc/self/clear_refs) is read in a process that has run nothing but a small call of the same contestant, so that code pages
and thread stacks do not count. A compiled contestant warms up on the very shape, or the compiler's memory would count.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection

import torch

from bench.measuring.cell import Cell, Step, bind
from bench.measuring.machine import on_a_gpu
from bench.measuring.peers import Contestant


def extra_bytes(contestant: Contestant, cell: Cell) -> int:
    """Peak memory of one call beyond inputs, outputs and gradients. Raises RuntimeError when it could not be measured."""
    return peak_beyond_results(partial(_call_and_warm_up, contestant, cell), cell.device)


def _call_and_warm_up(contestant: Contestant, cell: Cell) -> tuple[Step, Step]:
    attend = contestant.ready()
    call = bind(attend, cell.case(), cell.direction, contestant.gradients)
    return call, call if contestant.compiled else bind(attend, cell.smaller().case(), cell.direction, contestant.gradients)


def peak_beyond_results(make: Callable[[], tuple[Step, Step]], device: str) -> int:
    """Peak memory of a call beyond what was there before it and what it returns. `make`, picklable, gives the call and its warm-up."""
    if on_a_gpu(device):
        return _peak_on_cuda(make()[0])
    context = multiprocessing.get_context("forkserver")  # It forks from a process that has imported these modules and run nothing.
    context.set_forkserver_preload(["torch", "smattn.testing", "torch._inductor.compile_fx"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak_on_cpu, args=(sender, make, torch.get_num_threads()))
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the measuring process ended with exit code {process.exitcode}") from None
    process.join()
    if isinstance(answer, str):
        raise RuntimeError(answer)
    assert isinstance(answer, int)
    return answer


def _peak_on_cpu(sender: Connection, make: Callable[[], tuple[Step, Step]], threads: int) -> None:
    try:
        torch.set_num_threads(threads)
        call, warm = make()
        warm()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as clear:
            clear.write("5")
        before = _status("VmRSS")
        results = call()
        sender.send(_status("VmHWM") - before - sum(tensor.nbytes for tensor in results))
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _peak_on_cuda(call: Step) -> int:
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(tensor.nbytes for tensor in results)
