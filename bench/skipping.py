"""Attention that leaves out the tiles which the mask has already decided, timed beside attention that does not: `python bench/skipping.py`

The bound U is that of tile_skipping.py, and under its line is what of the row's L is known, instead of m_i: in forward its L so far, over
tiles visited by their largest M, which the final one is not below; in backward L itself. As P_ij = exp(S_ij - L_i), each weight left out is
at most u / Nk, so O_i changes by u (mean |v| + |O_i|), and L_i by u. u is 2^-24 of float32; of bfloat16 2^-9, half a rounding of its
output, and for inference only: what backward needs of forward is float32.

skipping.cpp drives the CPU kernels, tile by tile, on one thread. A row of bench/results/skipping.csv is forward, or backward with every
gradient: the share of tiles left out, the milliseconds of the study when it leaves out none, and how many times as fast that is as the
package's own kernels (`product`); how many times as fast it becomes given U and the order of visits (`speedup`, its quartiles `low` and
`high`), and with their making inside the time (`prepared`). Ratios of calls that follow each other, their median. Needs AVX-512.

bench/results/skipping-triton.csv: the share that skipping_kernel.py's Triton forward leaves out, interpreted (TRITON_INTERPRET=1), visiting
tiles by their largest M, and in order. Minutes; given names of workloads, only those are done anew.
"""

from __future__ import annotations

import csv
import ctypes
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import brgemm
import skipping_kernel
import torch
from harness import in_a_loop, once
from job import describe_device, name_of
from tile_skipping import ROUNDING, highest
from torch import Tensor

from smattn import native
from smattn.testing import WORKLOADS, Case, blob_mask, make_case

HERE = Path(__file__).resolve().parent
RESULTS, TRITON_RESULTS = HERE / "results" / "skipping.csv", HERE / "results" / "skipping-triton.csv"
NAMES = ("hodor_infer", "hodor_train", "queries100_b1", "self1k", "vit_cls")
MASKS = {"blob": NAMES, "key-only": NAMES, "objects": ("self1k",)}
ALPHAS = (16.0, 32.0, 64.0)
ABOUT = ("workload", "mask", "alpha", "dtype")
FIELDS = (*ABOUT, "direction", "left_out", "ms", "product", "speedup", "low", "high", "prepared", "device")
TRITON_FIELDS = (*ABOUT, "by_mask", "in_order")
Step = Callable[[], object]
Row = dict[str, "str | float"]
TRITON_TILE = (64, 128)  # queries, keys
SECONDS, ROUNDS = 0.5, 5  # of a row, at least


