"""The CUDA kernels through the real compiler, without a GPU: no register spills, tensor cores and 16-byte copies in the machine code."""

import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from smattn import cuda
from smattn.library import why_not_loaded
from tests.support.emulated_cuda import build

ARCHS = ["sm_80", "sm_90a"]
TENSOR_CORE = {
    "4HalfE": r"HMMA\.16816\.F32 ",
    "8BFloat16E": r"HMMA\.16816\.F32\.BF16 ",
    "8Tf32MathE": r"HMMA\.1688\.F32\.TF32 ",
    "9FloatMathE": r"FFMA ",
}
HEAD_SIZES = (32, 64, 128, 256)
TILED = ("Forward", "BackwardKeys", "BackwardQueries")  # the kernels that multiply

pytestmark = [
    pytest.mark.promise("CUDA kernels"),
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc here"),
]


def dump(library, option):
    """For each arch and kernel, what cuobjdump says of it."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = pytest.importorskip("triton")  # its wheel contains cuobjdump
        tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    text = subprocess.run([tool, option, str(library)], check=True, capture_output=True, text=True).stdout
    found = defaultdict(dict)
    for image in text.split("Fatbin elf code:")[1:]:
        arch = re.search(r"arch = (\w+)", image)[1]
        for function in re.split(r"Function ?:? ", image)[1:]:
            found[arch][re.match(r"\w+", function)[0]] = function
    return found


@pytest.fixture(scope="module")
def library():
    """Every kernel for both architectures, built as an installation with -DSMATTN_CUDA=ON builds them. The first time takes minutes."""
    return build("cuda-compiled", "-DSMATTN_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(f'{arch[3:]}-real' for arch in ARCHS)}")


def tiled(names):
    return [name for name in names if any(f"{kind}Kernel" in name for kind in TILED)]


def test_every_kernel_is_there_and_none_spills_registers(library):
    usage = dump(library, "-res-usage")
    assert set(usage) == set(ARCHS)
    for arch, kernels in usage.items():
        for math in TENSOR_CORE:
            for D in HEAD_SIZES:
                for kind in TILED:
                    assert any(f"{kind}Kernel" in name and math in name and f"Li{D}E" in name for name in kernels), (arch, kind, math, D)
        bad = {name: text for name, text in kernels.items() if not re.search(r"REG:\d+ STACK:0 .*LOCAL:0 ", text)}
        assert bad == {}, arch


def test_tensor_cores_multiply_and_copies_are_of_16_bytes(library):
    for arch, kernels in dump(library, "-sass").items():
        assert len(tiled(kernels)) >= len(TENSOR_CORE) * len(HEAD_SIZES) * len(TILED), arch
        for name in tiled(kernels):
            code, (math,) = kernels[name], [math for math in TENSOR_CORE if math in name]
            assert re.search(TENSOR_CORE[math], code), (arch, name)
            assert "LDGSTS.E.BYPASS.128" in code and "LDGDEPBAR" in code, (arch, name)  # copies are asynchronous and waited for in groups
            assert ("LDSM.16.M88.4" in code) == (math in ("4HalfE", "8BFloat16E")), (arch, name)
            assert ("HMMA" in code) == (math != "9FloatMathE"), (arch, name)  # float32 is IEEE unless TF32 is allowed
            assert not re.search(r"(?<![.\w])(LDL|STL|RED|ATOM\w*)\b", code), (arch, name)  # no spill, no atomic
            if "Forward" in name:
                assert re.search(r"\bSTG?\.E\.128", code), (arch, name)


def test_it_loads_into_a_torch_without_cuda_and_takes_nothing_from_it_but_the_stable_abi(library, monkeypatch):
    symbols = subprocess.run(["nm", "-DC", "--undefined-only", str(library)], check=True, capture_output=True, text=True).stdout
    assert "aoti_torch_" in symbols and not re.search(r"\b(at|c10|torch)::", symbols)
    monkeypatch.setattr(cuda, "LIBRARY", cuda.LIBRARY._replace(path=library))
    assert why_not_loaded(cuda.LIBRARY) == () and hasattr(torch.ops.smattn_cuda, "forward")
    if not torch.cuda.is_available():
        assert cuda.machine.absence() == ("torch finds no CUDA device",)
