"""Small Triton kernels that try the emulator's units one by one, with what torch computes in their place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from smattn.kernels.tiles import Tile


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, out_ptr, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + m[:, None] * stride_am + k[None, :] * stride_ak, mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)
        b = tl.load(b_ptr + k[:, None] * stride_bk + n[None, :] * stride_bn, mask=(k[:, None] < K) & (n[None, :] < N), other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(out_ptr + m[:, None] * N + n[None, :], acc, mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def two_products_kernel(a_ptr, b_ptr, out_ptr, R: tl.constexpr, C: tl.constexpr):
    """(a b^T) b: the first product's result is an operand of the second, by way of registers."""
    r, c = tl.arange(0, R), tl.arange(0, C)
    a, b = tl.load(a_ptr + r[:, None] * C + c[None, :]), tl.load(b_ptr + r[:, None] * C + c[None, :])
    s = tl.dot(a, tl.trans(b))
    tl.store(out_ptr + r[:, None] * C + c[None, :], tl.dot(s.to(b.dtype), b))


@triton.jit
def described_matmul_kernel(a, b, out_ptr, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, M, N):
    """a b^T of two descriptors."""
    start_m = tl.program_id(0) * BLOCK_M
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        acc = tl.dot(a.load([start_m, start]), tl.trans(b.load([0, start])), acc)
    m, n = start_m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    tl.store(out_ptr + m[:, None] * N + n[None, :], acc, mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def rows_kernel(x_ptr, softmax_ptr, largest_ptr, total_ptr, least_ptr, C, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * C + c, mask=c < C, other=float("-inf"))
    e = tl.exp(x - tl.max(x, 0))
    tl.store(softmax_ptr + row * C + c, e / tl.sum(e, 0), mask=c < C)
    whole = tl.where(c < C, (x * 100).to(tl.int32), 0)
    tl.store(largest_ptr + row, tl.max(whole, 0))
    tl.store(least_ptr + row, tl.min(whole, 0))
    tl.store(total_ptr + row, tl.sum(tl.where(c < C, x, 0.0), 0))


@triton.jit
def transpose_kernel(x_ptr, out_ptr, R: tl.constexpr, C: tl.constexpr):
    r, c = tl.arange(0, R), tl.arange(0, C)
    x = tl.load(x_ptr + r[:, None] * C + c[None, :])
    tl.store(out_ptr + c[:, None] * R + r[None, :], tl.trans(x))


@triton.jit
def numbers_kernel(i_ptr, f_ptr, ints_ptr, floats_ptr, N, BLOCK: tl.constexpr):
    """Integer and floating-point instructions of which the others have none."""
    at = tl.arange(0, BLOCK)
    ok = at < N
    i, f = tl.load(i_ptr + at, mask=ok, other=1).to(tl.int32), tl.load(f_ptr + at, mask=ok, other=1.0)
    word, _, _, _ = tl.philox(7, at, i, 3, 4)
    values = (i // 7, i % 7, (i * 1234567) >> 5, i ^ (i << 3), (i.to(tl.int64) * i >> 20).to(tl.int32), word.to(tl.int32, bitcast=True),
              tl.minimum(i, 5), f.to(tl.int32))  # fmt: skip
    for k in tl.static_range(8):
        tl.store(ints_ptr + k * N + at, values[k], mask=ok)
    rounded = f.to(tl.float16).to(tl.float32), f.to(tl.bfloat16).to(tl.float32)
    results = (tl.exp2(f), tl.log2(tl.abs(f)), tl.sqrt(tl.abs(f)), 1.0 / f, rounded[0], rounded[1],
               tl.maximum(f, 0.5), i.to(tl.float32) * f + 1.5)  # fmt: skip
    for k in tl.static_range(8):
        tl.store(floats_ptr + k * N + at, results[k], mask=ok)


class Trial(NamedTuple):
    name: str
    kernel: Any
    programs: int
    arguments: dict[str, Any]
    warps: int
    stages: int
    outputs: dict[str, Tensor]  # argument -> what it is to hold
    tolerance: float

    def tile(self) -> Tile:
        return Tile(block_m=16, block_n=16, warps=self.warps, stages=self.stages)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def matmuls() -> Iterator[Trial]:
    sizes = [
        (100, 50, 70, 64, 64, 32, 4, 3), (33, 17, 129, 32, 32, 64, 4, 1),
        (150, 100, 64, 128, 128, 64, 8, 2), (16, 16, 16, 16, 16, 16, 1, 1),
    ]  # fmt: skip
    kinds = [(torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")]
    for (M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, warps, stages), (dtype, precision) in ((s, k) for s in sizes for k in kinds):
        for transposed in (False, True):
            a, b = normal(M, K, dtype=dtype), normal(N, K, dtype=dtype, seed=1).T if transposed else normal(K, N, dtype=dtype, seed=1)
            arguments = dict(
                a_ptr=a, b_ptr=b, out_ptr=torch.empty(M, N), M=M, N=N, K=K, stride_am=a.stride(0), stride_ak=a.stride(1),
                stride_bk=b.stride(0), stride_bn=b.stride(1), BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, PRECISION=precision,
            )  # fmt: skip
            exact = (a.double() @ b.double()).float()
            name = f"matmul {M}x{N}x{K} {str(dtype)[6:]} {precision} w{warps}{' b transposed' if transposed else ''}"
            tolerance = 4e-2 if precision == "tf32" else 5e-5
            yield Trial(name, matmul_kernel, -(-M // BLOCK_M), arguments, warps, stages, {"out_ptr": exact}, tolerance)
    for dtype, (R, C, warps) in ((dtype, size) for dtype in (torch.float16, torch.bfloat16) for size in ((64, 32, 4), (128, 128, 8))):
        a, b = normal(R, C, dtype=dtype), normal(R, C, dtype=dtype, seed=1)
        exact = (a.double() @ b.double().T).to(dtype).double() @ b.double()
        arguments = dict(a_ptr=a, b_ptr=b, out_ptr=torch.empty(R, C), R=R, C=C)
        yield Trial(f"two products {R}x{C} {str(dtype)[6:]}", two_products_kernel, 1, arguments, warps, 1, {"out_ptr": exact.float()}, 2.0)


def descriptors() -> Iterator[Trial]:
    for dtype, (BLOCK_K, warps, stages) in ((d, s) for d in (torch.float16, torch.bfloat16) for s in ((64, 4, 1), (32, 4, 3), (16, 8, 2))):
        M, N, K = 100, 40, 96
        a, b = normal(M, K, dtype=dtype), normal(N, K, dtype=dtype, seed=1)
        blocks = [TensorDescriptor(x, list(x.shape), [K, 1], [rows, BLOCK_K]) for x, rows in ((a, 64), (b, 64))]
        arguments = dict(a=blocks[0], b=blocks[1], out_ptr=torch.empty(M, N), K=K, BLOCK_M=64, BLOCK_N=64, BLOCK_K=BLOCK_K, M=M, N=N)
        exact = (a.double() @ b.double().T).float()
        name = f"descriptors k{BLOCK_K} {str(dtype)[6:]} w{warps}"
        yield Trial(name, described_matmul_kernel, 2, arguments, warps, stages, {"out_ptr": exact}, 5e-5)


def others() -> Iterator[Trial]:
    for C, warps in ((1, 1), (33, 1), (100, 4), (1000, 8)):
        x = normal(5, C)
        out = dict(
            softmax_ptr=x.softmax(1), largest_ptr=(x * 100).long().clamp_min(0 if C & (C - 1) else -1000).amax(1),
            least_ptr=(x * 100).long().clamp_max(0 if C & (C - 1) else 1000).amin(1), total_ptr=x.sum(1),
        )  # fmt: skip
        arguments = dict(x_ptr=x, C=C, BLOCK=triton.next_power_of_2(C), **{name: torch.empty_like(t) for name, t in out.items()})
        yield Trial(f"rows of {C}", rows_kernel, 5, arguments, warps, 1, out, 1e-5)
    for (R, C), dtype, warps in (((32, 64), torch.float32, 4), ((64, 16), torch.float16, 2), ((16, 16), torch.uint8, 1)):
        x = (normal(R, C) * 50).to(dtype)
        arguments = dict(x_ptr=x, out_ptr=torch.empty(C, R, dtype=dtype), R=R, C=C)
        yield Trial(f"transpose {R}x{C} {str(dtype)[6:]}", transpose_kernel, 1, arguments, warps, 1, {"out_ptr": x.T}, 0.0)
    yield _numbers()


def _numbers() -> Trial:
    N = 100
    i = torch.randint(-(2**20), 2**20, (N,), generator=torch.Generator().manual_seed(3))
    f = normal(N, seed=4) * 3
    towards_zero = (i.double() / 7).trunc().long()
    ints = torch.stack([
        towards_zero, i - 7 * towards_zero, ((i * 1234567 + 2**31) % 2**32 - 2**31) >> 5, i ^ (i << 3), i * i >> 20,
        _philox(torch.arange(N), i), i.clamp_max(5), f.trunc().long(),
    ])  # fmt: skip
    floats = torch.stack([
        f.exp2(), f.abs().log2(), f.abs().sqrt(), 1 / f, f.half().float(), f.bfloat16().float(), f.clamp_min(0.5), i.float() * f + 1.5
    ])
    arguments = dict(i_ptr=i, f_ptr=f, ints_ptr=torch.empty_like(ints), floats_ptr=torch.empty_like(floats), N=N, BLOCK=128)
    return Trial("numbers", numbers_kernel, 1, arguments, 4, 1, {"ints_ptr": ints, "floats_ptr": floats}, 1e-6)


def _philox(c0: Tensor, c1: Tensor) -> Tensor:
    """Word 0 of Philox4x32-10 of key 7 and counter (c0, c1, 3, 4), as a signed integer."""
    counter, (k0, k1), word = [c0, c1 % 2**32, torch.full_like(c0, 3), torch.full_like(c0, 4)], (7, 0), 2**32
    for _ in range(10):
        a, b = (0xD2511F53, 0xCD9E8D57)
        high = [(m * (x >> 16) + (m * (x & 0xFFFF) >> 16)) >> 16 for m, x in ((a, counter[0]), (b, counter[2]))]
        counter = [high[1] ^ counter[1] ^ k0, b * counter[2] % word, high[0] ^ counter[3] ^ k1, a * counter[0] % word]
        k0, k1 = (k0 + 0x9E3779B9) % word, (k1 + 0xBB67AE85) % word
    return (counter[0] + word // 2) % word - word // 2
