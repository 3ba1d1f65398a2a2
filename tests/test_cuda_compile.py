"""The CUDA kernels through the real compiler, without a GPU: no register spills, tensor cores and 16-byte copies in the machine code."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

INSTANCES = sorted((Path(__file__).resolve().parents[1] / "csrc" / "cuda" / "instances").glob("*.cu"))
ARCHS = ["80", "90a"]
TENSOR_CORE = {"half": "HMMA.16816.F32 ", "bfloat": "HMMA.16816.F32.BF16", "tf32": "HMMA.1688.F32.TF32", "float": None}
TILED = ("Forward", "BackwardKeys", "BackwardQueries")  # the kernels that multiply
SHARED_LIMIT = 99 * 1024  # bytes a block may have on compute capability 8.6, 8.9 and 12.0

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc here")]


def disassembler():
    if path := shutil.which("cuobjdump"):
        return path
    triton = pytest.importorskip("triton")
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


@pytest.fixture(scope="module", params=[(path, arch) for path in INSTANCES for arch in ARCHS], ids=lambda p: f"{p[0].stem}-sm_{p[1]}")
def compiled(request, tmp_path_factory):
    """ptxas' report and the machine code of an instance: kernel -> text."""
    path, arch = request.param
    cubin = tmp_path_factory.mktemp("cubin") / f"{path.stem}.cubin"
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    options = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-Werror", "all-warnings", target]
    result = subprocess.run(["nvcc", *options, "-cubin", str(path), "-o", str(cubin)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    sass = subprocess.run([disassembler(), "-sass", str(cubin)], check=True, capture_output=True, text=True).stdout
    report = re.split(r"Compiling entry function ", result.stderr)[1:]
    code = re.split(r"Function : ", sass)[1:]
    return path.stem.split("_")[0], {kernel(text): text for text in report}, {kernel(text): text for text in code}


def kernel(text):
    return re.search(r"(\w+?Kernel)I[^']*?EvNT_", text.split("\n")[0])[0]


def test_nothing_is_spilled(compiled):
    _, reports, _ = compiled
    assert len(reports) >= 6
    for name, report in reports.items():
        spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        assert spills and spills.groups() == ("0", "0", "0"), f"{name}: {spills and spills[0]}"


def test_tensor_cores_multiply_and_copies_are_of_16_bytes(compiled):
    dtype, _, codes = compiled
    tiled = {name: code for name, code in codes.items() if any(f"{kind}Kernel" in name for kind in TILED)}
    assert len(tiled) >= 4
    for name, code in tiled.items():
        assert "LDGSTS.E.BYPASS.128" in code, name
        if TENSOR_CORE[dtype] is None:
            assert "HMMA" not in code and "FFMA" in code, name  # IEEE float32 has no tensor core
        else:
            assert TENSOR_CORE[dtype] in code, name
        if dtype in ("half", "bfloat"):
            assert "LDSM.16.M88.4" in code, name


def test_results_leave_16_bytes_at_a_time(compiled):
    _, _, codes = compiled
    storing = [code for name, code in codes.items() if "ForwardKernel" in name or "BackwardQueriesKernel" in name]
    assert storing and all(re.search(r"STG\.E\.128|ST\.E\.128", code) for code in storing)
