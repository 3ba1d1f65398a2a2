"""Refuses well: before anything runs, an error names the argument, what was expected and what was given."""

import importlib
import re
import traceback
import warnings
from pathlib import Path

import pytest
import torch

from smattn import attention_map, soft_masked_attention, validate
from smattn.call import Problem
from smattn.nn import SoftMaskedAttention
from tests.support.expected import BACKENDS, DEVICE

pytestmark = pytest.mark.promise("refuses well")
B, H, NQ, NK, D = 2, 4, 3, 5, 8
META = "meta"


def arguments():
    return dict(
        query=torch.zeros(B, H, NQ, D),
        key=torch.zeros(B, H, NK, D),
        value=torch.zeros(B, H, NK, 6),
        mask=torch.zeros(B, NQ, NK),
        alpha=torch.zeros(H),
    )


def z(*shape, **kw):
    return torch.zeros(*shape, **kw)


# what is changed in a good call, the exception, and its whole message
REFUSED = [
    (dict(query=[1.0]), TypeError, "query: expected a torch.Tensor, got list"),
    (dict(key=None), TypeError, "key: expected a torch.Tensor, got NoneType"),
    (dict(value=3), TypeError, "value: expected a torch.Tensor, got int"),
    (dict(value=None), TypeError, "value: expected a torch.Tensor, got NoneType"),
    (dict(query=z(B, NQ, D)), ValueError, "query: expected a tensor (B, H, Nq, D), or with more batch axes, got shape (2, 3, 8)"),
    (dict(key=z(B, H, 1, NK, D)), ValueError, "key: expected shape (B, Hkv, Nk, D) with B = 2 and D = 8, got (2, 4, 1, 5, 8)"),
    (dict(value=z(NK, 6)), ValueError, "value: expected a tensor (B, Hkv, Nk, Dv), or with more batch axes, got shape (5, 6)"),
    (dict(query=z(B, H, NQ, D).int()), ValueError, "query: expected dtype float16, bfloat16, float32 or float64, got torch.int32"),
    (dict(query=z(B, H, NQ, D).cfloat()), ValueError,
     "query: expected dtype float16, bfloat16, float32 or float64, got torch.complex64"),
    (dict(key=z(B, H, NK, D).double()), ValueError, "key: expected query's dtype torch.float32, got torch.float64"),
    (dict(value=z(B, H, NK, 6).half()), ValueError, "value: expected query's dtype torch.float32, got torch.float16"),
    (dict(key=z(B, H, NK, D, device=META)), ValueError, "key: expected query's device cpu, got meta"),
    (dict(value=z(B, H, NK, 6, device=META)), ValueError, "value: expected query's device cpu, got meta"),
    (dict(mask=z(B, NQ, NK, device=META)), ValueError, "mask: expected query's device cpu, got meta"),
    (dict(alpha=z(H, device=META)), ValueError, "alpha: expected query's device cpu, got meta"),
    (dict(key_padding_mask=z(B, NK, device=META) > 0), ValueError, "key_padding_mask: expected query's device cpu, got meta"),
    (dict(query=z(B, H, NQ, D).to_sparse()), ValueError, "query: expected a dense tensor, got torch.sparse_coo"),
    (dict(mask=torch.nested.nested_tensor([z(NQ, NK), z(NQ, NK)])), ValueError, "mask: expected a dense tensor, got a nested one"),
    (dict(enable_gqa="no"), TypeError, "enable_gqa: expected a bool, got str"),
    (dict(alpha=float("nan")), ValueError, "alpha: expected a number that torch.float32 can hold, got nan"),
    (dict(alpha=1e300), ValueError, "alpha: expected a number that torch.float32 can hold, got 1e+300"),
    (dict(alpha=10**39), ValueError, "alpha: expected a number that torch.float32 can hold, got 1000000000000000000000000000000000000000"),
    (dict(query=z(B, 0, NQ, D)), ValueError, "query: expected at least one head and a head size of at least 1, got shape (2, 0, 3, 8)"),
    (dict(key=z(B, H, NK, 0)), ValueError, "key: expected at least one head and a head size of at least 1, got shape (2, 4, 5, 0)"),
    (dict(value=z(B, H, NK, 0)), ValueError, "value: expected at least one head and a head size of at least 1, got shape (2, 4, 5, 0)"),
    (dict(key=z(3, H, NK, D)), ValueError, "key: expected shape (B, Hkv, Nk, D) with B = 2 and D = 8, got (3, 4, 5, 8)"),
    (dict(key=z(B, H, NK, 9)), ValueError, "key: expected shape (B, Hkv, Nk, D) with B = 2 and D = 8, got (2, 4, 5, 9)"),
    (dict(value=z(B, H, 6, 6)), ValueError, "value: expected shape (B, Hkv, Nk, Dv) with (B, Hkv, Nk) = (2, 4, 5), got (2, 4, 6, 6)"),
    (dict(value=z(B, 2, NK, 6)), ValueError, "value: expected shape (B, Hkv, Nk, Dv) with (B, Hkv, Nk) = (2, 4, 5), got (2, 2, 5, 6)"),
    (dict(key=z(B, 2, NK, D), value=z(B, 2, NK, 6)), ValueError,
     "key: expected as many heads as query, 4 (fewer need enable_gqa=True), got 2"),
    (dict(key=z(B, 3, NK, D), value=z(B, 3, NK, 6), enable_gqa=True), ValueError,
     "key: expected a number of heads that divides query's 4, got 3"),
    (dict(key=z(B, 8, NK, D), value=z(B, 8, NK, 6), enable_gqa=True), ValueError,
     "key: expected a number of heads that divides query's 4, got 8"),
    (dict(mask=None), ValueError, "alpha: expected None when there is no mask, got an alpha"),
    (dict(mask=[[1.0]]), TypeError, "mask: expected a torch.Tensor, got list"),
    (dict(mask=z(B, NQ, NK).bool()), ValueError,
     "mask: expected dtype float16, bfloat16, float32 or float64, got torch.bool (where True is to be attended: *"),
    (dict(mask=z(NQ, NK)), ValueError, "mask: expected *, got (3, 5) (to share it along the batch: mask[None])"),
    (dict(mask=z(1, 1, 1, NQ, NK)), ValueError, "mask: expected *, got (1, 1, 1, 3, 5)"),
    (dict(mask=z(H, NQ, NK)), ValueError, "mask: expected *, got (4, 3, 5) (to share it along the batch: mask[None])"),
    (dict(mask=z(B, 2, NK)), ValueError, "mask: expected *, got (2, 2, 5)"),
    (dict(mask=z(B, NQ, 1)), ValueError, "mask: expected *, got (2, 3, 1)"),
    (dict(mask=z(B, 2, NQ, NK)), ValueError, "mask: expected *, got (2, 2, 3, 5)"),
    (dict(mask=z(3, 1, NQ, NK)), ValueError, "mask: expected *, got (3, 1, 3, 5)"),
    (dict(alpha="32"), TypeError, "alpha: expected a float or a tensor, got str"),
    (dict(alpha=True), TypeError, "alpha: expected a float or a tensor, got bool"),
    (dict(alpha=z(H, dtype=torch.int64)), ValueError, "alpha: expected dtype float16, bfloat16, float32 or float64, got torch.int64"),
    (dict(alpha=z(3)), ValueError, "alpha: expected shape () or (H,) = (4,), got (3,)"),
    (dict(alpha=z(1)), ValueError, "alpha: expected shape () or (H,) = (4,), got (1,)"),
    (dict(alpha=z(H, 1, 1)), ValueError, "alpha: expected shape () or (H,) = (4,), got (4, 1, 1)"),
    (dict(mask_logits=z(B, NQ, NK)), ValueError, "mask_logits: expected None when mask is given, got both"),
    (dict(mask=None, mask_logits=z(H, NQ, NK)), ValueError,
     "mask_logits: expected *, got (4, 3, 5) (to share it along the batch: mask_logits[None])"),
    (dict(mask=None, mask_logits=z(B, NQ, NK).bool()), ValueError,
     "mask_logits: expected dtype float16, bfloat16, float32 or float64, got torch.bool"),
    (dict(query=z(2, 3, 2, H, NQ, D), key=z(2, 3, 2, H, NK, D), value=z(2, 3, 2, H, NK, 6), mask=z(2, 1, 2, H, NQ, NK)), ValueError,
     "mask: expected batch axes that are all of size 1 up to one place and not after it, or the reverse, and whose strides merge, got *"),
    (dict(key_padding_mask=z(B, 1, NK).bool(), query=z(B, 1, H, NQ, D), key=z(B, 1, H, NK, D), value=z(B, 1, H, NK, 6), mask=None,
          alpha=None, dropout_p=1.0), ValueError, "dropout_p: expected a probability in [0, 1), got 1.0"),
    (dict(key_padding_mask=[True]), TypeError, "key_padding_mask: expected a torch.Tensor, got list"),
    (dict(key_padding_mask=z(B, NK)), ValueError, "key_padding_mask: expected dtype torch.bool, True = padding, got torch.float32"),
    (dict(key_padding_mask=z(B, 6).bool()), ValueError, "key_padding_mask: expected shape (B, Nk) = (2, 5), got (2, 6)"),
    (dict(key_padding_mask=z(1, NK).bool()), ValueError, "key_padding_mask: expected shape (B, Nk) = (2, 5), got (1, 5)"),
    (dict(key_padding_mask=z(B, 1, 1, NK).bool()), ValueError, "key_padding_mask: expected shape (B, Nk) = (2, 5), got (2, 1, 1, 5)"),
    (dict(scale="1"), TypeError, "scale: expected a float or None, got str"),
    (dict(scale=torch.ones(2)), ValueError, "scale: expected a float or None, got a tensor of shape (2,) and dtype torch.float32"),
    (dict(scale=torch.ones((), requires_grad=True)), ValueError,
     "scale: expected a float or None: a tensor only on the CPU and without requires_grad, got one on cpu"),
    (dict(dropout_p=torch.zeros((), device=META)), ValueError,
     "dropout_p: expected a float: a tensor only on the CPU and without requires_grad, got one on meta"),
    (dict(scale=10**400), ValueError, f"scale: expected a number that torch.float32 can hold, got {10**400}"),
    (dict(return_lse="no"), TypeError, "return_lse: expected a bool, got str"),
    (dict(scale=True), TypeError, "scale: expected a float or None, got bool"),
    (dict(dropout_p="0.1"), TypeError, "dropout_p: expected a float, got str"),
    (dict(dropout_p=None), TypeError, "dropout_p: expected a float, got NoneType"),
    (dict(dropout_p=1.0), ValueError, "dropout_p: expected a probability in [0, 1), got 1.0"),
    (dict(dropout_p=-0.1), ValueError, "dropout_p: expected a probability in [0, 1), got -0.1"),
    (dict(dropout_p=float("nan")), ValueError, "dropout_p: expected a probability in [0, 1), got nan"),
    (dict(backend="gpu"), ValueError, "backend: expected None or one of ('triton', 'cuda', 'cpu', 'reference'), got 'gpu'"),
    (dict(backend=""), ValueError, "backend: expected None or one of ('triton', 'cuda', 'cpu', 'reference'), got ''"),
]  # fmt: skip
MAP_REFUSED = [
    (dict(head_weights=0.5), TypeError, "head_weights: expected a torch.Tensor, got float"),
    (dict(head_weights=z(3)), ValueError, "head_weights: expected shape (H,) = (4,), got (3,)"),
    (dict(head_weights=z(())), ValueError, "head_weights: expected shape (H,) = (4,), got ()"),
    (dict(head_weights=z(H).int()), ValueError, "head_weights: expected dtype float16, bfloat16, float32 or float64, got torch.int32"),
    (dict(head_weights=z(H, device=META)), ValueError, "head_weights: expected query's device cpu, got meta"),
]
FOR_ATTENTION_ALONE = {"value", "dropout_p", "return_lse"}


