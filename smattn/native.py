"""The compiled extension smattn/_C.so: loaded at first use, and when it is absent, why and how to build it."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import sys
from pathlib import Path

import torch

from .problem import Problem

LIBRARY = Path(__file__).with_name("_C.so")


def reasons() -> list[str]:
    """Why the compiled extension cannot be used here, one sentence each; empty when its ops, `torch.ops.smattn_native`, are loaded."""
    return list(_load())


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why the native kernels cannot run this call; empty when they can."""
    return reasons()


@functools.cache
def _load() -> tuple[str, ...]:
    if not LIBRARY.exists():
        return _why_absent()
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return (f"the C++ extension {LIBRARY} does not load with torch {torch.__version__}: {error}",)
    return ()


def _why_absent() -> tuple[str, ...]:
    compilers = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    absent = []
    if not any(map(shutil.which, compilers)):
        absent.append(f"no C++ compiler found ({', '.join(compilers)}): install one, or set CXX")
    if shutil.which("cmake") is None and not (Path(sys.executable).parent / "cmake").exists():
        absent.append("no CMake found: pip install cmake ninja")
    return (
        f"the C++ extension {LIBRARY} was not built when smattn was installed",
        *absent,
        "to build it, install smattn again from its source folder: pip install --no-build-isolation --force-reinstall --no-deps .",
    )