class Call(ctypes.Structure):
    """The struct of this name in skipping.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "H", "Hkv", "Nq", "Nk", "D", "Dv", "mask_queries")), ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "mask", "alpha", "bounds", "order")),
        ("margin", ctypes.c_double), ("left_out", ctypes.c_void_p),
    ]  # fmt: skip


class Prepared(NamedTuple):
    """What is made of the inputs before a kernel that skips."""

    bounds: Tensor  # U, float32 (B, H, key blocks, Nq)
    order: Tensor  # of forward's visits, int64 (B, query blocks, key blocks)


class Study:
    """skipping.cpp, compiled into a folder, on the tensors of a case: contiguous, mask (B, Nq|1, Nk) in float32, alpha >= 0, no padding.

    Tiles that weigh no more than u in all their rows are left out, none without what is prepared.
    """

    def __init__(self, folder: str) -> None:
        flags = [*brgemm.FLAGS, *["-mavx512bf16"] * (torch.bfloat16 in brgemm.dtypes())]
        library = f"{folder}/skipping.so"
        subprocess.run(["c++", *flags, str(HERE / "skipping.cpp"), "-I", str(HERE.parent / "csrc"), "-o", library], check=True)
        self.library: Any = ctypes.CDLL(library)
        self.left_out = torch.zeros((), dtype=torch.int64)  # tiles, by the last call

    def blocking(self, case: Case) -> tuple[int, int, int, int]:
        """Query blocks, queries in each, key blocks, keys in each."""
        found = torch.empty(4, dtype=torch.int64)
        self.library.blocking(ctypes.byref(self._call(case, None, 1.0)), _pointer(found))
        a, b, c, d = found.tolist()
        return a, b, c, d

    def prepare(self, case: Case) -> Prepared:
        query_blocks, queries, key_blocks, keys = self.blocking(case)
        assert case.mask is not None and isinstance(case.alpha, Tensor) and bool((case.alpha >= 0).all())
        H, D, Hkv = case.query.shape[1], case.query.shape[3], case.key.shape[1]
        reach = highest(torch.linalg.vector_norm(case.key, dim=3, dtype=torch.float32), keys).repeat_interleave(H // Hkv, 1)
        q_norms = torch.linalg.vector_norm(case.query, dim=3, dtype=torch.float32) * D**-0.5
        bounds = reach[..., None] * q_norms[:, :, None] + case.alpha[:, None, None] * highest(case.mask, keys).mT[:, None]
        order = skipping_kernel.visits(case.mask, queries, keys).expand(-1, query_blocks, key_blocks)
        return Prepared(bounds, order.contiguous())

    def forward(self, case: Case, prepared: Prepared | None = None, u: float = 1.0) -> dict[str, Tensor]:
        """out, lse and mbar."""
        B, H, Nq, Dv = case.dout.shape
        out, lse, mbar = case.query.new_empty(B, H, Nq, Dv), torch.empty(B, H, Nq), torch.empty(B, H, Nq)
        self._run("forward", self._call(case, prepared, u), case, out, lse, mbar)
        return {"out": out, "lse": lse, "mbar": mbar}

    def backward(self, case: Case, rows: dict[str, Tensor], prepared: Prepared | None = None, u: float = 1.0) -> dict[str, Tensor]:
        """Every gradient, of a loss on out; rows: what forward returned."""
        grads = {f"d{name}": torch.empty_like(tensor) for name, tensor in case.inputs().items()}
        self._run("backward", self._call(case, prepared, u), case, case.dout, *rows.values(), *grads.values())
        return grads

    def share(self, case: Case) -> float:
        """Of the tiles, left out by the last call, which was on this case."""
        query_blocks, _, key_blocks, _ = self.blocking(case)
        return self.left_out.item() / (case.query.shape[0] * case.query.shape[1] * query_blocks * key_blocks)

    def _run(self, name: str, call: Call, case: Case, *tensors: Tensor) -> None:
        self.left_out.zero_()
        getattr(self.library, f"{name}_{name_of(case.query.dtype)}")(ctypes.byref(call), *map(_pointer, tensors))

    def _call(self, case: Case, prepared: Prepared | None, u: float) -> Call:
        (B, H, Nq, D), (_, Hkv, Nk, Dv) = case.query.shape, case.value.shape
        assert case.mask is not None and isinstance(case.alpha, Tensor)
        tensors = (case.query, case.key, case.value, case.mask, case.alpha, *(prepared or ()))
        assert all(tensor.is_contiguous() for tensor in tensors) and case.mask.dtype == torch.float32 and case.key_padding_mask is None
        pointers = [_pointer(tensor) for tensor in tensors] + [ctypes.c_void_p()] * (0 if prepared else 2)
        return Call(B, H, Hkv, Nq, Nk, D, Dv, case.mask.shape[1], D**-0.5, *pointers, math.log(Nk / u), _pointer(self.left_out))


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def objects_mask(side: int, rng: torch.Generator) -> Tensor:
    """Affinities of the pixels of a picture of 8 segments, (1, pixels, pixels): sum_o m_oi m_oj, m_o >= 0 with sum 1 at each pixel."""
    m = (8 * blob_mask(1, 8, side * side, rng).log()).softmax(1)  # (1, 8, pixels), borders of about a pixel
    return (m.mT @ m).contiguous()


@lru_cache(2)
def case_of(name: str, mask: str, dtype: torch.dtype) -> Case:
    """A workload, but for hodor_train of one image."""
    w, rng = WORKLOADS[name], torch.Generator().manual_seed(1)
    B = w.B if name == "hodor_train" else 1
    case = make_case(B, w.H, w.Nq, w.Nk, w.D, dtype=dtype, mask="blob" if mask == "blob" else None)
    if mask == "blob":
        return case
    return replace(case, mask=blob_mask(B, 1, w.Nk, rng) if mask == "key-only" else objects_mask(round(w.Nk**0.5), rng))


def cases(name: str) -> Iterator[tuple[Row, Case]]:
    """A workload's masks, alphas (the same for all heads, or the usual mix) and dtypes."""
    for mask in (mask for mask, names in MASKS.items() if name in names):
        for dtype in brgemm.dtypes():
            case = case_of(name, mask, dtype)
            if mask == "blob":
                yield dict(zip(ABOUT, (name, mask, "mix", name_of(dtype)), strict=True)), case
            for alpha in ALPHAS:
                about: Row = dict(zip(ABOUT, (name, mask, alpha, name_of(dtype)), strict=True))
                yield about, replace(case, alpha=torch.full(case.query.shape[1:2], alpha))