def refusal(call, changes, error):
    with pytest.raises(error) as caught:
        call(**changes)
    assert type(caught.value) is error
    return caught.value


def attention(**changes):
    return soft_masked_attention(**(arguments() | changes))


def a_map(**changes):
    given = arguments() | changes
    del given["value"]
    return attention_map(**given)


def matches(message, pattern):
    """The message is this, word for word; a * stands for any shape."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".+"), message)


@pytest.mark.parametrize("changes, error, message", REFUSED, ids=[message[:60] for _, _, message in REFUSED])
def test_attention_refuses(changes, error, message):
    assert matches(str(refusal(attention, changes, error)), message)


@pytest.mark.parametrize("changes, error, message", [*MAP_REFUSED, *(r for r in REFUSED if not FOR_ATTENTION_ALONE & r[0].keys())])
def test_a_map_refuses(changes, error, message):
    assert matches(str(refusal(a_map, changes, error)), message)


def test_the_good_calls_are_good():
    assert attention(backend="reference").shape == (B, H, NQ, 6)
    assert a_map(backend="reference").shape == (B, NQ, NK)


def test_a_mask_is_refused_with_the_two_shapes_it_may_have():
    for wrong in (z(NQ, NK), z(H, NQ, NK), z(B, 2, NQ, NK)):
        message = str(refusal(attention, dict(mask=wrong), ValueError))
        assert "(B|1, Nq|1, Nk)" in message and "(B|1, H|1, Nq|1, Nk)" in message
        assert all(f"{name} = {size}" in message for name, size in (("B", B), ("H", H), ("Nq", NQ), ("Nk", NK)))


def test_every_refusal_of_the_source_is_in_the_table():
    """Each line of validate.py that refuses is reached by some row."""
    path = Path(validate.__file__)
    refusing = re.compile(r"^\s+(_refuse|_wrong_type|raise NotImplementedError)\(")
    in_source = {number for number, line in enumerate(path.read_text().splitlines(), 1) if refusing.match(line)}
    reached = set()
    for call, rows in ((attention, REFUSED), (a_map, MAP_REFUSED)):
        for changes, error, _ in rows:
            frames = traceback.extract_tb(refusal(call, changes, error).__traceback__)
            reached |= {frame.lineno for frame in frames if Path(frame.filename) == path}
    assert len(in_source) > 15 and in_source <= reached


def test_nothing_runs_before_a_refusal(monkeypatch):
    ops = importlib.import_module("smattn.ops")
    ran = []
    monkeypatch.setattr(ops, "forward", lambda *_: ran.append("forward"))
    monkeypatch.setattr(ops, "attention_map", lambda *_: ran.append("attention_map"))
    state = torch.get_rng_state()
    for changes, error, _ in [*REFUSED, (dict(backend="cuda"), ValueError, "")]:
        refusal(attention, dict(dropout_p=0.5) | changes, error)
    assert ran == [] and torch.equal(torch.get_rng_state(), state)


def test_a_refusal_inside_a_compiled_function_still_says_why():
    torch._dynamo.reset()
    compiled = torch.compile(soft_masked_attention, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="alpha"):
        compiled(**(arguments() | dict(alpha=z(3))))


A_PROBLEM = Problem(B, H, H, NQ, NK, D, D, torch.float32, None, None, DEVICE)


def table():
    return importlib.import_module("smattn.backends")


def test_an_explicit_backend_says_every_reason_it_cannot(device):
    wide = torch.zeros(1, 1, 1, 300, dtype=torch.float64, device=device)
    with pytest.raises(ValueError) as caught:
        soft_masked_attention(wide, wide, wide, backend="triton")
    message = str(caught.value)
    assert message.startswith("backend='triton' cannot run this call: ")
    assert "float64" in message and "300" in message and message.count(";") == 1


@pytest.mark.parametrize("name", ["triton", "cuda", "cpu", "reference"])
def test_an_explicit_backend_is_used_or_refused(name):
    reasons = next(row for row in table().TABLE if row.name == name).unsupported_reasons(A_PROBLEM, "forward")
    if reasons:
        with pytest.raises(ValueError, match=f"backend='{name}' cannot run this call: {re.escape('; '.join(reasons))}"):
            table().resolve(A_PROBLEM, name, "forward")
    else:
        row = next(row for row in table().TABLE if row.name == name)
        assert table().resolve(A_PROBLEM, name, "forward") is row.load()


def test_a_backend_without_attention_map_says_so(backend, device):
    there = {name: tensor.to(device) for name, tensor in arguments().items()}
    if BACKENDS[backend].attention_map:
        assert a_map(**there, backend=backend).shape == (B, NQ, NK)
    else:
        with pytest.raises(ValueError, match=f"backend='{backend}' cannot run this call: it has no attention_map"):
            a_map(**there, backend=backend)


def test_the_wrong_device_type_is_a_reason():
    with pytest.raises(ValueError, match="backend='cpu' cannot run this call: it does not run on device type 'cuda', only on cpu"):
        table().resolve(A_PROBLEM._replace(device_type="cuda"), "cpu", "forward")


@pytest.fixture
def only_the_reference(monkeypatch):
    """A machine where every other backend has a reason not to run."""
    backends = table()
    original = backends.Backend.unsupported_reasons
    monkeypatch.setattr(
        backends.Backend,
        "unsupported_reasons",
        lambda row, problem, operation: original(row, problem, operation) if row.name == "reference" else [f"no {row.name} today"],
    )
    backends._warn_once.cache_clear()
    yield
    backends._warn_once.cache_clear()


def test_none_warns_once_when_only_the_reference_can(only_the_reference):
    with pytest.warns(UserWarning, match="smattn runs on the reference, .* today"):
        first = attention()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(attention(), first)


@pytest.mark.parametrize("kind", ["function", "module", "checkpoint"])
def test_the_warning_points_at_the_line_that_called(only_the_reference, kind):
    x, mask = torch.zeros(1, 5, 8), torch.zeros(1, 5, 5)
    module = SoftMaskedAttention(8, 2)
    with pytest.warns(UserWarning, match="smattn runs on the reference") as caught:
        if kind == "function":
            attention()
        elif kind == "module":
            module(x, x, x, mask)
        else:
            torch.utils.checkpoint.checkpoint(module, x, x, x, mask, use_reentrant=False)
    assert [warning.filename for warning in caught] == [__file__]


def test_the_reference_asked_for_by_name_does_not_warn(only_the_reference):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attention(backend="reference").shape == (B, H, NQ, 6)
