"""The interpreter as conftest.py has it."""

import pytest
import torch

from smattn.testing import make_case, run
from tests.support.expected import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")


def test_a_launch_searches_for_builtins_once_however_many_helpers_it_calls(monkeypatch):
    from triton.runtime import interpreter

    case = make_case(1, 2, 5, 40, 16, dtype=torch.float32)
    run(case, "triton")  # Triton's own helpers see triton.language.core, which stays as their first call has left it
    searches, launches = [], []
    search, launch = interpreter._patch_builtin, interpreter.GridExecutor.__call__
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda *args: [searches.append(args[0]), search(*args)][1])
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *args, **kw: [launches.append(args[0]), launch(*args, **kw)][1])
    run(case, "triton")
    assert launches
    assert len(searches) == 4 * len(launches)  # triton.language, its tensors, its maths and its descriptors
