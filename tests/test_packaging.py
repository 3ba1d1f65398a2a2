"""Installing smattn: the wheel, and the three ways a build can go: built, tools missing (said, forgiven), source broken (fails)."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE", "csrc", "smattn", "kernels"]

pytestmark = pytest.mark.slow


@pytest.fixture
def source(tmp_path):
    """A copy of what a build reads, without anything built."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


def build_wheel(source: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "wheel", "-v", ".", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", "out"]
    return subprocess.run(command, cwd=source, env={**os.environ, **environment}, capture_output=True, text=True)


def only_wheel(source: Path) -> Path:
    (wheel,) = (source / "out").glob("*.whl")
    return wheel


def run_unpacked(wheel: Path, folder: Path, code: str) -> str:
    """What `code` prints in a fresh process that finds smattn only in the unpacked wheel."""
    zipfile.ZipFile(wheel).extractall(folder)
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_the_wheel_holds_the_package_and_works(source, tmp_path):
    result = build_wheel(source)
    assert result.returncode == 0, result.stdout + result.stderr
    wheel = only_wheel(source)
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {f"smattn/{path.relative_to(ROOT / 'smattn')}" for path in (ROOT / "smattn").rglob("*.py")}
    modules |= {f"smattn/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert names == modules | {"smattn/_C.so", "smattn/py.typed"}
    code = "import smattn, smattn.native; print(smattn.native.reasons(), smattn.__file__)"
    assert run_unpacked(wheel, tmp_path / "site", code) == f"[] {tmp_path / 'site' / 'smattn' / '__init__.py'}"


def test_a_missing_compiler_is_said_and_forgiven(source, tmp_path):
    result = build_wheel(source, CXX="no-such-compiler")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "NOT built, not found: a C++ compiler (no-such-compiler)" in result.stdout + result.stderr
    code = "import smattn.native; print(*smattn.native.reasons(), sep='\\n')"
    said = run_unpacked(only_wheel(source), tmp_path / "site", code)
    assert "was not built when smattn was installed" in said and "pip install --no-build-isolation" in said


def test_a_compile_error_fails_the_installation(source):
    with open(source / "csrc" / "philox.h", "a") as header:
        header.write("\nthis is not C++\n")
    result = build_wheel(source)
    assert result.returncode != 0
    assert "philox.h" in result.stdout + result.stderr
