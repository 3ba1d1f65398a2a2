"""`python -m smattn` prints what a bug report needs: versions, processor, devices, and every backend with its reasons."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from . import __version__
from .backends import backends

CPU_INFO = Path("/proc/cpuinfo")  # Linux; elsewhere platform names the processor


def report() -> Iterator[str]:
    """The lines of the report. It needs neither Triton, nor the C++ extension, nor a GPU: what is missing is said."""
    yield f"smattn     {__version__}"
    rocm = torch.version.hip
    platform_of_torch = f"ROCm {rocm}" if rocm else f"CUDA {torch.version.cuda or 'none'}"
    yield f"torch      {torch.__version__}, {platform_of_torch}"
    yield f"triton     {version_of('triton')}, TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET', '')}"
    yield f"numpy      {version_of('numpy')}"
    yield f"Python     {platform.python_version()}"
    yield f"system     {platform.platform()}"
    yield f"processor  {processor()}, {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        yield "device     none but the processor: torch finds no CUDA device"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.1f} GiB, {device.multi_processor_count} multiprocessors"
        chip = device.gcnArchName if rocm else f"compute capability {device.major}.{device.minor}"
        yield f"device     cuda:{index} {device.name}, {chip}, {memory}"
    for name, status in backends().items():
        yield f"backend    {name}: {'available' if status.available else 'not available'}"
        yield from (f"           - {line}" for line in (*status.reasons, *status.notes))


def version_of(module: str) -> str:
    """The version of an optional module, or why it cannot be imported."""
    try:
        return str(importlib.import_module(module).__version__)
    except ImportError as error:
        return f"not there ({error})"


def processor() -> str:
    """The processor's name as the system has it."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or 'unknown'} ({platform.machine()})"


if __name__ == "__main__":
    print(*report(), sep="\n")
