"""Arrows point down. In Python: call < kernels < smattn < bench, examples < tests. In C++: what csrc/ shares < cpu, cuda; cpu < driver; and
only the doors include torch.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.promise("architecture")
ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
# Each room and those that it may import from. A module belongs to the room with the longest name that its own begins with.
ROOMS = {
    "smattn.call": ["smattn.call", "smattn.memory"],
    "smattn.prepared": ["smattn.prepared"],
    "smattn.memory": ["smattn.call", "smattn.memory"],
    "smattn": ["smattn", "smattn.kernels", "smattn.call", "smattn.memory", "smattn.prepared"],
    "smattn.kernels": ["smattn.kernels", "smattn.call", "smattn.memory", "smattn.prepared"],
    "bench": ["bench", "smattn", "smattn.kernels", "smattn.call", "smattn.memory", "smattn.prepared"],
    "examples": ["examples", "smattn"],
}
FOLDERS = {"smattn": "smattn", "kernels": "smattn.kernels", "bench": "bench", "examples": "examples"}
C_ROOMS = {"": [""], "cpu": ["", "cpu"], "cuda": ["", "cuda"], "driver": ["", "cpu", "driver"]}  # "": files of csrc/ itself
DOORS = {CSRC / "binding.h", CSRC / "cpu" / "binding.cpp", CSRC / "cuda" / "binding.cpp"}


def modules() -> dict[str, Path]:
    """Every module by its full name, except the tests, which are on top and may import anything."""
    found = {}
    for folder, package in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            parts = [package, *file.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


MODULES = modules()


def room_of(module: str) -> str | None:
    """The room of a module, or None where it is not of this project."""
    rooms = [room for room in (*ROOMS, "tests") if f"{module}.".startswith(f"{room}.")]
    return max(rooms, key=len, default=None)


def imported(module: str, source: str, is_package: bool = False) -> Iterator[str]:
    """The full names of the modules that this one imports. `from x import y` imports x.y where that is a module, and x otherwise."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in MODULES else base


def pointing_up(module: str, source: str, is_package: bool = False) -> list[str]:
    room = room_of(module)
    assert room is not None
    return [name for name in imported(module, source, is_package) if room_of(name) not in (None, *ROOMS[room])]


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_import_points_up(folder):
    files = {name: file for name, file in MODULES.items() if file.is_relative_to(ROOT / folder)}
    wrong = {name: pointing_up(name, file.read_text(), file.name == "__init__.py") for name, file in files.items()}
    assert len(files) > 2 and {name: up for name, up in wrong.items() if up} == {}


@pytest.mark.parametrize(
    "module, source, up",
    [
        ("smattn.call", "from .validate import validate", ["smattn.validate"]),
        ("smattn.memory", "from . import ops", ["smattn.ops"]),
        ("smattn.kernels.forward", "from ..testing.plain import plain", ["smattn.testing.plain"]),
        ("smattn.kernels.forward", "from .. import ops", ["smattn.ops"]),
        ("smattn.kernels.tools.aot", "def f():\n    from ...backends import TABLE", ["smattn.backends"]),
        ("smattn.kernels.forward", "from smattn.backends import TABLE", ["smattn.backends"]),
        ("smattn.flops", "from bench import run", ["bench.run"]),
        ("smattn.distributed.sharding", "import tests.support.meters", ["tests.support.meters"]),
        ("bench.run", "from examples.vos import cost", ["examples.vos.cost"]),
        ("bench.run", "from tests.support import meters", ["tests.support"]),
        ("examples.vos.train", "from bench import run", ["bench.run"]),
        ("examples.quickstart", "from smattn.kernels import backend", ["smattn.kernels.backend"]),
    ],
)  # fmt: skip
def test_an_import_that_points_up_is_found(module, source, up):
    assert pointing_up(module, source) == up


@pytest.mark.parametrize(
    "module, source",
    [
        ("smattn.kernels.forward", "import torch\nfrom ..call import Call\nfrom .launch import launch"),
        ("smattn.kernels.forward", "from ..memory import new_gradients"),
        ("smattn.backends", "from . import reference\nfrom .kernels import backend"),
        ("bench.run", "from smattn.testing import WORKLOADS\nfrom .measuring import harness"),
        ("examples.vos.train", "import smattn\nfrom examples.shared.resumable import train\nfrom .model import VOS"),
    ],
)
def test_an_import_that_points_down_is_allowed(module, source):
    assert list(imported(module, source)) and pointing_up(module, source) == []


def includes_pointing_up(file: Path, source: str) -> list[str]:
    """The included files that lie in a room above, or in torch where this file is no door."""
    room = file.relative_to(CSRC).parts[0] if file.parent != CSRC else ""
    wrong = []
    for opening, name in re.findall(r'^\s*#\s*include\s+([<"])([^>"]+)[>"]', source, re.M):
        if opening == "<":
            if name.split("/")[0] in ("torch", "ATen", "c10") and file not in DOORS:
                wrong.append(name)
            continue
        path = next((path for path in ((file.parent / name).resolve(), CSRC / name) if path.exists()), CSRC / name)
        if (path.relative_to(CSRC).parts[0] if path.parent != CSRC else "") not in C_ROOMS[room]:
            wrong.append(name)
    return wrong


def test_no_include_points_up():
    files = [file for file in CSRC.rglob("*") if file.suffix in (".h", ".cpp", ".cu")]
    wrong = {str(file.relative_to(CSRC)): includes_pointing_up(file, file.read_text()) for file in files}
    assert len(files) > 50 and {name: up for name, up in wrong.items() if up} == {}


@pytest.mark.parametrize(
    "file, source",
    [
        ("params.h", '#include "cpu/workers.h"'),
        ("cpu/forward.h", '#include "cuda/args.h"'),
        ("cpu/forward.h", "#include <torch/csrc/stable/tensor.h>"),
        ("cpu/workers.h", "  # include <ATen/ATen.h>"),
        ("cuda/plan.cpp", '#include "../cpu/workers.h"'),
        ("cuda/plan.cpp", "#include <c10/util/Half.h>"),
        ("driver/main.cpp", '#include "cuda/plan.h"'),
    ],
)
def test_an_include_that_points_up_is_found(file, source):
    assert len(includes_pointing_up(CSRC / file, source)) == 1
