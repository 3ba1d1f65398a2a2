"""The compiled libraries beside this file: loaded at first use, or why they cannot be and how to build them."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import torch

BUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
IN_PLACE = "pip install --no-build-isolation -e ."


class Library(NamedTuple):
    """A shared library that registers ops with torch, and what building it takes."""

    path: Path
    language: str
    compilers: tuple[str, ...]  # any one of these
    variable: str  # the environment variable that names another compiler
    options: str = ""  # environment variables of the build


CPU = Library(Path(__file__).with_name("_cpu.so"), "C++", ("c++", "g++", "clang++"), "CXX")
CUDA = Library(Path(__file__).with_name("_cuda.so"), "CUDA", ("nvcc",), "CUDACXX", "CMAKE_ARGS=-DSMATTN_CUDA=ON ")


@cache
def why_not_loaded(library: Library) -> tuple[str, ...]:
    """Why the library's ops cannot be used here, one sentence each; empty once they are loaded."""
    if not library.path.exists():
        source = library.path.parents[1]
        if _is_installed_in_place(source):
            how = f"install it again there: {library.options}{IN_PLACE}"
            return (f"{library.path} was not built when smattn was installed in place from {source}; {how}", *_missing_tools(library))
        if (source / "setup.py").exists():  # Python was started there, and what is installed may well be built
            how = f"start Python elsewhere, or install it in place: {library.options}{IN_PLACE}"
            return (f"{library.path} was not built, for {source} is the source folder; {how}", *_missing_tools(library))
        how = f"to build it, install smattn again from its source folder: {library.options}{BUILD}"
        return (f"{library.path} was not built when smattn was installed; {how}", *_missing_tools(library))
    try:
        torch.ops.load_library(str(library.path))
    except OSError as error:
        return (f"{library.path} does not load with torch {torch.__version__}: {error}",)
    return ()


def _is_installed_in_place(source: Path) -> bool:
    """Whether pip has installed smattn as an editable package that lies in this folder."""
    for distribution in distributions(name="smattn"):
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable") and Path(unquote(urlsplit(origin["url"]).path)).resolve() == source.resolve():
            return True
    return False


def _missing_tools(library: Library) -> Iterator[str]:
    compilers = shlex.split(os.environ.get(library.variable, ""))[:1] or library.compilers
    if not any(map(shutil.which, compilers)):
        yield f"no {library.language} compiler found ({', '.join(compilers)}): install one, or set {library.variable}"
    if shutil.which("cmake") is None and not (Path(sys.executable).parent / "cmake").exists():
        yield "no CMake found: pip install cmake ninja"
