"""`python -m smattn` prints the first lines of a bug report: what there is, and why the rest is missing."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import smattn
from smattn import __main__ as report
from smattn.backends import TABLE

pytestmark = pytest.mark.promise("installs")
RUN = "import runpy; runpy.run_module('smattn', run_name='__main__')"


def printed(*arguments: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, *arguments], env=clean, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_report_has_every_version_and_every_backend_with_its_reasons():
    said = printed("-m", "smattn")
    smattn.backends()  # which loads the library here as well
    for version in (smattn.__version__, torch.__version__, ".".join(map(str, sys.version_info[:3]))):
        assert version in said
    for row in TABLE:
        assert f"backend    {row.name}: " in said
    assert "backend    reference: available" in said
    if "backend    cpu: available" in said:
        assert f"- kernels {torch.ops.smattn_cpu.cpu_kernels_reason()}; it also runs" in said


def test_without_triton_and_without_the_extension_the_report_says_why():
    modules = ["triton", *(row.module for row in TABLE if row.name in ("cpu", "cuda"))]
    said = printed("-c", f"import sys; sys.modules.update(dict.fromkeys({modules})); {RUN}")
    assert "triton     not there" in said and said.count("it could not be imported") == 3
    assert "backend    cpu: not available" in said and "backend    reference: available" in said


def test_the_report_names_every_gpu(monkeypatch: pytest.MonkeyPatch):
    gpu = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(report, "backends", dict)
    devices = [line.split(None, 1)[1] for line in report.report() if line.startswith("device")]
    assert devices == [f"cuda:{i} NVIDIA H100, compute capability 9.0, 80.0 GiB, 132 multiprocessors" for i in range(2)]


def test_the_report_names_an_amd_gpu_by_its_chip(monkeypatch: pytest.MonkeyPatch):
    """torch for ROCm has a major and a minor as well, 9 and 4, but no compute capability."""
    chip = dict(gcnArchName="gfx942:sramecc+:xnack-", major=9, minor=4)
    gpu = SimpleNamespace(name="AMD Instinct MI300X", **chip, total_memory=192 << 30, multi_processor_count=304)
    monkeypatch.setattr(torch.version, "hip", "6.4.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(report, "backends", dict)
    said = list(report.report())
    assert f"torch      {torch.__version__}, ROCm 6.4.0" in said
    assert "device     cuda:0 AMD Instinct MI300X, gfx942:sramecc+:xnack-, 192.0 GiB, 304 multiprocessors" in said
