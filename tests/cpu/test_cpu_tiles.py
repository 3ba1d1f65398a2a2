"""The matrix tiles of AMX, their double in software, and what happens where the system refuses them."""

import subprocess
import sys

import pytest
import torch

from tests.support.cpu_kernels import KERNELS

pytestmark = pytest.mark.promise("CPU kernels")
needs_pairs = pytest.mark.skipif("avx512bf16" not in KERNELS, reason="this processor has no instructions for bfloat16")
needs_tiles = pytest.mark.skipif("amx" not in KERNELS, reason="this processor has no matrix tiles")


def operands(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """a (16, 32), b as (16, 16, 2) and a sum (16, 16): numbers alike, of any size, or of any bits."""
    torch.manual_seed(seed)
    a, b, total = torch.randn(16, 32), torch.randn(16, 16, 2), torch.randn(16, 16)
    if seed % 3 == 1:
        a, b, total = (t * torch.randint(-63, 63, t.shape).float().exp2() for t in (a, b, total))
    if seed % 3 == 2:
        a, b, total = (torch.randint(-(2**31), 2**31 - 1, t.shape).int().view(torch.float32) for t in (a, b, total))
    return a.bfloat16(), b.bfloat16(), total


def product(a, b, total, in_software):
    total = total.clone()
    ran = torch.ops.smattn_cpu.tile_product(a, b, total, in_software)
    return total if ran else None


@needs_pairs
@pytest.mark.parametrize("seed", range(0, 30, 3))
def test_the_double_multiplies(seed):
    a, b, total = operands(seed)
    columns = b.double().permute(0, 2, 1).reshape(32, 16)  # b[k / 2][n][k % 2] as [k][n]
    exact = total.double() + a.double() @ columns
    magnitude = total.double().abs() + a.double().abs() @ columns.abs()
    assert ((product(a, b, total, True) - exact).abs() <= 2e-6 * magnitude).all()


@needs_tiles
@pytest.mark.parametrize("seed", range(300))
def test_tiles_and_their_double_give_the_same_bits(seed):
    a, b, total = operands(seed)
    in_tiles = product(a, b, total, False)
    if in_tiles is None:
        pytest.skip("built with SMATTN_AMX=EMULATED")
    torch.testing.assert_close(in_tiles, product(a, b, total, True), rtol=0, atol=0, equal_nan=True)


REFUSED = """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = (("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))
memory = ctypes.create_string_buffer(8192)  # for signals: too small for the tiles, so that Linux refuses them
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, len(memory))), None) == 0
import smattn, torch
from smattn.testing import assert_within_budget, make_case, run
case = make_case(1, 2, 13, 300, 32, dtype=torch.bfloat16)
assert_within_budget(run(case, "cpu"), case)
print(torch.ops.smattn_cpu.cpu_kernels())
print(*smattn.backends()["cpu"].notes)
"""


@needs_tiles
def test_where_the_system_refuses_tiles_the_next_set_runs_and_says_why():
    if "software" in torch.ops.smattn_cpu.cpu_kernels_reason():
        pytest.skip("built with SMATTN_AMX=EMULATED")
    result = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    kernels, note = result.stdout.splitlines()
    assert kernels.split() == KERNELS[1:]
    assert note.startswith(f"kernels {KERNELS[1]}: ") and "arch_prctl" in note
