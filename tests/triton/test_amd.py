"""AMD's chips: what torch says of one is not read as NVIDIA's, no descriptors are made for it, and the kernels compile without spills."""

from __future__ import annotations

import json
import re
import types

import pytest
import torch

from smattn import canonical, cuda
from smattn.kernels import backend, chip
from smattn.kernels.tiles import HEAD_SIZES, TABLE, find
from tests.triton.test_aot import without_interpreter

pytestmark = pytest.mark.promise("Triton kernels")
ROWS = re.compile(r"^(\w+) +(gfx\w+) +(\w+) +D=(\d+) .* (\d+) regs +(\d+) scratch +(\d+) mfma +(\d+) shared *(.*)$", re.MULTILINE)


@pytest.fixture
def rocm(monkeypatch):
    """A torch for ROCm, which must not be asked for a compute capability. The value is the device's properties."""
    device = types.SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.version, "hip", "6.4.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: pytest.fail("a ROCm device has no compute capability"))
    return device


@pytest.mark.parametrize(
    "name, number", [("gfx90a:sramecc+:xnack-", 910), ("gfx942", 942), ("gfx950:sramecc+", 950), ("gfx1100", 1100), ("gfx908", 908)]
)
def test_a_chip_is_known_by_its_name_and_reads_amds_lines(rocm, name, number):
    rocm.gcnArchName = name
    assert chip._number.__wrapped__(torch.device("cuda")) == number and chip.generation(number) == 942


def test_backends_say_what_they_can_do_on_rocm_without_a_compute_capability(rocm, monkeypatch):
    problem = types.SimpleNamespace(dtype=torch.float16, D=64, Dv=64, device_type="cuda")
    monkeypatch.setattr(backend.triton.knobs.runtime, "interpret", False)
    assert backend.unsupported_reasons(problem) == []
    monkeypatch.setattr(cuda.library, "why_not_loaded", lambda _: ())
    assert cuda._why_no_gpu() == ("it runs on NVIDIA GPUs, and this torch is built for ROCm",)


def test_products_are_never_tf32_on_rocm(rocm, monkeypatch):
    monkeypatch.setattr(canonical, "_torch_allows_tf32", lambda: True)
    query = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    assert not canonical.allow_tf32(query)
    monkeypatch.setattr(torch.version, "hip", None)
    assert canonical.allow_tf32(query)


def test_no_tile_asks_for_descriptors():
    found = [
        find(kernel, call, number, size, head)
        for number in (910, 942, 950, 1100)
        for kernel in {key.kernel for key in TABLE}
        for call in ("plain", "extras", "map", "ragged", "small")
        for size in (2, 4)
        for head in HEAD_SIZES
    ]
    assert any(found) and not any(tile.tma for tile in found if tile)


FEW_AND_MANY = """
import json, torch
from smattn.kernels.tools import amd, jobs
rows = [row for Nq in (13, 1045) for row in amd.compile_job("gfx942", jobs.Job(942, torch.float16, 64, Nq, jobs.PLAIN))]
broken = [row._replace(**change).failure() for row in rows for change in (dict(scratch=8), dict(shared=2**17), dict(instructions=0))]
print(json.dumps([[row.failure() for row in rows], [row.products for row in rows], broken]))
"""


@pytest.mark.slow
def test_the_checks_can_fail():
    result = without_interpreter("-c", FEW_AND_MANY)
    assert result.returncode == 0, result.stderr
    failures, products, broken = json.loads(result.stdout)
    assert set(failures) == {""} and any(products)
    for i, has_products in enumerate(products):
        assert broken[3 * i : 3 * i + 3] == [
            "spills 8 bytes", "131072 bytes of shared memory, the chip has 65536", "no matrix instruction" if has_products else ""
        ]  # fmt: skip


@pytest.mark.slow
def test_a_sample_of_every_kernel_compiles_for_gfx942():
    """A sixth of what `make aot` compiles, which takes minutes."""
    result = without_interpreter("-m", "smattn.kernels.tools.amd", "--every", "6")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    rows = [match.groups() for match in ROWS.finditer(result.stdout)]
    assert len(rows) == int(re.search(r"^(\d+) kernels compiled for gfx942, 0 failed$", result.stdout, re.MULTILINE)[1])
    assert {row[0] for row in rows} >= {"forward", "partial", "merge", "delta", "few_queries", "dkdv", "dq", "dmask", "map", "map_means"}
    assert all(row[5] == "0" and int(row[7]) <= 65_536 for row in rows)
