"""What the commands of bench/ refuse, in one line that names the option."""

from __future__ import annotations

import runpy
import sys

import pytest
import torch

pytestmark = pytest.mark.promise("benchmarks")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
WRONG = [
    ("run", "--device foo", "--device: expected cpu or cuda, got 'foo'"),
    ("run", "--device cuda:1", "--device: expected cpu or cuda, got 'cuda:1'"),
    pytest.param("run", "--device cuda", "--device: cuda: torch finds no GPU here", marks=NO_GPU),
    pytest.param("studies.token_maps", "--device cuda", "--device: cuda: torch finds no GPU here", marks=NO_GPU),
    pytest.param("measuring.ceilings", "", "--device: cuda: torch finds no GPU here", marks=NO_GPU),
    pytest.param("gpu.tune", "", "torch finds no GPU here", marks=NO_GPU),
    pytest.param("gpu.questions", "", "torch finds no GPU here", marks=NO_GPU),
    ("studies.nk_sweep", "--device cpu", "unrecognized arguments: --device cpu"),
    ("gpu.roofline", "H100", "unrecognized arguments: H100"),
    ("gpu.targets", "none.jsonl", "no such file: none.jsonl"),
    ("reporting.report", "", "the following arguments are required: file"),
    ("reporting.report", "none.jsonl", "no such file: none.jsonl"),
    ("reporting.measured", "none.jsonl", "no such file: none.jsonl"),
    ("reporting.measured", sys.executable, "is not in the subpath of"),
]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # runpy finds what this process has imported
@pytest.mark.parametrize("module, words, said", WRONG)
def test_wrong_options_are_refused_with_the_usage(module, words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, *words.split()])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"bench.{module}", run_name="__main__")
    assert end.value.code == 2 and said in capsys.readouterr().err.replace("\n", " ")
