"""Class-token maps of a whole vision transformer, beside attention matrices that are kept for them: `python -m bench.studies.token_maps`

There are LAYERS layers of attention, each with queries, keys and values of its own in the shape of a named workload but for IMAGES images,
and the attention of their first CLASSES tokens, averaged over heads and summed over layers. Forward is measured, and forward with the
gradients that a loss on outputs and map sends back. Outputs and gradients are results, and memory is what is needed beyond them. smattn is
checked against float64 before it is timed, and the contestants against each other. It writes
bench/results/<date>-<device>-token-maps.jsonl, and a table beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import smattn
from bench.measuring.cell import Cell, Step
from bench.measuring.clock import time_interleaved, timing, warm_up
from bench.measuring.job import Job, default_backend
from bench.measuring.machine import device
from bench.measuring.measure import matmul_call
from bench.measuring.memory import peak_beyond_results
from bench.measuring.validate import Validation, fitting, validate_case
from bench.reporting.rows import BOTH, FORWARD, MATMUL, OURS, Row, read
from bench.reporting.tables import calibration, disturbed, markdown, mib, ms
from smattn.testing import WORKLOADS, Workload, make_case

LAYERS, CLASSES, IMAGES = 12, 20, 1
NAMES = ("vit_cls_d48", "vit_cls")
Layers = tuple[Tensor, Tensor, Tensor]  # query, key and value, each (LAYERS, B, H, N, D)
Contestant = Callable[[Layers], tuple[list[Tensor], Tensor]]  # gives the outputs and the map, (B, CLASSES, N)


def stacked(layers: Layers) -> tuple[list[Tensor], Tensor]:
    """Keep every layer's attention matrix, as published code does, without the copy that a stack of them would be."""
    outs, kept = [], []
    for query, key, value in zip(*layers, strict=True):
        p = torch.softmax((query @ key.mT) * query.shape[-1] ** -0.5, -1)
        kept.append(p)
        outs.append(p @ value)
    return outs, torch.stack([p[:, :, :CLASSES].mean(1) for p in kept]).sum(0)


def sdpa_and_rows(layers: Layers) -> tuple[list[Tensor], Tensor]:
    """Take fused attention, and beside it the probabilities of the class tokens alone."""
    outs, maps = [], None
    for query, key, value in zip(*layers, strict=True):
        outs.append(F.scaled_dot_product_attention(query, key, value))
        rows = torch.softmax((query[:, :, :CLASSES] @ key.mT) * query.shape[-1] ** -0.5, -1).mean(1)
        maps = rows if maps is None else maps + rows
    assert maps is not None
    return outs, maps


def with_smattn(layers: Layers) -> tuple[list[Tensor], Tensor]:
    outs, maps = [], None
    for query, key, value in zip(*layers, strict=True):
        outs.append(smattn.soft_masked_attention(query, key, value))
        rows = smattn.attention_map(query[:, :, :CLASSES], key)
        maps = rows if maps is None else maps + rows
    assert maps is not None
    return outs, maps


@dataclass(frozen=True)
class Compiled:
    """A contestant as torch.compile makes it. It is picklable, so that a fresh process can measure its memory."""

    function: Contestant

    def __call__(self, layers: Layers) -> tuple[list[Tensor], Tensor]:
        compiled: Contestant = torch.compile(self.function, dynamic=False)  # what it compiled for such layers before it finds again
        return compiled(layers)


PEERS: dict[str, Contestant] = {
    "stacked": stacked,
    "stacked, compiled": Compiled(stacked),
    "sdpa and rows": sdpa_and_rows,
    "sdpa and rows, compiled": Compiled(sdpa_and_rows),
}


