"""The CUDA C++ kernels as nvcc compiles them: the emulated build of their backend, except for who runs a launch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from smattn import cuda
from smattn.call import Problem
from tests.support.emulated_cuda import machine

from .backend import Module, Row, Uninitialised, add_rows
from .compile import States
from .counters import Counts
from .cuda_kernels import compiled, launch, name_of

ARCH = 80
NAME = "CUDA C++ compiled for sm_80, emulated"
INTERPRETER = ctypes.CFUNCTYPE(  # emulator::Interpreter of csrc/cuda/emulator/emulator.h
    None, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t
)


class Tensors(Uninitialised):
    """Also sees what an operation is given, and what memory it takes while it runs."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace != machine().ops:
            return super().__torch_dispatch__(function, types, args, kwargs)
        self.kept += [each for each in args if isinstance(each, Tensor)]
        with self:
            return function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args)


@dataclass
class EmulatedCuda(Module):
    """The CUDA kernels on one chip."""

    counts: list[tuple[str, Counts]] = field(default_factory=list)
    module: Any = cuda

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        with self.launches():
            return cuda.unsupported_reasons(problem)

    @contextmanager
    def launches(self) -> Iterator[None]:
        states, failures = States(), list[Exception]()
        tensors = Tensors(states)

        def run(kernel: bytes, blocks: int, threads: int, shared_bytes: int, arguments: int, size: int) -> None:
            """No exception may cross the operation, which is C++: the first ends what comes after it, and is raised at the end."""
            if failures:
                return
            try:
                code, counts = compiled(kernel.decode(), ARCH), Counts()
                assert code.kernel.threads == threads
                self.counts.append((name_of(kernel.decode()), counts))
                launch(code, blocks, shared_bytes, ctypes.string_at(arguments, size), tensors.kept, states, counts)
            except Exception as failure:
                failures.append(failure)

        interpreter, before = INTERPRETER(run), cuda.machine
        cuda.machine = machine()
        torch.ops.smattn_cuda_emulated.run_kernels_by(ctypes.cast(interpreter, ctypes.c_void_p).value)
        try:
            with tensors:
                yield
        finally:
            torch.ops.smattn_cuda_emulated.run_kernels_by(0)
            cuda.machine = before
        if failures:
            raise failures[0]


def install() -> EmulatedCuda:
    """Put its row into smattn's table of backends."""
    emulated = EmulatedCuda()
    add_rows(Row(NAME, ("cpu",), "", (), emulated))
    return emulated
