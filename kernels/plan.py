"""Which passes a call takes: decisions that follow from its problem alone."""

from __future__ import annotations

from functools import lru_cache

from ..call import Problem
from ..memory import partial_dmasks
from .tiles import FEW_QUERIES, block_of

# A split over keys aims at this many programs, two for each of an H200's 132 multiprocessors; a constant: no result depends on the chip.
SPLIT_PROGRAMS = 264


def dmask_parts(problem: Problem, programs: int) -> int:
    """In how many parts dM's pass sums over the batch elements that share a mask, where there would be `programs` programs of it."""
    if problem.Nq <= FEW_QUERIES:
        return 1
    wanted = min(problem.sharing.sharers, SPLIT_PROGRAMS // max(1, programs))
    return max(1, min(wanted, partial_dmasks(problem)))


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