@dataclass(frozen=True)
class Stage:
    """What all contestants are given."""

    workload: Workload
    direction: str
    device: str
    layers: int = LAYERS

    def steps(self, contestant: Contestant) -> Step:
        w, g = self.workload, torch.Generator().manual_seed(0)
        shape = (self.layers, w.B, w.H, w.Nq, w.D)
        query, key, value = (torch.randn(shape, generator=g).to(self.device) for _ in range(3))
        if self.direction == FORWARD:

            def forward() -> tuple[Tensor, ...]:
                with torch.no_grad():
                    outs, maps = contestant((query, key, value))
                return (*outs, maps)

            return forward
        douts, dmap = (torch.randn(size, generator=g).to(self.device) for size in (shape, (w.B, min(CLASSES, w.Nq), w.Nk)))
        leaves = [[layer.detach().requires_grad_() for layer in tensor] for tensor in (query, key, value)]

        def forward_and_backward() -> tuple[Tensor, ...]:
            outs, maps = contestant((leaves[0], leaves[1], leaves[2]))  # type: ignore[arg-type]
            return (*outs, maps, *torch.autograd.grad([*outs, maps], sum(leaves, []), [*douts, dmap]))

        return forward_and_backward

    def call_and_warm_up(self, contestant: Contestant) -> tuple[Step, Step]:
        small = replace(self, workload=replace(self.workload, B=1, Nq=32, Nk=32), layers=1)
        warm = self if isinstance(contestant, Compiled) else small  # else the compiler's memory would count
        return self.steps(contestant), warm.steps(contestant)

    @property
    def flops(self) -> int:
        """Two matmuls a layer, and one for the class tokens; with backward 3.5 times that."""
        w = self.workload
        forward = self.layers * w.B * w.H * w.Nk * w.D * (4 * w.Nq + 2 * CLASSES)
        return forward if self.direction == FORWARD else forward * 7 // 2

    @property
    def io_bytes(self) -> int:
        w = self.workload
        inputs = 4 * self.layers * 4 * w.B * w.H * w.Nq * w.D + 4 * w.B * CLASSES * w.Nk  # q, k, v, outputs; the map
        return inputs if self.direction == FORWARD else 2 * inputs


def check(name: str, backend: str, device: str) -> Validation:
    """Validate the call without a mask and the map, forward and every gradient, against float64."""
    w = fitting(WORKLOADS[name])
    main = make_case(w.B, w.H, w.Nq, w.Nk, w.D, mask=None, device=device)
    rows = make_case(w.B, w.H, CLASSES, w.Nk, w.D, mask=None, as_map=True, device=device)
    found, of_map = (validate_case(backend, case, w, "none") for case in (main, rows))
    both = replace(found, tensors=found.tensors | {f"map: {tensor}": error for tensor, error in of_map.tensors.items()})
    if not both.within:
        sys.exit(f"outside the error budget, so nothing is timed: {both}")
    return both


