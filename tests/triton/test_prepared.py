"""Calls that are made again: the same launches and the same bits as a call made anew, on whatever tensors come."""

import gc
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smattn import ops, prepared
from smattn.testing import make_case, run
from tests.promises.test_repeatable import differing, poisoned_memory
from tests.support.expected import BACKENDS
from tests.support.meters import launches_recorded, peak_allocated

if "triton" not in BACKENDS:
    pytest.skip("triton is not expected here", allow_module_level=True)

from smattn.kernels import backend, chip  # noqa: E402
from smattn.kernels.launch import torch_step  # noqa: E402

pytestmark = pytest.mark.promise("Triton kernels")
ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "few queries": dict(Nq=13),
    "more queries": dict(Nq=40, with_lse=True),
    "many queries": dict(Nq=131, with_lse=True),
    "options": dict(Nq=13, dropout_p=0.3, padded=0.3),
    "logits": dict(Nq=131, mask="logits"),
    "one mask for the batch": dict(B=2, Nq=131, mask_shape=(1, 131, 70)),
    "key-only logits": dict(B=2, Nq=131, mask="logits", mask_shape=(1, 1, 70)),
    "map": dict(Nq=13, as_map=True),
}


def case_of(device, rng, Nq, B=1, **options):
    return make_case(B, 2, Nq, 70, 16, device=device, dtype=torch.float16, rng=rng, **options)


def records():
    return [record for record in prepared._records.values() if isinstance(record, prepared.Record)]


@pytest.mark.promise("repeatable")
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_a_repeated_call_gives_the_bits_of_one_made_anew(device, monkeypatch, options):
    """Others are recorded than the one that is repeated, and the repeated one finds NaN in its memory. It plans and describes nothing."""
    case, others = case_of(device, 1, **options), [case_of(device, rng, **options) for rng in (2, 3)]
    anew = run(case, "triton")
    prepared.forget()
    for other in others:
        run(other, "triton")
    assert len(records()) == 2  # forward and backward
    for name in ("forward", "backward", "attention_map", "attention_map_backward"):
        monkeypatch.setattr(backend, name, None)
    with poisoned_memory():
        repeated = run(case, "triton")
    assert differing(anew, repeated) == []


def arguments(device, Nq=5, Nk=33, D=16, offset=0, **changed):
    """Of ops.forward. offset: elements that key's address lies beyond an aligned one."""
    def tensor(*sizes, dtype=torch.float16):
        return torch.randn(sizes, device=device).to(dtype)

    key = tensor(2 * Nk * D + offset)[offset:].view(1, 2, Nk, D)
    given = ops.ForwardArguments(
        tensor(1, 2, Nq, D), key, tensor(1, 2, Nk, D), tensor(1, 1, 1, Nq, Nk, dtype=torch.float32), None,
        tensor(2, dtype=torch.float32), None, None, 0.25, 0.0, False, True, True, "triton",
    )  # fmt: skip
    return given._replace(**changed)


def test_what_decides_a_call_is_in_its_key(device):
    """Each differs from the first in one thing. None of them is the second call of its key, so none is recorded."""
    first = arguments(device)
    strided = torch.randn(1, 5, 2, 16, device=device).half().transpose(1, 2)
    padding = torch.zeros(1, 33, dtype=torch.bool, device=device)
    others = [
        arguments(device, Nk=34), arguments(device, offset=1), first._replace(scale=0.5), first._replace(save_out=False),
        first._replace(allow_tf32=True), first._replace(query=strided), first._replace(mask=first.mask.half()),
        first._replace(key_padding_mask=padding), first._replace(save_mbar=False), first._replace(mask=None, mask_logits=first.mask),
    ]  # fmt: skip
    for given in (first, *others):
        ops.forward(*given)
    assert len(prepared._records) == 1 + len(others) and records() == []
    ops.forward(*first)
    assert len(records()) == 1


