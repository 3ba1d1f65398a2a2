"""A worker runs calls in a process that may be lost."""

from __future__ import annotations

import os
import time

import pytest
import torch

from bench.measuring import worker

pytestmark = pytest.mark.promise("benchmarks")


def double(n):
    return 2 * n


def pid():
    return os.getpid()


def fails():
    raise ValueError("no such kernel\nand a long explanation")


def dies(name):
    worker.at(name)
    os._exit(5)


def hangs(name):
    worker.at(name)
    time.sleep(60)


def talks(seconds):
    for n in range(4):
        worker.at(f"{n}")
        time.sleep(seconds)
    return "done"


def loses_its_gpu():
    def broken():
        raise RuntimeError("an illegal memory access was encountered")

    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, broken
    worker.at("the bad one")
    try:
        raise RuntimeError("unspecified launch failure\nmore")
    except Exception as error:  # a caller may go on with the next contestant
        worker.still_usable(error)


@pytest.fixture(scope="module")
def call():
    with worker.Worker(silence=30.0) as call:
        yield call


def test_calls_share_a_process_and_an_exception_does_not_end_it(call):
    first = call(pid)
    assert call(double, 21) == 42
    with pytest.raises(RuntimeError, match="^ValueError: no such kernel$"):
        call(fails)
    assert call(pid) == first != os.getpid()


@pytest.mark.parametrize("function, arguments, at, why", [
    (dies, ("here",), "here", "its process ended with exit code 5"),
    (loses_its_gpu, (), "the bad one", "unspecified launch failure"),
])  # fmt: skip
def test_the_next_call_after_a_loss_has_a_new_process(call, function, arguments, at, why):
    before = call(pid)
    with pytest.raises(worker.Lost, match=why) as lost:
        call(function, *arguments)
    assert lost.value.at == at and call(pid) != before


def test_a_call_that_says_nothing_for_too_long_is_lost_and_one_that_talks_is_not():
    with worker.Worker(silence=30.0) as call:
        call(pid)  # started
        call._silence = 1.0
        assert call(talks, 0.5) == "done"
        with pytest.raises(worker.Lost, match="nothing was heard of it for 1 s") as lost:
            call(hangs, "forever")
        assert lost.value.at == "forever"


def test_an_error_on_a_gpu_that_still_works_is_no_loss(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert worker.still_usable(RuntimeError("out of memory")) is None