def agree(stage: Stage, contestants: Iterable[Contestant]) -> None:
    """Check that all contestants compute the same, or a slip would time something else."""
    small = replace(stage, workload=replace(stage.workload, B=1, Nq=64, Nk=64), layers=2)
    first, *others = (small.steps(contestant)() for contestant in contestants)
    for other in others:
        for one, two in zip(first, other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def measure(job: Job, stage: Stage, contestants: dict[str, Contestant], ours: str, errors: Validation) -> list[float]:
    """Add a row for each contestant; returns the milliseconds of torch.mm around them."""
    torch.compiler.reset()  # else it would generalise, and then give up
    agree(stage, contestants.values())
    matmul = matmul_call(torch.float32, stage.device)
    quiet = time_interleaved({"mm": matmul}, stage.device, job.seconds / 4)["mm"]
    calls = {name: stage.steps(contestant) for name, contestant in contestants.items()}
    for call in calls.values():
        warm_up(call, stage.device)
    samples = time_interleaved(calls, stage.device, job.seconds, before=lambda: None)  # No call is so short that caches matter.
    quiet += time_interleaved({"mm": matmul}, stage.device, job.seconds / 4)["mm"]
    del calls
    w = stage.workload
    for name, contestant in contestants.items():
        extra = peak_beyond_results(partial(stage.call_and_warm_up, contestant), stage.device)
        job.add_row(
            name, samples[name], workload=w.name, shape=(w.B, w.H, w.Nq, w.Nk, w.D), dtype=torch.float32, direction=stage.direction,
            default=name == ours, extra_bytes=extra, io_bytes=stage.io_bytes, flops=stage.flops, matmul_ms=timing(quiet).median_ms,
            errors=asdict(errors) if name == ours else None,
        )  # fmt: skip
        print(f"{w.name} {stage.direction}: {name} {ms(job.rows[-1].median_ms)} ms, {mib(extra)} MiB", flush=True)
    return quiet


def table(rows: list[Row]) -> str:
    """The Markdown table: time, extra memory, and how many times smattn's they are. † marks rows for which the machine was busy."""
    busy = {(key.workload, key.direction) for key in disturbed(rows)}
    body = []
    for ours in (row for row in rows if row.default):
        for row in (row for row in rows if (row.workload, row.direction) == (ours.workload, ours.direction)):
            mark = " †" * ((row.workload, row.direction) in busy)
            assert row.median_ms and ours.median_ms and row.extra_bytes and ours.extra_bytes
            ratios = [f"{row.median_ms / ours.median_ms:.2f}×", f"{row.extra_bytes / ours.extra_bytes:.1f}×"]
            cells = [f"{row.workload}, {row.direction}{mark}", row.backend, ms(row.median_ms), ratios[0], mib(row.extra_bytes), ratios[1]]
            body.append(cells)
    return markdown(["", "contestant", "ms", "of smattn's", "extra MiB", "of smattn's"], body)


def write_report(path: Path) -> Path:
    rows = read(path)
    about = rows[0]
    sizes = "; ".join(f"{name} {' '.join(map(str, shape))}" for name, shape in shapes(rows))
    path.with_suffix(".md").write_text(f"""# {about.device}: class-token maps of {LAYERS} layers

Commit {about.commit}, by `{about.command}`. B H Nq Nk D: {sizes}.
`stacked` keeps every layer's attention matrix until the maps are taken, `sdpa and rows` is torch's fused attention and the class tokens'
probabilities beside it; each also as torch.compile makes it. Every row is in [{path.name}]({path.name}).

{table(rows)}

{calibration(rows)}
""")
    return path.with_suffix(".md")


def section(path: Path, folder: str) -> str:
    """The table of a result file, and where it comes from, for a README that finds the file in `folder`."""
    rows = read(path)
    about, report = rows[0], path.with_suffix(".md").name
    return f"""{table(rows)}

{calibration(rows)}
{about.device}: by `{about.command}` at commit {about.commit}; [report]({folder}/{report}); rows: [{path.name}]({folder}/{path.name})."""


def shapes(rows: list[Row]) -> list[tuple[str, tuple[int, ...]]]:
    return list({row.workload: row.shape for row in rows if row.workload != MATMUL}.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--seconds", type=float, default=0.5, help="time budget of one contestant in one cell (default 0.5)")
    args = parser.parse_args()
    job = Job(args.device, args.seconds, " ".join(["python -m bench.studies.token_maps", *sys.argv[1:]]))
    backend = default_backend(Cell(WORKLOADS[NAMES[0]], "uniform", torch.float32, args.device, BOTH))
    contestants = {f"{OURS}{backend}": with_smattn} | PEERS
    job.file = job.path("token-maps")
    quiet: list[float] = []
    for name in NAMES:
        errors = check(name, backend, args.device)
        for direction in (FORWARD, BOTH):
            stage = Stage(replace(WORKLOADS[name], B=IMAGES), direction, args.device)
            quiet += measure(job, stage, contestants, f"{OURS}{backend}", errors)
            job.save()
    job.add_matmul(torch.float32, quiet)
    job.save()
    print(write_report(job.file).read_text())


if __name__ == "__main__":
    main()
