"""The plan of Triton's passes: a value that follows from the problem and from which gradients are wanted, and from nothing else."""

from itertools import product

import pytest
import torch

from smattn import memory
from smattn.call import Needs, Problem
from smattn.kernels import plan
from smattn.kernels.plan import DELTA_FIRST, DELTA_FROM_OUTPUT, DELTA_SWEEP
from smattn.kernels.tiles import tile
from smattn.testing import assert_within_budget, make_case, run
from tests.support.expected import BACKENDS, DEVICE

pytestmark = pytest.mark.promise("Triton kernels")
ALL = Needs(True, True, True, True, True)
MASK_AND_ALPHA = Needs(False, False, False, True, True)
QUERY = Needs(True, False, False, False, False)


def problem(Nq, D=64, mask=(2, 1, 1, None, 9504), H=8, Hkv=8, dtype=torch.bfloat16):
    """B = 2 and 9504 keys; None in the mask's shape: as many queries as there are."""
    shape = None if mask is None else tuple(Nq if size is None else size for size in mask)
    return Problem(2, H, Hkv, Nq, 9504, D, D, dtype, None if mask is None else dtype, shape, "cuda")


PLANS = [  # a problem, needs, whether forward kept its output -> who computes delta, and the passes that run
    (problem(13, 32), ALL, True, DELTA_FIRST, "few_queries reduce"),
    (problem(100, 32), ALL, True, DELTA_FIRST, "dq_splits few_queries reduce"),
    (problem(100, 32), QUERY, True, DELTA_FIRST, "dq_splits reduce"),
    (problem(100, 32), MASK_AND_ALPHA, True, DELTA_FROM_OUTPUT, "few_queries reduce"),
    (problem(100, 256), ALL, True, DELTA_FIRST, "dq_splits dkdv dmask reduce"),
    (problem(13, 32), ALL, False, DELTA_SWEEP, "few_queries reduce"),
    (problem(1045), ALL, True, DELTA_FROM_OUTPUT, "dkdv dq dmask"),
    (problem(1045), ALL, False, DELTA_SWEEP, "dkdv dq dmask"),
    (problem(1045), MASK_AND_ALPHA, True, DELTA_FROM_OUTPUT, "dmask"),
    (problem(1045, mask=None), ALL._replace(mask=False, alpha=False), True, DELTA_FROM_OUTPUT, "dkdv dq"),
    (problem(1045, mask=(2, 1, 1, 1, 9504)), ALL, True, DELTA_FROM_OUTPUT, "dkdv dq key_only_rows"),
    (problem(1045, mask=(1, 1, 8, 1, 9504), Hkv=4), ALL, True, DELTA_FROM_OUTPUT, "dkdv dq dmask"),
    (problem(13, 32, mask=(1, 1, 8, None, 9504), Hkv=4), ALL, True, DELTA_FIRST, "dq_splits dkdv dmask reduce"),
]
PASSES = ("dq_splits", "few_queries", "dkdv", "dq", "dmask", "reduce", "key_only_rows")


@pytest.mark.parametrize("case, needs, has_output, delta, passes", PLANS)
def test_the_passes_of_a_problem(case, needs, has_output, delta, passes):
    steps = plan.backward(case, needs, has_output, False)
    assert steps.delta == delta and " ".join(name for name in PASSES if getattr(steps, name)) == passes


@pytest.mark.parametrize("Nq, D, has_output", [*product((13, 100, 1045), (32, 256), (True, False))])
def test_every_gradient_that_is_wanted_has_one_pass(Nq, D, has_output):
    for wanted in product((False, True), repeat=5):
        needs = Needs(*wanted)
        if not any(needs):
            continue
        steps = plan.backward(problem(Nq, D), needs, has_output, True)
        by_few = steps.few_queries
        assert not needs.query or by_few or steps.dq or steps.dq_splits > 0
        assert not needs.mask or by_few or steps.dmask or steps.key_only_rows
        assert not (needs.key or needs.value) or by_few or steps.dkdv
        assert (steps.dalpha_tiles is not None) == needs.alpha
        assert not steps.dlse_apart or needs.alpha and not steps.reduce


def test_dl_s_term_of_dalpha_is_added_once():
    """By the last pass where it sums dalpha, else beside delta, and never without an incoming gradient of lse."""
    for case, has_output, has_dlse in product((problem(13, 32), problem(100, 256), problem(1045)), (True, False), (True, False)):
        steps = plan.backward(case, ALL, has_output, has_dlse)
        assert steps.dlse_apart == (has_dlse and not steps.reduce)


def test_a_plan_is_printed_by_its_names():
    printed = repr(plan.backward(problem(1045), ALL, True, False))
    assert printed.startswith("Backward(delta='a pass of its own, from the output'") and "dmask=True" in printed


def test_rows_are_handed_on_unless_one_pass_holds_everything():
    assert not plan.backward(problem(13, 32), ALL, True, False).keeps_rows
    assert plan.backward(problem(100, 32), ALL, True, False).keeps_rows and plan.backward(problem(1045), ALL, True, False).keeps_rows


