"""2^x of every set of CPU kernels that this machine runs, compared with numpy's long double, and the P that backward makes by it."""

import platform

import numpy as np
import pytest
import torch

from smattn import soft_masked_attention
from tests.support.cpu_kernels import KERNELS, forced
from tests.support.odd_weights import assert_weights_of_nearly_uniform_rows

pytestmark = pytest.mark.promise("CPU kernels")
# The bound in units of the last place is derived at f = -1/2, where the result, 0.71, is smallest against the unit. The last step of
# Horner's rule, 1 + f * q, rounds by 0.5. Rounding q = 0.59 by half a unit gives 0.25, because f halves it. Earlier steps give 0.03 and
# the polynomial itself, 1e-8, gives 0.17: together 0.95.
FUSED = 1.1
# Where a step is a product and a sum, rounding f * q = 0.29 adds 0.25, and the step before adds 0.03.
IN_TWO_ROUNDINGS = 1.3
BOUND = {name: IN_TWO_ROUNDINGS if name == "baseline" and platform.machine() == "x86_64" else FUSED for name in KERNELS}
DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


def exp2(x: np.ndarray) -> np.ndarray:
    y = torch.empty(x.shape, dtype=torch.from_numpy(x).dtype)
    torch.ops.smattn_cpu.exp2(torch.from_numpy(x), y)
    return y.numpy()


def dense(dtype, lowest, highest):
    """A million numbers over the whole range, and a million around 0 with every exponent."""
    rng = np.random.default_rng(0)
    over_the_range = rng.uniform(lowest, highest, 1_000_000)
    near_0 = rng.choice([-1.0, 1.0], 1_000_000) * np.exp2(rng.uniform(-30, 3, 1_000_000))
    return np.concatenate([over_the_range, near_0, np.arange(-8, 8, 1 / 65536)]).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("name", KERNELS)
def test_error_in_units_of_the_last_place(name, dtype):
    info = np.finfo(dtype)
    x = dense(dtype, info.minexp, info.maxexp)
    with forced(name):
        y = exp2(x)
    exact = np.exp2(x.astype(np.longdouble))
    with np.errstate(over="ignore"):
        finite = np.isfinite(exact.astype(dtype))
    error = np.abs(y[finite] - exact[finite]) / np.spacing(exact[finite].astype(dtype))
    assert error.max() <= BOUND[name], f"{error.max():.3f} at {x[finite][error.argmax()]!r}"
    assert error.max() > 0.5  # the measurement does see rounding


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("name", KERNELS)
def test_whole_numbers_and_what_is_out_of_range(name, dtype):
    info = np.finfo(dtype)
    whole = np.arange(info.minexp, info.maxexp, dtype=dtype)
    too_large = np.array([info.maxexp, 2 * info.maxexp, 1e9, 1e30, info.max, np.inf], dtype=dtype)
    too_small = np.array([2 * info.minexp, -1e9, -1e30, info.min, -np.inf], dtype=dtype)
    subnormal = np.linspace(info.minexp - info.nmant, info.minexp, 1000, dtype=dtype)
    with forced(name):
        np.testing.assert_array_equal(exp2(whole), np.ldexp(dtype(1), whole.astype(int)))
        np.testing.assert_array_equal(exp2(too_large), np.inf)
        np.testing.assert_array_equal(exp2(too_small), 0)
        assert np.all(exp2(np.array([0.0, -0.0, info.tiny, -info.tiny], dtype=dtype)) == 1)
        assert np.all((exp2(subnormal) >= 0) & (exp2(subnormal) <= info.tiny))


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("name", KERNELS)
def test_a_nan_stays_in_its_lane_and_every_length_works(name, dtype):
    x = np.linspace(-5, 5, 70, dtype=dtype)
    with forced(name):
        whole = exp2(x)
        for n in range(70):
            np.testing.assert_array_equal(exp2(x[:n].copy()), whole[:n])
            holed = x.copy()
            holed[n] = np.nan
            y = exp2(holed)
            assert np.isnan(y[n]) and np.array_equal(np.delete(y, n), np.delete(whole, n))


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("name", KERNELS)
def test_every_nan_stays_one(name, dtype):
    """Whatever its lowest bits, which of other numbers become the exponent, and its sign."""
    quiet = np.array([np.nan], dtype=dtype).view(f"i{np.dtype(dtype).itemsize}")
    bits = quiet + np.arange(4096, dtype=quiet.dtype)
    with forced(name):
        assert np.isnan(exp2(np.concatenate([bits, bits | np.iinfo(bits.dtype).min]).view(dtype))).all()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("size, seed", [(1e-3, 0), (1e-3, 1), (0.1, 2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_weights_of_nearly_uniform_rows(name, dtype, size, seed):
    with forced(name):
        assert_weights_of_nearly_uniform_rows("cpu", dtype, size=size, seed=seed)


@pytest.mark.parametrize("name", KERNELS)
def test_very_low_scores_lose_no_weight(name):
    """However low the scores of a row are, a weight that float32 can hold is no 0 in backward."""
    value = torch.randn(1, 1, 64, 8, requires_grad=True)
    mask = torch.full((1, 1, 64), -44.0)
    mask[..., 5] = -88.0
    with forced(name):
        soft_masked_attention(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 64, 8), value, mask, 1.0, backend="cpu").sum().backward()
    torch.testing.assert_close(value.grad[0, 0, :, 0], mask[0, 0].softmax(-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", KERNELS)
def test_weights_that_products_read_as_bfloat16(name):
    """Their 2^x is another polynomial where the processor multiplies bfloat16. lse tells the weight of a key beside one of weight 1."""
    mask = torch.zeros(1, 5000, 2)
    mask[0, :, 1] = -torch.linspace(0, 0.6931, 5000)  # all fractions of a power of two
    query, keys = torch.zeros(1, 1, 5000, 8, dtype=torch.bfloat16), torch.zeros(1, 1, 2, 8, dtype=torch.bfloat16)
    with forced(name):
        _, lse = soft_masked_attention(query, keys, keys, mask, 1.0, return_lse=True, backend="cpu")
    weight, exact = lse[0, 0].double().expm1(), mask[0, :, 1].double().exp()
    rounding_of_lse = 2.0**-25 * 3  # at most 3 times as much of the weight
    assert ((weight - exact) / exact).abs().max() <= 2.8e-7 + 2 * rounding_of_lse
