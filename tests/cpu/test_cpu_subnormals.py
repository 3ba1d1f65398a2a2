"""The CPU kernels make and take no subnormal number that no result needs: on an Intel processor each costs hundreds of cycles."""

import ctypes
import platform

import pytest
import torch

from smattn import attention_map, soft_masked_attention
from smattn.testing import make_case
from tests.support.cpu_kernels import KERNELS, forced, threads

pytestmark = [
    pytest.mark.promise("CPU kernels"),
    pytest.mark.skipif(platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc", reason="reads MXCSR as glibc lays it out"),
]

DENORMAL, UNDERFLOW = 0x02, 0x10  # what MXCSR remembers of this thread's operations
ALL_FLAGS = 0x3F


class Environment(ctypes.Structure):
    """glibc's fenv_t."""

    _fields_ = (("x87", ctypes.c_uint8 * 28), ("mxcsr", ctypes.c_uint32))


def clear_flags() -> None:
    environment, libm = Environment(), ctypes.CDLL("libm.so.6")
    libm.fegetenv(ctypes.byref(environment))
    environment.mxcsr &= ~ALL_FLAGS
    libm.fesetenv(ctypes.byref(environment))


def flags() -> int:
    environment = Environment()
    ctypes.CDLL("libm.so.6").fegetenv(ctypes.byref(environment))
    return environment.mxcsr & (DENORMAL | UNDERFLOW)


def test_the_flags_tell_of_an_underflow():
    tiny = torch.full((64,), 1e-30)
    clear_flags()
    assert flags() == 0
    tiny * tiny
    assert flags() == UNDERFLOW
    clear_flags()


def out_of_reach(case):
    """Every seventh key lies so far below the others that its weights are 0."""
    far = case.mask.clone()
    far[..., ::7] = -1000.0
    return far


# 13 queries leave lanes of their vectors empty, and 301 keys are no whole number of anything.
@pytest.mark.parametrize("mask_of", [lambda case: case.mask, out_of_reach], ids=["near", "some keys out of reach"])
@pytest.mark.parametrize("logits", [False, True], ids=["mask", "logits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_normal_weights_make_no_subnormal_number(name, dtype, logits, mask_of):
    case = make_case(1, 2, 13, 301, 32, dtype=dtype, mask_dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    mask = mask_of(case)
    inputs = [t.detach().requires_grad_() for t in (case.query, case.key, case.value, mask, case.alpha)]
    query, key, value, mask, alpha = inputs
    soft = dict(mask_logits=mask) if logits else dict(mask=mask)
    # The conversion to halves tells of those that are subnormal, which are wanted and cost nothing.
    unwanted = DENORMAL if dtype == torch.float16 else DENORMAL | UNDERFLOW
    with forced(name), threads(1):
        clear_flags()
        out = soft_masked_attention(query, key, value, alpha=alpha, backend="cpu", **soft)
        torch.autograd.grad(out, inputs, case.dout)
        assert flags() & unwanted == 0
        amap = attention_map(query, key, alpha=alpha, backend="cpu", **soft)
        torch.autograd.grad(amap, [query, key, mask, alpha], torch.ones_like(amap))
        assert flags() & unwanted == 0


@pytest.mark.parametrize("Nk", [301, 30001], ids=["rows", "tiles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_probabilities_of_every_size_make_no_subnormal_number_in_the_map(name, dtype, Nk):
    """They fall from key to key until they are 0; what a head adds to the map is normal or 0 as well."""
    case = make_case(1, 6, 70, Nk, 8, dtype=dtype, as_map=True)
    mask = torch.linspace(0, -4 if dtype == torch.float32 else -25, Nk, dtype=dtype).expand(1, 1, Nk)
    with forced(name), threads(1):
        clear_flags()
        attention_map(0.01 * case.query, case.key, mask, 32.0, backend="cpu")
        assert flags() == 0