def test_dalpha_is_summed_with_dq_where_a_small_mask_leaves_no_room_for_a_sum_of_every_tile():
    small, smaller = (problem(Nq, mask=(1, 1, 8, 1, 9504), Hkv=4) for Nq in (1045, 9504))
    assert plan.backward(small, ALL, True, False).dalpha_tiles == "dmask"
    steps = plan.backward(smaller, MASK_AND_ALPHA, True, False)
    assert steps.dalpha_tiles == "dq" and steps.dq and steps.dmask


def bias(rows, heads, N, D=32, **more):
    """Of each head or of all, which `rows` batch elements share."""
    return Problem(rows, heads, heads, N, N, D, D, torch.bfloat16, torch.float32, (1, 1, heads, N, N), "cuda", **more)


@pytest.mark.parametrize("programs, rows, heads, parts", [
    (144, 384, 1, (192, 1, 2)),
    (16, 128, 1, (8, 1, 16)),
    (264, 128, 1, (128, 1, 1)),
    (200, 128, 8, (128, 8, 1)),
    (64, 1, 8, (1, 2, 4)),
    (20, 5, 8, (1, 4, 10)),
    (1, 3, 2, (1, 1, 6)),
])  # fmt: skip
def test_the_sum_that_dm_is_falls_to_about_two_programs_a_multiprocessor(programs, rows, heads, parts):
    case = bias(rows, 1, 256)
    assert plan.parts_of_dmask(case, programs, heads) == parts
    sharers, part_heads, number = parts
    assert plan.cdiv(rows, sharers) * plan.cdiv(heads, part_heads) == number


def test_parts_of_dm_leave_the_other_buffers_their_memory():
    few, many = (bias(64, 1, N) for N in (128, 2048))
    assert plan.parts_of_dmask(few, 1, 1).number > 60 and plan.parts_of_dmask(many, 1, 1).number == 1
    wide = few._replace(mask_shape=(1, 1, 16, 128, 512))
    assert memory.partial_dmasks(wide, beside_dqueries=True) < memory.partial_dmasks(wide, beside_dqueries=False)
    assert (memory.partial_dmasks(few, beside_dqueries=True) + 1) * 4 * 128 * 128 <= memory.DMASK_BESIDE


def test_few_queries_share_out_the_sum_over_the_batch():
    needs = ALL._replace(alpha=False)
    of_pairs = plan.cut_of_few_queries(bias(128, 4, 128), needs, 32)
    assert (of_pairs.programs, of_pairs.parts) == (256, (8, 1, 16)), "16 programs would go over 128 batch elements each"
    assert of_pairs.flags["IN_PARTS"] and plan.cut_of_few_queries(problem(13, 32), ALL, 64).parts == (1, 1, 1)
    assert plan.cut_of_few_queries(bias(128, 4, 128), needs._replace(mask=False), 32).parts.number == 1


def test_thirteen_queries_among_the_keys_of_a_clip_take_one_wave():
    cut = plan.cut_of_few_queries(problem(13, 32), ALL, tile("few", problem(13, 32), 90).block_n)
    assert cut.parts.number == 1 and cut.programs <= 3 * 132, "three programs of this tile fit each of 132 multiprocessors"


@pytest.fixture
def no_room(monkeypatch):
    """No call has room for a sum of dalpha for every tile."""
    monkeypatch.setattr(memory, "DALPHA_BYTES", 0)
    cached = (plan.backward, plan.passes_after_delta)
    for plans in cached:
        plans.cache_clear()
    yield
    for plans in cached:
        plans.cache_clear()


@pytest.mark.skipif("triton" not in BACKENDS, reason="no device for Triton")
@pytest.mark.parametrize("needs", [None, ("mask", "alpha"), ("alpha",)], ids=str)
@pytest.mark.parametrize("Nq, D", [(140, 32), (100, 256)])
def test_the_gradients_where_there_is_no_room_for_a_sum_of_every_tile(no_room, device, Nq, D, needs):
    case = make_case(2, 4, Nq, 70, D, Hkv=2, mask_shape=(1, 4, 1, 70), dtype=torch.float16, with_lse=True, device=device)
    assert_within_budget(run(case, "triton", needs), case)


@pytest.mark.skipif("triton" not in BACKENDS, reason="no device for Triton")
@pytest.mark.parametrize("Nq, mask, programs, cut", [
    (20, (1, 1), 10, (2, 1, 3)),
    (20, (1, 4), 30, (2, 1, 3)),
    (140, (1, 1), 80, (2, 4, 3)),
    (140, (1, 1), 270, (1, 2, 10)),
    (140, (1, 4), 300, (2, 1, 3)),
])  # fmt: skip
def test_the_gradients_where_the_sum_that_dm_falls_to_parts(monkeypatch, device, Nq, mask, programs, cut):
    monkeypatch.setattr(plan, "SPLIT_PROGRAMS", programs)
    cached = (plan.cut_of_few_queries, plan.parts_of_dmask)
    for cuts in cached:
        cuts.cache_clear()
    made = []
    monkeypatch.setattr(plan, "Parts", lambda *parts, of=plan.Parts: made.append(parts) or of(*parts))
    case = make_case(5, 4, Nq, 70, 32, mask_shape=(*mask, Nq, 70), dtype=torch.float16, device=device)
    assert_within_budget(run(case, "triton"), case)
    assert cut in made or DEVICE == "cuda", "a GPU has other tiles, and so other numbers of programs"
    for cuts in cached:
        cuts.cache_clear()
