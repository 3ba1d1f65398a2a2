"""Which passes a call takes, in how many splits, and who computes delta and dalpha: decided once, from the problem and what is needed.

A plan is a plain value. The same problem has the same plan on every chip, so results do not depend on the chip beyond its tiles.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from ..call import Needs, Problem
from ..memory import PARTIAL_OUTPUTS, has_room_for_dalpha_tiles, partial_dmasks, partial_dqueries
from .tiles import FEW_QUERIES, block_of, cdiv

# A split over keys aims at this many programs, two for each of an H200's 132 multiprocessors; a constant: no result depends on the chip.
SPLIT_PROGRAMS = 264

SMALLEST_TILE = 32 * 16  # scores: of dM's pass in tiles.csv, on any chip


class Forward(NamedTuple):
    """How forward cuts the keys of a call."""

    splits: int  # 1: one pass over all keys
    split_blocks: int  # key blocks of each split


class Backward(NamedTuple):
    """Backward's passes, each wanted or not, in the order in which they run, and who computes what."""

    delta: str  # who computes each row's shift and delta: one of the four below
    keeps_rows: bool  # whether passes hand each other shift and delta in a buffer
    dq_splits: int  # of dQ's pass where it runs first and leaves parts; 0: it does not
    few_queries: bool  # the pass whose programs own key blocks and hold all queries
    dkdv: bool
    dq: bool  # dQ in one piece
    dmask: bool
    reduce: bool  # the pass that adds up the parts of dQ, and dalpha with dL's term
    key_only_rows: bool  # dM of a mask without queries is a by-product of dkdv
    dalpha_tiles: str | None  # the pass that leaves dalpha's partial sums: "few_queries", "dmask" or "dq"
    dlse_apart: bool  # whether dL's term of dalpha comes with delta, and is added separately


DELTA_FIRST = "the first pass, from the output"
DELTA_FROM_OUTPUT = "a pass of its own, from the output"
DELTA_SWEEP = "a sweep over P*dP"
DELTA_GIVEN = "the map's rows"


@lru_cache
def forward(problem: Problem, block_m: int, block_n: int) -> Forward:
    """How forward cuts the keys, whether or not backward will follow, so that the bits do not depend on that either."""
    p, blocks = problem, cdiv(problem.Nk, block_n)
    rows = p.B * p.H * p.Nq
    wanted = SPLIT_PROGRAMS // (p.B * p.H * cdiv(p.Nq, block_m))
    affordable = PARTIAL_OUTPUTS // (4 * rows * (p.Dv + 4))  # each row of a part is its output, and four sums
    most = cdiv(p.Nk, 2 * block_n)
    split_blocks = cdiv(blocks, max(1, min(wanted, affordable, most)))
    return Forward(cdiv(blocks, split_blocks), split_blocks)


@lru_cache
def backward(problem: Problem, needs: Needs, has_output: bool, has_dlse: bool) -> Backward:
    """Backward of attention. has_output: forward left all of the output."""
    plan, fits = passes_after_delta(problem, needs), fits_in_one_tile(problem, needs)
    queries_come_first = fits or plan.dq_splits > 0  # then the last pass adds dL's term to dalpha
    if has_output and queries_come_first and (not fits or computes_delta_itself(problem, needs)):
        return plan._replace(delta=DELTA_FIRST, keeps_rows=not (fits and holds_dq(problem)))
    delta = DELTA_FROM_OUTPUT if has_output else DELTA_SWEEP
    return plan._replace(delta=delta, dlse_apart=needs.alpha and has_dlse and not queries_come_first)


@lru_cache
def passes_after_delta(problem: Problem, needs: Needs) -> Backward:
    """The passes that follow once each row's shift and delta are known: the same for attention and for its map."""
    if fits_in_one_tile(problem, needs):
        dq_splits = splits(problem, needs, problem.B * problem.H) if needs.query and not holds_dq(problem) else 0
        few = needs.key or needs.value or needs.mask or needs.alpha or dq_splits == 0
        dalpha = "few_queries" if needs.alpha else None
        return Backward(
            DELTA_GIVEN, keeps_rows=True, dq_splits=dq_splits, few_queries=few, dkdv=False, dq=False, dmask=False,
            reduce=needs.query or needs.alpha, key_only_rows=False, dalpha_tiles=dalpha, dlse_apart=False,
        )  # fmt: skip
    key_only = _key_only(problem, needs)
    dmask = needs.mask and not key_only
    dalpha = None if not needs.alpha else "dmask" if dmask and has_room_for_dalpha_tiles(problem, SMALLEST_TILE) else "dq"
    dq_splits = 0 if dalpha == "dq" else _dq_splits(problem, needs)
    dq = dq_splits == 0 and (needs.query or dalpha == "dq")
    dkdv = needs.key or needs.value or key_only
    return Backward(
        DELTA_GIVEN, keeps_rows=True, dq_splits=dq_splits, few_queries=False, dkdv=dkdv, dq=dq, dmask=dmask,
        reduce=dq_splits > 0, key_only_rows=key_only, dalpha_tiles=dalpha, dlse_apart=False,
    )  # fmt: skip


