"""The call as users vary it, beside plain PyTorch that does the same: `python -m bench.studies.variants`

A named workload has contiguous tensors, a mask that the heads share and head sizes of whole vectors. Here each variant changes one thing of
two of them: what an argument adds, how the tensors lie, a size. Each is checked against float64 before it is timed. It writes
bench/results/<date>-<device>-variants-<dtype>.jsonl, and a table beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import smattn
from bench.measuring.ceilings import measure_ceilings
from bench.measuring.cell import Cell, Step
from bench.measuring.clock import time_interleaved, timing, warm_up
from bench.measuring.job import Job, default_backend
from bench.measuring.machine import device
from bench.measuring.measure import matmul_call, need_alike
from bench.measuring.validate import validate_case
from bench.reporting.rows import BOTH, FORWARD, OURS, Row, read
from bench.reporting.tables import calibration, disturbed, duels, markdown, times
from smattn.testing import WORKLOADS, Case, Workload, make_case

NAMES = ("hodor_train", "self1k")  # few queries and many
Contestant = Callable[[Case], tuple[Tensor, ...]]  # gives the output, or the map, and lse where it has a gradient


def together(*tensors: Tensor) -> list[Tensor]:
    """Tensors (B, H, N, D) as views of one (B, N, len(tensors), H, D), as one linear layer leaves them."""
    return list(torch.stack([tensor.transpose(1, 2) for tensor in tensors], 2).transpose(1, 3).unbind(2))


def packed(case: Case) -> Case:
    """Queries, keys and values as a module's projections leave them, and the gradient as the layer after them returns it."""
    (query,), (key, value), (dout,) = together(case.query), together(case.key, case.value), together(case.dout)
    return replace(case, query=query, key=key, value=value, dout=dout)


@dataclass(frozen=True)
class Variant:
    """One change: of sizes, of make_case's arguments, or of the case that it makes."""

    name: str
    sizes: dict[str, int] | None = None
    shape: Callable[[Workload], tuple[int, ...]] | None = None  # of the mask
    change: Callable[[Case], Case] | None = None
    arguments: dict[str, Any] | None = None

    def workload(self, name: str) -> Workload:
        return replace(WORKLOADS[name], **(self.sizes or {}))

    def case(self, name: str, dtype: torch.dtype, device: str) -> Case:
        w = self.workload(name)
        shape = self.shape(w) if self.shape else None
        options: dict[str, Any] = {"mask_dtype": dtype, "mask_shape": shape} | (self.arguments or {})
        case = make_case(w.B, w.H, w.Nq, w.Nk, w.D, dtype=dtype, device=device, **options)
        return self.change(case) if self.change else case


VARIANTS = (
    Variant("as it is"),
    Variant("packed projections", change=packed),
    Variant("a tenth of the keys padded", arguments={"padded": 0.1}),
    Variant("a mask of logits", arguments={"mask": "logits"}),
    Variant("a mask for each head", shape=lambda w: (w.B, w.H, w.Nq, w.Nk)),
    Variant("a mask of the keys alone", shape=lambda w: (w.B, 1, w.Nk)),
    Variant("no mask", arguments={"mask": None}),
    Variant("dropout of a tenth", arguments={"dropout_p": 0.1}),
    Variant("lse too", arguments={"with_lse": True}),
    Variant("4 heads share each key", arguments={"Hkv": 2}),
    Variant("one query", sizes={"Nq": 1}),
    Variant("four queries", sizes={"Nq": 4}),
    Variant("heads of 40", sizes={"D": 40}),
    Variant("heads of 128", sizes={"D": 128}),
    Variant("the map in place of the output", arguments={"as_map": True}),
)


def bias_of(c: Case) -> Tensor | None:
    """alpha_h * M (B|1, H, Nq|1, Nk), in the dtype that the mask has."""
    mask = c.mask if c.mask_logits is None else torch.sigmoid(c.mask_logits)
    if mask is None or not isinstance(c.alpha, Tensor):
        return None
    return c.alpha[:, None, None].to(mask.dtype) * (mask[:, None] if mask.dim() == 3 else mask)


def eager(c: Case) -> tuple[Tensor, ...]:
    sharers = c.query.shape[1] // c.key.shape[1]
    scores = (c.query @ c.key.repeat_interleave(sharers, 1).mT) * c.query.shape[-1] ** -0.5
    if (bias := bias_of(c)) is not None:
        scores = scores + bias
    if c.key_padding_mask is not None:
        scores = scores.masked_fill(c.key_padding_mask[:, None, None], float("-inf"))
    p = torch.softmax(scores, -1)
    if c.head_weights is not None:
        return ((c.head_weights[:, None, None] * p).sum(1),)
    out = F.dropout(p, c.dropout_p) @ c.value.repeat_interleave(sharers, 1)
    return (out, torch.logsumexp(scores.float(), -1)) if c.dlse is not None else (out,)


def sdpa(c: Case) -> tuple[Tensor, ...]:
    bias = bias_of(c)
    if c.key_padding_mask is not None:
        assert bias is not None
        bias = bias.masked_fill(c.key_padding_mask[:, None, None], float("-inf"))
    return (F.scaled_dot_product_attention(c.query, c.key, c.value, bias, c.dropout_p, enable_gqa=c.enable_gqa),)


def with_smattn(c: Case) -> tuple[Tensor, ...]:
    common: dict[str, Any] = {"mask_logits": c.mask_logits, "key_padding_mask": c.key_padding_mask, "enable_gqa": c.enable_gqa}
    if c.head_weights is not None:
        return (smattn.attention_map(c.query, c.key, c.mask, c.alpha, head_weights=c.head_weights, **common),)
    if c.dlse is not None:
        return smattn.soft_masked_attention(c.query, c.key, c.value, c.mask, c.alpha, return_lse=True, **common)
    return (smattn.soft_masked_attention(c.query, c.key, c.value, c.mask, c.alpha, dropout_p=c.dropout_p, **common),)


