"""Attention that leaves out the tiles which the mask has already decided, timed beside attention that does not: `python bench/skipping.py`

Which tiles, is known before any: tile_skipping.py proves the bound, and under its line m_i may be any score of the row, for the maximum is
not smaller. `left_out` takes that of the key with the row's largest M, one dot product a query; in backward L, for P_ij <= exp(U_i - L_i).
Of a row's weights all that is left out is at most u / Nk each, so O_i changes by u (mean |v| + |O_i|) at most, and L_i by u. u is 2^-24 of
float32, and of bfloat16 2^-9, half a rounding of its output: for inference only, as what backward needs of forward is float32.

skipping.cpp drives the CPU kernels, tile by tile, on one thread; skipping_kernel.py is the same in Triton, whose row maximum is the one so
far. A row of bench/results/skipping.csv: the share of tiles left out by both, and how many times as fast as without the CPU's forward
or backward (every gradient) is: `speedup` given which tiles, its quartiles, and `prepared` where finding that out is timed as well;
`product` times as fast as the kernels of the package is the study without. Ratios of calls that follow each other. Minutes; needs AVX-512.
"""

from __future__ import annotations

import csv
import ctypes
import math
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import brgemm
import skipping_kernel
import torch
from harness import once
from job import describe_device, name_of
from tile_skipping import ROUNDING, highest
from torch import Tensor
from torch.nn import functional as F

from smattn import native
from smattn.testing import WORKLOADS, Case, blob_mask, make_case

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "skipping.csv"
NAMES = ("hodor_infer", "hodor_train", "queries100_b1", "self1k", "vit_cls")
MASKS = {"blob": NAMES, "key-only": NAMES, "objects": ("self1k",), "objects, sorted": ("self1k",)}
FIELDS = (
    "workload", "mask", "alpha", "dtype", "direction", "left_out", "triton", "triton_in_order", "ms", "speedup", "low", "high", "prepared",
    "product", "device",
)  # fmt: skip
ROUNDS = 9
TRITON_TILE = (64, 128)


