"""A run of the benchmark at a tiny size, made once, for the tests of bench/."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.measuring import ceilings, measure, peers, validate
from bench.measuring.cell import Cell
from bench.measuring.job import Check, Job
from bench.reporting import rows
from smattn.testing import Workload

TINY = Workload("hodor_infer", 1, 2, 5, 40, 8, "tiny")  # It has a known name, which reports look up.
TINY_PAIR = Workload("pair128", 1, 2, 5, 40, 16, "tiny", rows=3)
REFERENCE = peers.ours("reference")


def tiny(direction: str = rows.BOTH) -> Cell:
    return Cell(TINY, "uniform", torch.float32, "cpu", direction)


def refuses(query, key, value, mask, alpha):
    raise RuntimeError("no such kernel\nand a long explanation")


@pytest.fixture(scope="module")
def job() -> Job:
    job = Job("cpu", 0.01, "python -m bench.run")
    validation = validate.validate("reference", TINY, "uniform", torch.float32, "cpu")
    job.validations[Check("smattn/reference", TINY.name, "uniform", torch.float32)] = validation
    broken = peers.Contestant("broken", refuses)
    for direction in (rows.FORWARD, rows.BOTH):
        forward_only = replace(peers.PEERS[0], name="forward only", forward_only_on=("cpu",))
        measure.measure(job, [tiny(direction)], [REFERENCE, peers.PEERS[0], forward_only, broken])
    return job


TINY_SELF = Workload("self1k", 1, 2, 5, 40, 16, "tiny")


def tiny_self(direction: str, mask: str = "uniform") -> Cell:
    return Cell(TINY_SELF, mask, torch.bfloat16, "cpu", direction)


@pytest.fixture(scope="module")
def a_run(tmp_path_factory) -> Job:
    """What a run on a GPU does, on this machine's CPU and without the peers that must compile."""
    job = Job("cpu", 0.01, "python -m bench.run")
    job.file = tmp_path_factory.mktemp("results") / "run.jsonl"
    ceilings.measure_ceilings(job, torch.bfloat16, copy_bytes=2**20, side=64)
    assert [row.workload for row in rows.read(job.file)] == [rows.COPY, rows.LARGE_MATMUL], "saved as they come"
    eager, _, sdpa, _ = peers.PEERS
    cells = [tiny_self(direction, mask) for direction in (rows.FORWARD, rows.BOTH) for mask in ("uniform", "blob")]
    job.check(["cpu"], cells)
    measure.measure(job, cells, [peers.ours("cpu"), eager, sdpa, peers.WITHOUT_MASK])
    return job