def contestants(case: Case, backend: str) -> dict[str, Contestant]:
    """Those that can compute the case: torch's fused attention gives neither lse nor a map."""
    compiled = torch.compile(eager, dynamic=False)
    of_torch = {} if case.is_map or case.dlse is not None else {"sdpa": sdpa}
    return {f"{OURS}{backend}": with_smattn, "eager": eager, "compiled": compiled} | of_torch


def bind(attend: Contestant, case: Case, direction: str) -> Step:
    """The call to measure: it returns the outputs, and with BOTH the gradient of every float input."""
    if direction == FORWARD:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return attend(case)

        return forward
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in case.inputs().items()}
    with_leaves, incoming = case.with_inputs(leaves), [case.dout] if case.dlse is None else [case.dout, case.dlse]

    def forward_and_backward() -> tuple[Tensor, ...]:
        outputs = attend(with_leaves)
        return (*outputs, *torch.autograd.grad(outputs, list(leaves.values()), incoming))

    return forward_and_backward


def measure(job: Job, name: str, variant: Variant, dtype: torch.dtype, backend: str) -> list[float]:
    """Check a variant and add its rows; returns the milliseconds of torch.mm around them."""
    case, w = variant.case(name, dtype, job.device), variant.workload(name)
    label = "none" if case.inputs().keys().isdisjoint({"mask", "mask_logits"}) else "logits" if case.mask is None else "uniform"
    errors = validate_case(backend, case, w, label)
    if not errors.within:
        sys.exit(f"outside the error budget, so nothing more is timed: {variant.name}, {errors}")
    matmul, quiet = matmul_call(dtype, job.device), []
    inputs = sum(tensor.nbytes for tensor in [*case.inputs().values(), case.dout])
    scores = w.B * w.H * w.Nq * w.Nk
    flops = 2 * w.D * scores * (1 if case.is_map else 2)
    for direction, factor in ((FORWARD, 1.0), (BOTH, 3.0 if case.is_map else 3.5)):
        torch.compiler.reset()  # else it would generalise, and then give up
        calls = {who: bind(attend, case, direction) for who, attend in contestants(case, backend).items()}
        for call in calls.values():
            warm_up(call, job.device)
            if not case.dropout_p:  # for which each draws its own numbers
                need_alike(call(), next(iter(calls.values()))(), next(iter(calls)))
        around = time_interleaved({"mm": matmul}, job.device, job.seconds / 4)["mm"]
        samples = time_interleaved(calls, job.device, job.seconds)
        around += time_interleaved({"mm": matmul}, job.device, job.seconds / 4)["mm"]
        for who, taken in samples.items():
            job.add_row(
                who, taken, workload=f"{name}, {variant.name}", shape=(w.B, w.H, w.Nq, w.Nk, w.D), mask=label, dtype=dtype,
                direction=direction, default=who.startswith(OURS), io_bytes=inputs if direction == FORWARD else 2 * inputs,
                flops=int(flops * factor), matmul_ms=timing(around).median_ms,
                errors=asdict(errors) if who.startswith(OURS) else None,
            )  # fmt: skip
        quiet += around
        print(f"{name}, {variant.name}, {direction}: {times(list(duels(job.rows).values())[-1])}", flush=True)
    return quiet


def table(rows: list[Row]) -> str:
    """The Markdown table: a line for each variant. † marks those for which the machine was busy."""
    duel_of, busy = duels(rows), {key.workload for key in disturbed(rows)}
    of: dict[str, list[str]] = {}
    for key, duel in duel_of.items():
        of.setdefault(key.workload, [key.workload + " †" * (key.workload in busy)]).extend(times(duel))
    return markdown(["", "forward, ms", "best peer", "speedup", "both, ms", "best peer", "speedup"], of.values())


def write_report(path: Path) -> Path:
    rows = read(path)
    about = rows[0]
    sizes = "; ".join(f"{name} {' '.join(str(getattr(WORKLOADS[name], size)) for size in ('B', 'H', 'Nq', 'Nk', 'D'))}" for name in NAMES)
    path.with_suffix(".md").write_text(f"""# {about.device}: the call in its variants, {about.dtype}

Commit {about.commit}, by `{about.command}`. B H Nq Nk D: {sizes}.
The peers are plain PyTorch, eager and compiled, and SDPA with the materialised bias where it can give the results. "Both" is forward and
backward with every gradient. Every row is in [{path.name}]({path.name}).

{table(rows)}

{calibration(rows)}
""")
    return path.with_suffix(".md")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the inputs (default float32)")
    parser.add_argument("--seconds", type=float, default=0.5, help="time budget of one contestant in one cell (default 0.5)")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    job = Job(args.device, args.seconds, " ".join(["python -m bench.studies.variants", *sys.argv[1:]]))
    job.file = job.path("variants", args.dtype)
    backend = default_backend(Cell(WORKLOADS[NAMES[0]], "uniform", dtype, args.device, BOTH))
    if args.device == "cuda":
        measure_ceilings(job, dtype)
    quiet: list[float] = []
    for name in NAMES:
        for variant in VARIANTS:
            quiet += measure(job, name, variant, dtype, backend)
            job.save()
    job.add_matmul(dtype, quiet)
    job.save()
    print(write_report(job.file).read_text())


if __name__ == "__main__":
    main()