def test_inputs_at_one_address_are_told_apart_before_a_call_is_recorded(device):
    """With query as key a record could not say which of them a pointer was. One made of others serves for them."""
    apart = arguments(device, Nq=33)
    same = apart._replace(key=apart.query)
    expected = ops.forward(*same)
    ops.forward(*same)
    assert records() == []
    ops.forward(*apart)
    assert len(records()) == 1
    assert all(torch.equal(a, b) for a, b in zip(ops.forward(*same), expected, strict=True))


def test_records_are_bounded_and_the_oldest_goes_first(device, monkeypatch):
    monkeypatch.setattr(prepared, "LIMIT", 2)
    for Nk in (33, 34, 35):
        ops.forward(*arguments(device, Nk=Nk))
    assert [[part for part in key if isinstance(part, torch.Size)][1][2] for key in prepared._records] == [34, 35]  # of key


def test_a_record_holds_no_tensor(device):
    before = {id(x): x for x in tensors()}  # of other tests, whatever kind they are
    for _ in range(3):
        ops.forward(*arguments(device, key_padding_mask=torch.zeros(1, 33, dtype=torch.bool, device=device)))
    assert len(records()) == 1
    assert all(id(x) in before for x in tensors())


def tensors():
    gc.collect()
    return [x for x in gc.get_objects() if type(x) is torch.Tensor]


@pytest.mark.promise("small")
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_a_repeated_call_needs_no_more_memory(device, monkeypatch, options):
    """It holds every buffer to its end. So does a call made anew, whose peak is what the promise is tested by."""
    if device != "cpu":
        pytest.skip("the meter watches torch's CPU allocator")
    case, made, call = case_of(device, 1, **options), [], prepared.call
    monkeypatch.setattr(prepared, "call", lambda *given: made.append(given) or call(*given))
    for _ in range(2):
        run(case, "triton")
    held = [sum(math.prod(sizes) * dtype.itemsize for sizes, dtype in record.buffers) for record in records()]
    for bytes_held, (compute, given, _) in zip(held, made[:2], strict=True):
        with launches_recorded(chip.arch_of(torch.device(device))):
            peak, _ = peak_allocated(lambda compute=compute, given=given: compute(*given))
        assert 0 < bytes_held <= peak


@pytest.mark.parametrize("announced", ["", "whole", "a view"])
def test_what_torch_computes_in_between_is_repeated_or_stops_the_record(device, announced):
    """A step on a view cannot be repeated: only where the view begins is known."""

    def double(x):
        x.mul_(2)

    def compute(x):
        out = torch.empty_like(x)
        torch_step(copy, x, out)
        if announced:
            torch_step(double, out if announced == "whole" else out.view(2, 2))
        else:
            double(out)
        return (out,)

    def copy(x, out):
        out.copy_(x)

    for value in (1.0, 2.0, 3.0):
        (out,) = prepared.call(compute, (torch.full((4,), value, device=device),), 1)
        assert torch.equal(out, torch.full((4,), 2 * value, device=device))
    assert len(records()) == (announced == "whole") and len(prepared._records) == 1


@pytest.mark.slow
def test_on_the_way_to_the_driver(tmp_path, capsys):
    """Compiled kernels, with the driver stubbed: a repeated call launches what a call made anew launches, in far less time.

    Printed are microseconds of a call from the op's entry on, of its allocations and of Triton's launches alone, and of a call made anew.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": ""}
    command = [sys.executable, "-c", f"import sys; sys.path.append({str(ROOT)!r}); from tests.support import stubbed_driver as s; s.main()"]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    reports = json.loads(answer.stdout)
    assert reports.keys() == {"13", "1045"}
    for report in reports.values():
        for first, recorded, repeated in report["launches"].values():
            assert len(first) > 0 and first == recorded == repeated
        times = report["us"]
        with capsys.disabled():
            print({name: f"{us:.1f} us" for name, us in times.items()})
        for name in ("forward", "backward"):
            assert times[name] < 0.5 * times[f"{name}, made anew"]
