"""Which passes a call takes: decisions that follow from its problem alone."""

from __future__ import annotations

from functools import lru_cache

from ..call import Problem
from .tiles import FEW_QUERIES, block_of

# A split over keys aims at this many programs, two for each of an H200's 132 multiprocessors; a constant: no result depends on the chip.
SPLIT_PROGRAMS = 264


@lru_cache
def one_tile(problem: Problem) -> bool:
    """Whether backward may hold all queries of a head in one tile: they are few, and narrow enough to spill no registers."""
    queries, row = _block_of_queries(problem), _row_bytes(problem)
    return problem.Nq <= FEW_QUERIES and (row <= 128 or queries * row <= 8 << 10)


@lru_cache
def holds_dq(problem: Problem) -> bool:
    """Whether that tile leaves registers for dQ as well."""
    queries, row = _block_of_queries(problem), _row_bytes(problem)
    return queries <= 32 and queries * row < 8 << 10


def _block_of_queries(problem: Problem) -> int:
    return block_of(min(problem.Nq, FEW_QUERIES))


def _row_bytes(problem: Problem) -> int:
    return block_of(max(problem.D, problem.Dv)) * problem.dtype.itemsize
