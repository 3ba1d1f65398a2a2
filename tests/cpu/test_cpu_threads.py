"""backend="cpu": the same bits on any number of threads, for callers with threads of their own, and after a fork."""

import subprocess
import sys
import threading

import pytest
import torch

from smattn.testing import assert_within_budget, make_case, run
from tests.support.cpu_kernels import ALL_DTYPES, SHAPES, differing, threads

pytestmark = pytest.mark.promise("CPU kernels")


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_bits_on_any_number_of_threads(shape, dtype):
    case = make_case(**SHAPES[shape], dtype=dtype)
    with threads(1):
        alone = run(case, "cpu")
    for n in (2, 3, 40):
        with threads(n):
            assert torch.get_num_threads() == n
            assert differing(alone, run(case, "cpu")) == []


@pytest.mark.parametrize("B, H, Nq, Nk", [(1, 64, 520, 520), (1, 384, 130, 146), (2, 512, 130, 146)], ids=["rows", "heads", "heads of two"])
def test_what_takes_turns_gives_the_same_bits_on_any_number_of_threads(B, H, Nq, Nk):
    """So many heads share a mask that backward's memory holds few rows of runs (csrc/cpu/runs.h) at a time, or not the sums of all."""
    case = make_case(B, H, Nq, Nk, 64, dtype=torch.bfloat16)
    with threads(1):
        alone = run(case, "cpu")
    assert_within_budget(alone, case)
    with threads(7):
        assert differing(alone, run(case, "cpu")) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_python_threads_at_once(dtype):
    shapes = [shape for shape in SHAPES.values() if "dropout_p" not in shape]  # all threads share torch's generator
    cases = [make_case(**shape, dtype=dtype) for shape in shapes]
    alone = [run(case, "cpu") for case in cases]
    start, wrong = threading.Barrier(len(cases)), []

    def repeat(case, expected):
        start.wait(timeout=60)
        for _ in range(5):
            wrong.extend(differing(expected, run(case, "cpu")))
        wrong.remove("has not finished")

    wrong += ["has not finished"] * len(cases)
    workers = [threading.Thread(target=repeat, args=pair) for pair in zip(cases, alone, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert wrong == []


FORK = """
import os, sys, torch
from smattn.testing import make_case, run
torch.set_num_threads(2)
case = make_case(1, 4, 13, 3001, 32, dtype=torch.{dtype}, with_lse=True, padded=0.2)
before = run(case, "cpu")  # torch's threads now exist, and will not in the child
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    after = run(case, "cpu")
    os._exit(0 if all(torch.equal(before[name], after[name]) for name in before) else 7)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_forked_child_with_one_thread(dtype):
    result = subprocess.run([sys.executable, "-c", FORK.replace("{dtype}", dtype)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
