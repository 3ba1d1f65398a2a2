"""The raw ops torch.ops.smattn_cpu.* and torch.ops.smattn_cuda.*: the C++ side checks what it is handed before a kernel reads it."""

import pytest
import torch

from smattn import cpu
from smattn.call import remainder_dtype
from tests.support import emulated_cuda

pytestmark = pytest.mark.promise("refuses well")
B, H, HKV, NQ, NK, D, DV = 2, 4, 2, 3, 5, 8, 6
LIBRARIES = ("cpu", pytest.param("cuda", marks=pytest.mark.slow))  # CUDA's is built for a host: a minute of compiling comes first


def raw_op(library, name):
    """An op, and the arguments that only this library's takes."""
    if library == "cuda":
        return getattr(getattr(torch.ops, emulated_cuda.machine().ops), name), dict(allow_tf32=False, stream=0)
    if cpu.reasons():
        pytest.fail("\n".join(cpu.reasons()))
    return getattr(torch.ops.smattn_cpu, name), {}


def inputs():
    return dict(
        query=torch.randn(B, H, NQ, D), key=torch.randn(B, HKV, NK, D), value=torch.randn(B, HKV, NK, DV),
        mask=torch.rand(B, 1, 1, NQ, NK), mask_is_logits=False, alpha=torch.ones(H), key_padding_mask=None, seed=None,
        scale=0.3, dropout_p=0.0,
    )  # fmt: skip


def forward_arguments():
    rows, normalizer = torch.empty(B, H, NQ), torch.empty(B, H, NQ, 2)
    return inputs() | dict(out=torch.empty(B, H, NQ, DV), lse=rows, remainder=None, mbar=torch.empty_like(rows), normalizer=normalizer)


def backward_arguments():
    rows = torch.zeros(B, H, NQ)
    out = torch.zeros(B, H, NQ, DV)
    grads = {f"d{name}": torch.empty_like(t) for name, t in inputs().items() if isinstance(t, torch.Tensor)}
    saved = dict(out=out, remainder=None, lse=rows, mbar=rows.clone(), normalizer=torch.zeros(B, H, NQ, 2))
    return inputs() | dict(dout=torch.zeros_like(out), dlse=None) | saved | grads


def map_arguments():
    given = {name: inputs()[name] for name in ("query", "key", "mask", "mask_is_logits", "alpha", "key_padding_mask", "scale")}
    rows = dict(lse=torch.zeros(B, H, NQ), normalizer=torch.zeros(B, H, NQ, 2))
    return given | rows | dict(head_weights=torch.ones(H), map=torch.empty(B, NQ, NK))


def map_backward_arguments():
    arguments = map_arguments()
    del arguments["map"]
    grads = {f"d{name}": torch.empty_like(arguments[name]) for name in ("query", "key", "mask", "alpha", "head_weights")}
    return arguments | dict(dmap=torch.zeros(B, 1, NQ, NK)) | grads