def compare(study: Study, case: Case, direction: str) -> Row:
    """What the study and the product take for the same, call after call."""
    u, prepared, rows = ROUNDING[name_of(case.query.dtype)], study.prepare(case), study.forward(case)
    assert case.mask is not None and isinstance(case.alpha, Tensor)
    inputs: tuple[Any, ...] = (case.query, case.key, case.value, case.mask[:, None], case.alpha, None, None)
    product: Step
    kernel: Callable[..., object]
    if direction == "forward":
        product = partial(native.forward, case.problem(), *inputs, save_out=False, save_mbar=True)
        kernel = partial(study.forward, case)
    else:
        product = partial(native.backward, case.problem(), case.dout, None, *inputs, rows["out"], rows["lse"], rows["mbar"], (True,) * 5)  # type: ignore[call-arg]
        kernel = partial(study.backward, case, rows)
    calls: dict[str, Step] = {
        "product": product, "all": kernel, "prepared": lambda: kernel(study.prepare(case), u), "skipping": lambda: kernel(prepared, u),
    }  # fmt: skip
    taken: list[dict[str, float]] = []
    until = time.perf_counter() + SECONDS
    while len(taken) < ROUNDS or time.perf_counter() < until:
        taken.append({name: once(call, "cpu", partial(in_a_loop, call, "cpu")) for name, call in calls.items()})
    ratios = {name: [times["all"] / times[name] for times in taken] for name in calls}
    low, _, high = statistics.quantiles(ratios["skipping"], n=4)
    found = {name: round(statistics.median(ratio), 3) for name, ratio in ratios.items()}
    return {
        "direction": direction, "left_out": round(study.share(case), 4),
        "ms": round(statistics.median(times["all"] for times in taken), 3), "product": round(1 / found["product"], 2),
        "speedup": found["skipping"], "low": round(low, 3), "high": round(high, 3), "prepared": found["prepared"],
        "device": describe_device("cpu"),
    }  # fmt: skip


def times(study: Study, name: str) -> Iterator[Row]:
    for about, case in cases(name):
        yield about | compare(study, case, "forward")
        if case.query.dtype == torch.float32:
            yield about | compare(study, case, "backward")


def triton_shares(name: str) -> Iterator[Row]:
    """Of hodor_infer in float32: interpreted kernels are slow."""
    for about, case in cases(name) if name == "hodor_infer" else ():
        if case.query.dtype == torch.float32:
            shares = [skipping_kernel.forward(case, *TRITON_TILE, ROUNDING["float32"], ordered)[1] for ordered in (True, False)]
            yield about | {"by_mask": round(shares[0], 4), "in_order": round(shares[1], 4)}


def renew(path: Path, fields: tuple[str, ...], names: list[str], rows_of: Callable[[str], Iterator[Row]]) -> None:
    """Write a table, its rows of these workloads anew."""
    kept = list(csv.DictReader(path.open())) if path.exists() else []
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        for name in NAMES:
            for row in rows_of(name) if name in names else (row for row in kept if row["workload"] == name):
                writer.writerow(row)
                print(" ".join(f"{value!s:>10}" for value in row.values()), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    for option, size in (
        (-1, 2**30),
        (-3, 2**25),
    ):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: memory is used again, not handed out inside the time
        assert ctypes.CDLL(None).mallopt(option, size) == 1
    names = sys.argv[1:] or list(NAMES)
    with tempfile.TemporaryDirectory() as folder:
        renew(RESULTS, FIELDS, names, partial(times, Study(folder)))
    renew(TRITON_RESULTS, TRITON_FIELDS, names, triton_shares)


if __name__ == "__main__":
    main()