def _dq_splits(problem: Problem, needs: Needs) -> int:
    """In how many parts of the keys dQ is summed for few queries of wide heads; 0 with many queries."""
    if not needs.query or problem.Nq > FEW_QUERIES:
        return 0
    wanted = splits(problem, needs, problem.B * problem.H)
    return wanted if wanted > 1 else 0


def _key_only(problem: Problem, needs: Needs) -> bool:
    """Whether dM is a by-product of dK and dV.

    Where dM has heads, several to a kv head, but is summed over the batch, rows of each (batch, head) might outweigh all inputs.
    """
    if not needs.mask or problem.mask_shape is None or problem.mask_shape[3] > 1:
        return False
    return not (problem.sharing.sharers > 1 and problem.mask_shape[2] > problem.Hkv)


class Parts(NamedTuple):
    """How the sum that dM is falls to programs: a part of the batch elements and of the heads that share the mask to each."""

    sharers: int  # batch elements of a part
    heads: int  # of a part
    number: int


@lru_cache
def parts_of_dmask(problem: Problem, programs: int, heads: int) -> Parts:
    """The parts, added up afterwards in their order, that bring `programs` nearest to SPLIT_PROGRAMS. heads: over which a program sums."""
    sharers, few = problem.sharing.sharers, problem.Nq <= FEW_QUERIES
    wanted = max(1, min((SPLIT_PROGRAMS + programs // 2) // programs, partial_dmasks(problem, beside_dqueries=few)))
    part_sharers = cdiv(sharers, min(wanted, sharers))
    of_batch = cdiv(sharers, part_sharers)
    part_heads = cdiv(heads, min(wanted // of_batch, heads))
    return Parts(part_sharers, part_heads, of_batch * cdiv(heads, part_heads))


class Cut(NamedTuple):
    """How few_queries falls to programs. Each goes over some key blocks, over all heads that share dM, and its part of the batch elements.

    Heads are few, and such a call is bound by its launches, of which parts take two more.
    """

    programs: int
    owners: int  # masks or batch elements
    split_blocks: int
    n_splits: int
    parts: Parts
    flags: dict[str, bool]


@lru_cache
def cut_of_few_queries(problem: Problem, needs: Needs, block_n: int) -> Cut:
    mask_heads, mask_queries = problem.mask_shape[2:4] if problem.mask_shape else (problem.H, problem.Nq)
    dq_inside = needs.query and holds_dq(problem)
    owners, groups = problem.sharing.masks if needs.mask else problem.B, 1 if needs.mask and mask_heads == 1 else problem.Hkv
    blocks, split_blocks = cdiv(problem.Nk, block_n), 1
    if dq_inside:
        wanted = max(1, SPLIT_PROGRAMS // (owners * groups))
        split_blocks = max(cdiv(blocks, partial_dqueries(problem, needs)), (blocks + wanted // 2) // wanted, 1)
    n_splits = cdiv(blocks, split_blocks)
    programs = owners * groups * n_splits
    parts = parts_of_dmask(problem, programs, 1) if needs.mask else Parts(1, 1, 1)
    flags = dict(
        SHARED_B=problem.sharing.sharers > 1, SHARED_H=mask_heads == 1, SHARED_M=mask_queries == 1, IN_PARTS=parts.number > 1,
        NEED_DQ=dq_inside, NEED_DK=needs.key, NEED_DV=needs.value, NEED_DMASK=needs.mask, NEED_DALPHA=needs.alpha,
    )  # fmt: skip
    return Cut(programs * parts.number, owners, split_blocks, n_splits, parts, flags)


def splits(problem: Problem, needs: Needs, owners: int) -> int:
    """How many parts of the keys dQ is summed in."""
    return min(partial_dqueries(problem, needs), max(1, SPLIT_PROGRAMS // owners))


@lru_cache
def fits_in_one_tile(problem: Problem, needs: Needs) -> bool:
    """Whether the few_queries pass serves: queries are few, except in two cases.

    dM summed over the batch for each head of a kv group would need dK and dV of the whole batch; and queries that outweigh everything else
    leave no memory for dQ in float32.
    """
    if not one_tile(problem) or (needs.query and partial_dqueries(problem, needs) == 0):
        return False
    has_heads = problem.mask_shape is not None and problem.mask_shape[2] > 1
    return not (needs.mask and has_heads and problem.sharing.sharers > 1 and problem.H > problem.Hkv)


def computes_delta_itself(problem: Problem, needs: Needs) -> bool:
    """Whether few queries can compute shift and delta along the way: in the one pass if dQ fits it, else in dQ's."""
    return holds_dq(problem) or needs.query


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