class Call(ctypes.Structure):
    """The struct of this name in skipping.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "H", "Hkv", "Nq", "Nk", "D", "Dv", "mask_queries")), ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "mask", "alpha", "left_out")),
    ]  # fmt: skip


class Study:
    """skipping.cpp, compiled into a folder, on the tensors of a case: contiguous, mask (B, Nq|1, Nk) in float32, no padding."""

    def __init__(self, folder: str) -> None:
        flags = [*brgemm.FLAGS, *["-mavx512bf16"] * (torch.bfloat16 in brgemm.dtypes())]
        library = f"{folder}/skipping.so"
        subprocess.run(["c++", *flags, str(HERE / "skipping.cpp"), "-I", str(HERE.parent / "csrc"), "-o", library], check=True)
        self.library: Any = ctypes.CDLL(library)

    def blocking(self, case: Case) -> tuple[int, int, int, int]:
        """Query blocks, queries in each, key blocks, keys in each."""
        found = torch.empty(4, dtype=torch.int64)
        self.library.blocking(ctypes.byref(_call(case, None)), _pointer(found))
        a, b, c, d = found.tolist()
        return a, b, c, d

    def forward(self, case: Case, left_out: Tensor | None) -> dict[str, Tensor]:
        """out, lse and mbar."""
        B, H, Nq, Dv = case.dout.shape
        out, lse, mbar = case.query.new_empty(B, H, Nq, Dv), torch.empty(B, H, Nq), torch.empty(B, H, Nq)
        self._run("forward", case, left_out, out, lse, mbar)
        return {"out": out, "lse": lse, "mbar": mbar}

    def backward(self, case: Case, rows: dict[str, Tensor], left_out: Tensor | None) -> dict[str, Tensor]:
        """Every gradient, of a loss on out; rows: what forward returned."""
        grads = {f"d{name}": torch.empty_like(tensor) for name, tensor in case.inputs().items()}
        self._run("backward", case, left_out, case.dout, *rows.values(), *grads.values())
        return grads

    def _run(self, name: str, case: Case, left_out: Tensor | None, *tensors: Tensor) -> None:
        function = getattr(self.library, f"{name}_{name_of(case.query.dtype)}")
        function(ctypes.byref(_call(case, left_out)), *map(_pointer, tensors))


def _call(case: Case, left_out: Tensor | None) -> Call:
    (B, H, Nq, D), (_, Hkv, Nk, Dv) = case.query.shape, case.value.shape
    assert case.mask is not None and isinstance(case.alpha, Tensor)
    tensors = (case.query, case.key, case.value, case.mask, case.alpha, *([] if left_out is None else [left_out]))
    assert all(tensor.is_contiguous() for tensor in tensors) and case.mask.dtype == torch.float32 and case.key_padding_mask is None
    return Call(B, H, Hkv, Nq, Nk, D, Dv, case.mask.shape[1], D**-0.5, *map(_pointer, tensors))


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def left_out(case: Case, blocking: tuple[int, int, int, int], u: float, lse: Tensor | None = None) -> Tensor:
    """Which tiles weigh no more than u in all their rows: bool (B, H, query blocks, key blocks). alpha is not negative.

    lse (B, H, Nq), where it is known; else a score of each row stands in for its maximum.
    """
    query_blocks, queries, _, keys = blocking
    assert case.mask is not None and isinstance(case.alpha, Tensor) and bool((case.alpha >= 0).all())
    (B, H, Nq, D), (_, Hkv, Nk, _) = case.query.shape, case.key.shape
    alpha, query, peaks = case.alpha[:, None, None], case.query.float(), highest(case.mask, keys)[:, None]  # (B, 1, Nq|1, key blocks)
    line = lse
    if line is None:
        first = peaks.argmax(3, keepdim=True) * keys  # of the block with the row's largest M, and then that key: (B, 1, Nq|1, 1)
        inside = (first + torch.arange(keys)).clamp_max(Nk - 1)
        at = inside.gather(3, case.mask[:, None].gather(3, inside).argmax(3, keepdim=True))
        best = case.key.gather(2, at.expand(B, Hkv, Nq, D)).float().repeat_interleave(H // Hkv, 1)
        line = (query * best).sum(3) * D**-0.5 + (alpha * peaks.amax(3, keepdim=True))[..., 0]  # (B, H, Nq)
    reach = highest(torch.linalg.vector_norm(case.key, dim=3, dtype=torch.float32), keys).repeat_interleave(H // Hkv, 1)
    bound = (query.norm(dim=3, keepdim=True) * D**-0.5) * reach[:, :, None] + alpha * peaks  # (B, H, Nq, key blocks)
    decided = bound <= (line - math.log(Nk / u))[..., None]
    decided = F.pad(decided, (0, 0, 0, query_blocks * queries - Nq), value=True)
    return decided.unflatten(2, (query_blocks, queries)).all(3).contiguous()


def objects_mask(side: int, rng: torch.Generator, in_rows: bool) -> Tensor:
    """Affinities of the pixels of a picture of 8 segments, (1, pixels, pixels): sum_o m_oi m_oj, m_o >= 0 with sum 1 at each pixel.

    Pixels in rows, or one segment's after the other's.
    """
    m = (32 * blob_mask(1, 8, side * side, rng)).softmax(1)  # (1, 8, pixels)
    m = m if in_rows else m[:, :, m[0].argmax(0).argsort(stable=True)]
    return (m.mT @ m).contiguous()


def case_of(name: str, mask: str, alpha: float | None, dtype: torch.dtype) -> Case:
    """A workload of one image; alpha of all heads, None: the usual mix."""
    w, rng = WORKLOADS[name], torch.Generator().manual_seed(1)
    B = w.B if name == "hodor_train" else 1
    case = make_case(B, w.H, w.Nq, w.Nk, w.D, dtype=dtype, mask="blob")
    if mask != "blob":
        other = blob_mask(B, 1, w.Nk, rng) if mask == "key-only" else objects_mask(round(w.Nk**0.5), rng, mask == "objects")
        case = replace(case, mask=other)
    return case if alpha is None else replace(case, alpha=torch.full((w.H,), alpha))


Step = Callable[[], object]


def compare(study: Study, case: Case, direction: str) -> dict[str, str | float]:
    """What the study and the product take for the same, call after call."""
    u, blocking = ROUNDING[name_of(case.query.dtype)], study.blocking(case)
    q, k, v, mask, alpha = case.query, case.key, case.value, case.mask, case.alpha
    assert mask is not None and isinstance(alpha, Tensor)
    inputs, rows = (q, k, v, mask[:, None], alpha, None, None), study.forward(case, None)
    if direction == "forward":
        chosen = left_out(case, blocking, u)
        calls: dict[str, Step] = {
            "product": lambda: native.forward(case.problem(), *inputs, save_out=False, save_mbar=True),
            "all": lambda: study.forward(case, None),
            "skipping": lambda: study.forward(case, chosen),
            "prepared": lambda: study.forward(case, left_out(case, blocking, u)),
        }
    else:
        chosen, needs = left_out(case, blocking, u, rows["lse"]), (True,) * 5
        calls = {
            "product": lambda: native.backward(case.problem(), case.dout, None, *inputs, *rows.values(), needs),
            "all": lambda: study.backward(case, rows, None),
            "skipping": lambda: study.backward(case, rows, chosen),
            "prepared": lambda: study.backward(case, rows, left_out(case, blocking, u, rows["lse"])),
        }
    taken = [{name: once(call, "cpu", call) for name, call in calls.items()} for _ in range(ROUNDS)]
    ratio = {name: [round["all"] / round[name] for round in taken] for name in calls}
    low, middle, high = statistics.quantiles(ratio["skipping"], n=4)
    return {
        "left_out": f"{chosen.double().mean().item():.4f}", "ms": f"{statistics.median(round['all'] for round in taken):.3g}",
        "speedup": f"{middle:.3f}", "low": f"{low:.3f}", "high": f"{high:.3f}",
        "prepared": f"{statistics.median(ratio['prepared']):.3f}", "product": f"{1 / statistics.median(ratio['product']):.3f}",
    }  # fmt: skip


def measure(study: Study, name: str) -> Iterator[dict[str, str | float]]:
    """A workload's rows."""
    for mask in (mask for mask, names in MASKS.items() if name in names):
        for alpha in (*[None] * (mask == "blob"), 16.0, 32.0, 64.0):
            for dtype in brgemm.dtypes():
                case = case_of(name, mask, alpha, dtype)
                about = {"workload": name, "mask": mask, "alpha": "mix" if alpha is None else alpha, "dtype": name_of(dtype)}
                for direction in ("forward", "backward")[: 2 if dtype == torch.float32 else 1]:
                    triton = {}
                    if direction == "forward":
                        for column, ordered in (("triton", True), ("triton_in_order", False)):
                            share = skipping_kernel.forward(case, *TRITON_TILE, ROUNDING[name_of(dtype)], ordered)[1]
                            triton[column] = f"{share:.4f}"
                    yield about | {"direction": direction, **compare(study, case, direction), **triton, "device": describe_device("cpu")}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, RESULTS.open("w", newline="") as file:
        study, writer = Study(folder), csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for name in NAMES:
            for row in measure(study, name):
                writer.writerow(row)
                print(" ".join(f"{row.get(field, '')!s:>12}" for field in FIELDS[:-1]), flush=True)


if __name__ == "__main__":
    main()