OPS = {
    "forward": forward_arguments,
    "backward": backward_arguments,
    "attention_map": map_arguments,
    "attention_map_backward": map_backward_arguments,
}
EVERY = tuple(OPS)
BACKWARDS = ("backward", "attention_map_backward")
REFUSED = [
    (EVERY, dict(query=torch.zeros(H, NQ, D)), "query, key: expected 4 dimensions, got 3 and 4"),
    (EVERY, dict(query=torch.zeros(B, H, NQ, D, dtype=torch.int32)), "query: expected float16, bfloat16, float32 or float64"),
    (EVERY, dict(key=torch.zeros(B, 3, NK, D)), "key: expected a number of heads that divides query's 4, got 3"),
    (EVERY, dict(key=torch.zeros(B, HKV, NK, D + 1)), "key: expected size 8 on axis 3, got 9"),
    (EVERY, dict(key=torch.zeros(B, HKV, NK, D, dtype=torch.float64)), "key: expected query's dtype"),
    (EVERY, dict(alpha=None), "alpha: expected one exactly when there is a mask"),
    (EVERY, dict(alpha=torch.ones(H + 1)), "alpha: expected size 4 on axis 0, got 5"),
    (EVERY, dict(alpha=torch.ones(H, dtype=torch.float64)), "alpha: expected the accumulation dtype"),
    (EVERY, dict(mask=torch.zeros(B, 1, NQ, NK)), "mask: expected 5 dimensions, got 4"),
    (EVERY, dict(mask=torch.zeros(B, 1, 2, NQ, NK)), "mask: expected size 1 or query's, got 2, 1, 2, 3"),
    (EVERY, dict(mask=torch.zeros(B, 2, 1, NQ, NK)), "mask: expected size 1 or query's, got 2, 2, 1, 3"),
    (EVERY, dict(mask=torch.zeros(3, 1, 1, NQ, NK)), "mask: expected size 1 or query's, got 3, 1, 1, 3"),
    (EVERY, dict(mask=torch.zeros(B, 1, 1, NQ, NK + 1)), "mask: expected size 5 on axis 4, got 6"),
    (EVERY, dict(mask=torch.zeros(B, 1, 1, NQ, NK, dtype=torch.bool)), "mask: expected float16, bfloat16, float32 or float64"),
    (EVERY, dict(key_padding_mask=torch.zeros(B, NK + 1, dtype=torch.bool)), "key_padding_mask: expected size 5 on axis 1, got 6"),
    (EVERY, dict(key_padding_mask=torch.zeros(B, NK)), "key_padding_mask: expected bool"),
    (EVERY, dict(lse=torch.zeros(B, H, NQ + 1)), "lse: expected size 3 on axis 2, got 4"),
    (EVERY, dict(lse=torch.zeros(B, H, NQ, dtype=torch.float64)), "lse: expected a contiguous tensor of the dtype of its place"),
    (EVERY, dict(lse=torch.zeros(B, NQ, H).mT), "lse: expected a contiguous tensor of the dtype of its place"),
    (EVERY, dict(normalizer=torch.zeros(B, H, NQ, 1)), "normalizer: expected size 2 on axis 3, got 1"),
    (EVERY, dict(normalizer=torch.zeros(B, H, NQ, 2, dtype=torch.float64)), "normalizer: expected a contiguous tensor"),
    (EVERY[:2], dict(value=torch.zeros(B, HKV, NK + 1, DV)), "value: expected size 5 on axis 2, got 6"),
    (EVERY[:2], dict(value=torch.zeros(B, HKV, NK, DV, dtype=torch.float16)), "value: expected query's dtype"),
    (EVERY[:2], dict(dropout_p=0.5), "seed: expected one with dropout_p = 0.5"),
    (EVERY[:2], dict(dropout_p=1.0, seed=torch.tensor([0])), "dropout_p: expected 0 <= p < 1, got 1"),
    (EVERY[:2], dict(dropout_p=0.5, seed=torch.tensor([0.0])), "seed: expected one int64 element on query's device"),
    (EVERY[:2], dict(out=torch.zeros(B, H, NQ, DV + 1)), "out: expected size 6 on axis 3, got 7"),
    (EVERY[2:], dict(head_weights=torch.ones(H, dtype=torch.float64)), "head_weights: expected a contiguous tensor"),
    (("backward",), dict(dout=torch.zeros(B, H, NQ + 1, DV)), "dout: expected size 3 on axis 2, got 4"),
    (("backward",), dict(dout=torch.zeros(B, H, NQ, DV, dtype=torch.float16)), "dout: expected query's dtype"),
    (("backward",), dict(out=torch.zeros(B, H, NQ, DV, dtype=torch.float16)), "out: expected a contiguous tensor of the dtype"),
    (("backward",), dict(out=torch.zeros(B, NQ, H, DV).transpose(1, 2)), "out: expected a contiguous tensor of the dtype"),
    (("backward",), dict(remainder=torch.zeros(B, H, NQ, DV)), "remainder: expected exactly with an out of 16 bits"),
    (("backward",), dict(mbar=None), "mbar: expected with dalpha"),
    (BACKWARDS, dict(lse=None, normalizer=None), "lse: expected where there is no normalizer"),
    (BACKWARDS, dict(mask=None, alpha=None), "dmask, dalpha: expected none without a mask"),
    (("attention_map_backward",), dict(dmap=torch.zeros(B, 1, NQ, NK, dtype=torch.float64)), "dmap: expected the accumulation dtype"),
    (BACKWARDS, dict(dmask=torch.zeros(B, 1, 1, NQ, NK, dtype=torch.float64)), "dmask: expected a contiguous tensor"),
    (BACKWARDS, dict(dquery=torch.zeros(B, NQ, H, D).transpose(1, 2)), "dquery: expected a contiguous tensor"),
]
CASES = [(op, changed, message) for ops, changed, message in REFUSED for op in ops]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("op, changed, message", CASES, ids=[f"{op}: {message}" for op, _, message in CASES])
def test_a_raw_op_refuses(library, op, changed, message):
    call, where = raw_op(library, op)
    arguments = OPS[op]() | where
    assert call(**arguments) is None  # unchanged it runs
    with pytest.raises(RuntimeError, match=message):
        call(**arguments | changed)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("half, other", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.int16)])
def test_the_remainder_is_bits_of_bfloat16_and_a_float_of_float16(library, half, other):
    call, where = raw_op(library, "backward")
    arguments = backward_arguments() | where | dict(normalizer=None)
    for name in ("query", "key", "value", "out"):
        arguments |= {x: arguments[x].to(half) for x in (name, f"d{name}")}
    remainder = torch.zeros(B, H, NQ, DV, dtype=remainder_dtype(half))
    assert call(**arguments | dict(remainder=remainder)) is None
    for refused in (remainder.to(other), remainder.transpose(1, 2).contiguous().transpose(1, 2)):
        with pytest.raises(RuntimeError, match="remainder: expected a contiguous tensor of the dtype of its place"):
            call(**arguments | dict(remainder=refused))
    with pytest.raises(RuntimeError, match="normalizer: expected with float32 or float64 alone"):
        call(**arguments | dict(remainder=remainder, normalizer=torch.zeros(B, H, NQ, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("op", BACKWARDS)
def test_tf32_reads_lse_beside_a_normalizer_or_alone(op):
    call, where = raw_op("cuda", op)
    arguments = OPS[op]() | where | dict(allow_tf32=True)
    assert call(**arguments) is None and call(**arguments | dict(normalizer=None)) is None
    with pytest.raises(RuntimeError, match="lse: expected with allow_tf32"):
        call(**arguments | dict(lse=None))


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_the_cuda_ops_refuse_a_call_without_scores(op):
    """smattn/cuda.py answers such a call, because the kernels' grids would be empty."""
    call, where = raw_op("cuda", op)
    empty = {name: x[:0] if isinstance(x, torch.Tensor) and x.dim() > 1 else x for name, x in OPS[op]().items()}  # a batch of none
    with pytest.raises(RuntimeError, match="query, key: expected a batch, queries and keys, got 0, 3 and 5"):
        call(**empty | where)
