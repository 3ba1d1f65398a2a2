"""The registered ops: schema, fake and implementation agree by torch.library.opcheck, and only what is asked for is computed."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from smattn import ops
from smattn.call import Needs
from smattn.canonical import five_axes, per_head
from smattn.testing import assert_within_budget, make_case, run

OPTIONS = [
    {},
    {"mask": None},
    {"dropout_p": 0.3, "padded": 0.4, "with_lse": True},
    {"dtype": torch.float16, "Hkv": 1},
    {"mask_shape": (1, 2, 1, 9), "mask_dtype": torch.bfloat16},
    {"mask": "logits", "padded": 0.4},
]
GRADIENTS = ("query", "key", "value", "mask", "alpha")
MAP_GRADIENTS = ("query", "key", "mask", "alpha", "head_weights")


def canonical(case):
    masks = (five_axes(case.mask, case.batch), five_axes(case.mask_logits, case.batch))
    return (case.query, case.key, case.value, *masks, per_head(case.alpha, case.query), case.key_padding_mask, case.seed())


def call_of(case):
    return case.problem().scale, case.dropout_p, False


def forward(case, backend, save=True):
    return ops.forward(*canonical(case), *call_of(case), save, save and case.alpha is not None, backend)


def requiring_grad(arguments):
    return tuple(a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments)


@pytest.mark.promise("composes")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("save", [True, False])
def test_opcheck_forward(backend, device, options, save):
    case = make_case(2, 2, 3, 9, 4, Dv=5, device=device, **options)
    arguments = (*canonical(case), *call_of(case), save, save, backend)
    report = torch.library.opcheck(ops.forward, requiring_grad(arguments))
    assert set(report.values()) == {"SUCCESS"}


@pytest.mark.promise("composes")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("needs", [(True,) * 5, (False, False, False, True, True), (True, False, False, False, False)], ids=str)
def test_opcheck_backward(backend, device, options, needs):
    case = make_case(2, 2, 3, 9, 4, Dv=5, device=device, **options)
    if case.alpha is None:
        needs = (*needs[:3], False, False)
    out, lse, remainder, mbar, normalizer = forward(case, backend)
    arguments = (case.dout, case.dlse, *canonical(case), out, remainder, lse, mbar, normalizer, *call_of(case), list(needs), backend)
    report = torch.library.opcheck(ops.backward, arguments)  # nothing requires grad: differentiated, it refuses
    assert set(report.values()) == {"SUCCESS"}


@pytest.mark.promise("composes")
@pytest.mark.parametrize("options", [{}, {"mask": None}, {"padded": 0.4, "Hkv": 1}, {"mask": "logits"}], ids=str)
def test_opcheck_maps(map_backend, device, options):
    case = make_case(2, 2, 3, 9, 4, as_map=True, device=device, **options)
    masks = (five_axes(case.mask, case.batch), five_axes(case.mask_logits, case.batch))
    inputs = (case.query, case.key, *masks, per_head(case.alpha, case.query), case.head_weights, case.key_padding_mask)
    scale = case.problem().scale
    report = torch.library.opcheck(ops.attention_map, requiring_grad((*inputs, scale, False, map_backend)))
    assert set(report.values()) == {"SUCCESS"}
    rows = ops.attention_map(*inputs, scale, False, map_backend)[1:]
    has_mask = case.alpha is not None
    needs = list(Needs(query=True, key=True, value=False, mask=has_mask, alpha=has_mask, head_weights=True))
    report = torch.library.opcheck(ops.attention_map_backward, (case.dout, *inputs, *rows, scale, False, needs, map_backend))
    assert set(report.values()) == {"SUCCESS"}


class Calls(TorchDispatchMode):
    """Collects every call of an op of smattn: its name, arguments and results."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "smattn":
            self.seen.append((func._schema.name.removeprefix("smattn::"), args, result))
        return result


NEEDS = [("mask", "alpha"), ("mask",), ("alpha",), ("query",), ("key", "value"), ("value",)]


@pytest.mark.promise("only what is asked")
@pytest.mark.parametrize("needs", NEEDS, ids=str)
@pytest.mark.parametrize("Nq", [5, 131])
def test_only_the_gradients_asked_for(backend, device, needs, Nq):
    case = make_case(2, 2, Nq, 35, 8, Hkv=1, with_lse=True, device=device)
    with Calls() as calls:
        some = run(case, backend, needs=needs)
    (_, args, grads) = calls.seen[-1]
    assert [name for name, *_ in calls.seen] == ["forward", "backward"]
    assert args[-2] == [name in needs for name in Needs._fields]
    assert [name for name, grad in zip(GRADIENTS, grads, strict=True) if grad.numel()] == [n for n in GRADIENTS if n in needs]
    assert set(some) == {"out", "lse"} | {f"d{name}" for name in needs}
    assert_within_budget(some, case)


@pytest.mark.promise("only what is asked")
@pytest.mark.parametrize("needs", [("mask", "alpha"), ("head_weights",), ("key",)], ids=str)
def test_only_the_map_gradients_asked_for(map_backend, device, needs):
    case = make_case(2, 2, 5, 35, 8, as_map=True, device=device)
    with Calls() as calls:
        some = run(case, map_backend, needs=needs)
    (name, args, grads) = calls.seen[-1]
    assert name == "attention_map_backward" and args[-2] == [name in needs for name in Needs._fields]
    assert [name for name, grad in zip(MAP_GRADIENTS, grads, strict=True) if grad.numel()] == [n for n in MAP_GRADIENTS if n in needs]
    assert_within_budget(some, case)


@pytest.mark.promise("only what is asked")
def test_nothing_is_saved_that_no_gradient_reads(backend, device):
    case = make_case(2, 2, 5, 35, 8, dtype=torch.float16, device=device)
    with Calls() as calls:
        run(case, backend, needs=[])
        run(case, backend, needs=["query"])
        run(case, backend, needs=["alpha"])
    forwards = [result for name, _, result in calls.seen if name == "forward"]
    saved = [(remainder.numel() > 0, mbar.numel() > 0) for _, _, remainder, mbar, _ in forwards]
    assert saved == [(False, False), (True, False), (True, True)]
