"""The wheel made from the sdist installs and works. A build without a compiler says so and goes on; one of broken source, or without what
a build needs, fails and says why.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch
from setuptools import build_meta

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ["pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE", "csrc", "smattn", "kernels"]
HOME = "https://example.org/somebody/smattn"

pytestmark = pytest.mark.promise("installs")


@pytest.fixture
def source(tmp_path):
    """A copy of all that a build reads, with nothing built in it."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture
def whole(tmp_path):
    """A copy of the whole project, with nothing built in it."""
    unwanted = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache", ".hypothesis")
    return shutil.copytree(ROOT, tmp_path / "whole", ignore=unwanted)


def build_sdist(source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(source)
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    return source / "out" / build_meta.build_sdist("out")


def setup(code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run setup.py after `code`, in a process of its own."""
    run = f"{code}; import runpy; runpy.run_path('setup.py', run_name='__main__')"
    return subprocess.run([sys.executable, "-c", run, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_setuptools_that_is_too_old_is_one_line():
    result = setup("import setuptools; setuptools.__version__ = '68.2.0'", "--version")
    assert result.returncode == 1
    assert result.stderr == "building smattn needs setuptools 77 or newer, here is 68.2.0: pip install -U setuptools\n"


def test_torch_that_is_missing_is_one_line(tmp_path):
    without = "import importlib.util as u; find = u.find_spec; u.find_spec = lambda *name: None if name == ('torch',) else find(*name)"
    result = setup(without, "-q", "build_ext", "--build-lib", str(tmp_path))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.endswith("building smattn needs torch: pip install torch, then smattn with --no-build-isolation\n")


def test_the_sdist_has_everything_that_the_repository_tracks(whole, monkeypatch):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a clone")
    names = {name.partition("/")[2] for name in tarfile.open(build_sdist(whole, monkeypatch)).getnames()}
    assert set(tracked.stdout.split()) <= names


def test_an_index_page_has_addresses_and_no_link_within_the_repository(whole, monkeypatch):
    monkeypatch.setenv("SMATTN_HOME", HOME)
    with tarfile.open(build_sdist(whole, monkeypatch)) as sdist:
        (info,) = (sdist.extractfile(name).read() for name in sdist.getnames() if name.count("/") == 1 and name.endswith("PKG-INFO"))
    metadata = Parser().parsestr(info.decode())
    links = re.findall(r"\]\(([^)]+)\)", metadata.get_payload())
    assert len(links) > 10 and [link for link in links if "://" not in link] == []
    assert f"{HOME}/raw/HEAD/docs/quickstart.png" in links and f"{HOME}/blob/HEAD/docs/index.md" in links
    assert f"Source, {HOME}" in metadata.get_all("Project-URL")


TO_CONFIGURE = """
cmake_minimum_required(VERSION 3.24)
project(nothing LANGUAGES CXX)
message(STATUS "compiled by ${CMAKE_CXX_COMPILER}")
"""


def build(source: Path, **environment: str) -> str:
    """What `setup.py build` prints in a copy; fails where it fails."""
    command = [sys.executable, "setup.py", "build"]
    result = subprocess.run(command, cwd=source, env={**os.environ, **environment}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_a_later_build_takes_the_tools_at_hand_and_not_those_of_an_earlier_one(source, tmp_path):
    """pip deletes the ninja of a build of its own, whose address CMake remembers, and CXX may name another compiler."""
    (source / "CMakeLists.txt").write_text(TO_CONFIGURE)
    build(source)
    (cache,) = source.glob("build/*/CMakeCache.txt")
    cache.write_text(re.sub("(?<=CMAKE_MAKE_PROGRAM:FILEPATH=).*", str(tmp_path / "gone"), cache.read_text()))
    other = tmp_path / "another-c++"
    other.write_text('#!/bin/sh\nexec c++ "$@"\n')
    other.chmod(0o755)
    assert f"compiled by {other}" in build(source, CXX=str(other))


def test_nothing_of_an_earlier_build_is_installed(source):
    build(source, CXX="no-such-compiler")
    (package,) = source.glob("build/lib*/smattn")
    names = {path.name for path in package.iterdir()}
    for stale in ("a_module_that_was_deleted.py", "_cpu.so"):
        (package / stale).write_text("")
    build(source, CXX="no-such-compiler")
    assert {path.name for path in package.iterdir()} == names


def build_wheel(source: Path, what: str = ".", **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "wheel", "-v", what, "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", "out"]
    return subprocess.run(command, cwd=source, env={**os.environ, **environment}, capture_output=True, text=True)


def only_wheel(source: Path) -> Path:
    (wheel,) = (source / "out").glob("*.whl")
    return wheel


RUN = """
import smattn, smattn.distributed, smattn.flops, smattn.integrations, torch
q, k, v = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
mask = torch.rand(1, 3, 5, requires_grad=True)
smattn.soft_masked_attention(q, k, v, mask, 2.0).sum().backward()
assert mask.grad.count_nonzero() == mask.numel()
print(smattn.__file__, smattn.__version__, *smattn.backends()["cpu"].reasons, sep="\\n")
"""


def run_installed(wheel: Path, folder: Path) -> list[str]:
    """The output of RUN in a new environment that has this wheel. torch and its needs come from the environment of this test."""
    python = str(folder / "bin" / "python")
    install = ["pip", "--python", python, "install", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)]
    for command in (["venv", "--without-pip", str(folder)], install):
        subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # Python follows no .pth file of a folder that a .pth adds, so an editable smattn stays out.
    (site / "torch_is_there.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TRITON"))}
    command = [python, "-W", "ignore", "-c", RUN]
    return subprocess.run(command, cwd=folder, env=clean, check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.mark.slow
def test_the_wheel_made_from_the_sdist_installs_and_works(source, tmp_path, monkeypatch):
    sdist = build_sdist(source, monkeypatch)
    shutil.rmtree(source / "csrc")  # only the sdist has it now
    result = build_wheel(source, str(sdist))
    assert result.returncode == 0, result.stdout + result.stderr
    wheel = only_wheel(source)
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {f"smattn/{path.relative_to(ROOT / 'smattn')}" for path in (ROOT / "smattn").rglob("*.py")}
    modules |= {f"smattn/kernels/{path.relative_to(ROOT / 'kernels')}" for path in (ROOT / "kernels").rglob("*.py")}
    assert names == modules | {"smattn/_cpu.so", "smattn/py.typed", "smattn/kernels/tiles.csv"}
    file, version, *reasons = run_installed(wheel, tmp_path / "site")
    assert Path(file).is_relative_to(tmp_path / "site") and version == wheel.name.split("-")[1] and reasons == []


@pytest.mark.slow
def test_a_missing_compiler_is_said_and_forgiven(source, tmp_path):
    result = build_wheel(source, CXX="no-such-compiler")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "NOT built, not found: a C++ compiler (no-such-compiler)" in result.stdout + result.stderr
    file, _, *reasons = run_installed(only_wheel(source), tmp_path / "site")
    said = " ".join(reasons)
    assert Path(file).is_relative_to(tmp_path / "site")
    assert "was not built when smattn was installed" in said and "pip install --no-build-isolation" in said


@pytest.mark.slow
def test_a_compile_error_fails_the_installation(source):
    with open(source / "csrc" / "philox.h", "a") as header:
        header.write("\nthis is not C++\n")
    result = build_wheel(source)
    assert result.returncode != 0
    assert "philox.h" in result.stdout + result.stderr
