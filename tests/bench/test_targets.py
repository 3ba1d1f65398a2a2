"""The targets of speed and memory, on rows of made-up runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.gpu import targets
from bench.reporting import rows

pytestmark = pytest.mark.promise("benchmarks")


def a_row(workload: str, direction: str, backend: str, ms: float | None, cache: str = rows.WARM, **changes) -> rows.Row:
    """Of a made-up run in which flops and bytes are round."""
    row = rows.Row(
        workload, (1, 1, 1, 1, 1), "uniform", "bfloat16", direction, cache, backend, backend == "smattn/triton", ms, ms, ms,
        10 if ms else 0, 2**20, 10**8, 10**12, 1.0, None, None, "a made-up GPU", 1, {}, "none", "none",
    )  # fmt: skip
    return replace(row, **changes)


def outcome(made_up: list[rows.Row], what: str) -> targets.Target:
    (found,) = [target for target in targets.targets(made_up) if target.what == what]
    return found


def test_targets_of_speed_are_those_of_the_slower_mask():
    what = "self1k forward+backward, against FlexAttention"
    both = [a_row("self1k", rows.BOTH, "smattn/triton", 1.0), a_row("self1k", rows.BOTH, "flex", 3.3)]
    assert outcome([], what).verdict() == "not yet run"
    assert outcome(both, what).measured == pytest.approx(3.3) and outcome(both, what).verdict() == "reached"
    worse = [replace(both[0], mask="blob"), replace(both[1], mask="blob", median_ms=2.4)]
    assert outcome(both + worse, what).verdict() == "missed by 20.0%"
    assert outcome([replace(row, dtype="float32") for row in both], what).verdict() == "not yet run"
    broken = [both[0], a_row("self1k", rows.BOTH, "flex", None, skipped="no such kernel")]
    assert outcome(broken, what).verdict() == "flex: no such kernel"
    half = [*both, *(replace(row, mask="blob", median_ms=None, skipped="no time was left") for row in both)]
    assert outcome(half, what).verdict() == "reached under one mask, the other: smattn/triton: no time was left"


def test_targets_of_bandwidth_latency_operations_and_memory():
    copy = a_row(rows.COPY, rows.FORWARD, "torch.copy_", 1.0, flops=0, io_bytes=2 * 10**8)  # 2e11 bytes a second
    cold = [a_row("video64k", direction, "smattn/triton", ms, rows.COLD) for direction, ms in ((rows.FORWARD, 0.5), (rows.BOTH, 2.5))]
    forward, backward = (f"video64k {direction}, share of copy's bandwidth, cold cache" for direction in (rows.FORWARD, "backward"))
    assert outcome(cold, forward).verdict() == "not yet run", "without a copy beside it"
    assert outcome([copy, *cold], forward).measured == pytest.approx(100) and outcome([copy, *cold], forward).verdict() == "reached"
    assert outcome([copy, *cold], backward).measured == pytest.approx(50)
    assert outcome([copy, *cold], backward).verdict() == "missed by 28.6%"

    both = ((rows.FORWARD, 0.012), (rows.BOTH, 0.048))
    graph = [a_row("hodor_infer", direction, "smattn/triton", ms, rows.GRAPH) for direction, ms in both]
    assert outcome(graph, "hodor_infer forward, in a CUDA graph").verdict() == "reached"
    assert outcome(graph, "hodor_infer backward, in a CUDA graph").verdict() == "missed by 20.0%"
    captured = replace(graph[0], median_ms=None, skipped="cannot be captured")
    assert outcome([captured], "hodor_infer forward, in a CUDA graph").verdict() == "cannot be captured"

    wide = [a_row("self4k_d128", direction, "smattn/triton", ms) for direction, ms in ((rows.FORWARD, 2.0), (rows.BOTH, 14.5))]
    assert outcome(wide, "self4k_d128 forward").measured == pytest.approx(500)
    assert outcome(wide, "self4k_d128 backward").measured == pytest.approx(200)
    assert outcome(wide, "self4k_d128 backward").verdict() == "reached"

    noise = [a_row("self4k_d128", direction, "smattn/triton", ms) for direction, ms in ((rows.FORWARD, 2.0), (rows.BOTH, 1.9))]
    assert outcome(noise, "self4k_d128 forward").verdict() == "reached"
    assert outcome(noise, "self4k_d128 backward").verdict() == "lost in noise: forward+backward took 1.9e+03 µs, forward alone 2e+03 µs"
    blob = [replace(row, mask="blob") for row in wide]
    assert outcome(noise + blob, "self4k_d128 backward").verdict().startswith("reached under one mask, the other: lost in noise: ")
    assert outcome(wide[:1], "self4k_d128 backward").verdict() == "not yet run"

    allowed = 0.25 * 10**8 + 16 * 2**20
    for extra, verdict in ((allowed, "reached"), (1.5 * allowed, "missed by 50.0%")):
        row = a_row("self4k", rows.BOTH, "smattn/triton", 1.0, extra_bytes=int(extra))
        assert outcome([row], "self4k extra memory, of what is allowed").verdict() == verdict
