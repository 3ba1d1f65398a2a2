"""backend="cuda" from Python, with nothing compiled: when it is taken, and the reasons why not."""

import importlib
import sys

import pytest
import torch

import smattn
from smattn import cuda, library, soft_masked_attention
from smattn.call import Problem
from smattn.testing import make_case

pytestmark = pytest.mark.promise("CUDA kernels")
WORKING = cuda.Machine("none", "cuda", tuple, lambda device: 0)  # as on a CUDA machine where the kernels were built


@pytest.fixture
def on_cuda():
    return make_case(1, 1, 1, 1, 8).problem()._replace(device_type="cuda")


def table():
    return importlib.import_module("smattn.backends")


def test_on_a_cuda_machine_without_triton_it_is_the_default(monkeypatch, on_cuda):
    monkeypatch.setattr(cuda, "machine", WORKING)
    monkeypatch.setitem(sys.modules, "smattn.kernels.backend", None)
    monkeypatch.setattr(table(), "_import", importlib.import_module)
    for operation in ("forward", "backward", "attention_map", "attention_map_backward"):
        assert table().resolve(on_cuda, "", operation) is cuda


def test_triton_comes_before_it():
    names = [row.name for row in table().TABLE if "cuda" in row.default_on]
    assert names == ["triton", "cuda", "reference"]


@pytest.mark.skipif(cuda.LIBRARY.path.exists(), reason="the CUDA kernels are built here")
def test_what_was_not_built_says_how_to_build_it_and_nothing_else_runs_instead():
    q = torch.zeros(1, 1, 2, 8)
    how = r"_cuda.so was not built.*-DSMATTN_CUDA=ON pip install"
    with pytest.raises(ValueError, match=f"backend='cuda' cannot run this call: .*{how}"):
        soft_masked_attention(q, q, q, backend="cuda")
    status = smattn.backends()["cuda"]
    assert not status.available and "-DSMATTN_CUDA=ON" in status.reasons[0]


def test_every_reason_is_given(monkeypatch):
    monkeypatch.setattr(cuda, "machine", WORKING._replace(absence=lambda: ("no GPU",)))
    problem = Problem(1, 1, 1, 1, 1, 300, 8, torch.float64, None, None, "cpu")
    reasons = "; ".join(cuda.unsupported_reasons(problem))
    for said in ("no GPU", "float64", "300", "'cpu'"):
        assert said in reasons


@pytest.mark.parametrize("capability, able", [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)])
def test_an_older_device_is_refused_by_its_compute_capability(monkeypatch, capability, able):
    monkeypatch.setattr(library, "why_not_loaded", lambda library: ())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    reasons = cuda.machine.absence()
    assert reasons == () if able else "7.5" in reasons[0]
