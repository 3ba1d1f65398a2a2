"""Refuses well: where a wrong call is a likely mistake, its error says which; and modules refuse in the words of their own arguments."""

import math
import re
import warnings

import pytest
import torch
from torch import nn

import smattn
from smattn import attention_map, ops, soft_masked_attention
from smattn.backends import resolve
from smattn.integrations import SoftMaskedMultiheadAttention
from smattn.nn import HardMaskedAttention, SoftMaskedAttention, SoftMaskedTransformerLayer
from smattn.testing import make_case

pytestmark = pytest.mark.promise("refuses well")
B, H, NQ, NK, D = 2, 4, 6, 35, 8
FLATTEN = r"\(its last two axes hold 35 keys: flatten them, by mask.flatten\(-2\)\)"
SWAPPED = r"\(query and key look like \(B, N, H, D\): transpose axes 1 and 2\)"


def z(*shape, **kw):
    return torch.zeros(*shape, **kw)


def attend(q, k, v, mask=None, **kw):
    return soft_masked_attention(q, k, v, mask, None if mask is None else 1.0, **kw)


def map_of(q, k, _, mask=None, **kw):
    return attention_map(q, k, mask, None if mask is None else 1.0, **kw)


both = pytest.mark.parametrize("call", [attend, map_of])


@both
@pytest.mark.parametrize("shape", [(B, NQ, 5, 7), (1, NQ, 5, 7), (B, 1, 5, 7), (B, H, NQ, 5, 7), (B, 5, 7), (NQ, 5, 7)])
def test_a_mask_whose_keys_are_a_picture_is_to_be_flattened(call, shape):
    with pytest.raises(ValueError, match=rf"^mask: expected .*, got {tuple(shape)} ".replace("(", r"\(").replace(")", r"\)") + FLATTEN):
        call(z(B, H, NQ, D), *z(2, B, H, NK, D), z(*shape))


@both
def test_mask_logits_are_named_in_the_hint_as_the_argument_is(call):
    with pytest.raises(ValueError, match=r"mask_logits.flatten\(-2\)"):
        call(z(B, H, NQ, D), *z(2, B, H, NK, D), mask_logits=z(B, NQ, 5, 7))


@both
@pytest.mark.parametrize("mask", [(B, NQ, NK), (1, 1, NK), (B, H, NQ, NK), (1, 1, NQ, NK)])
def test_rows_before_heads_are_suspected_where_the_mask_fits_them(call, mask):
    with pytest.raises(ValueError, match=SWAPPED):
        call(z(B, NQ, H, D), *z(2, B, NQ, H, D), z(*mask[:-1], NQ))  # self-attention: everything but the mask fits
    with pytest.raises(ValueError, match=SWAPPED):
        call(z(B, NQ, H, D), *z(2, B, NK, H, D), z(*mask))


@both
def test_rows_before_heads_are_suspected_without_a_mask(call):
    with pytest.raises(ValueError, match="key: expected as many heads as query, 6 .*, got 35 " + SWAPPED):
        call(z(B, NQ, H, D), *z(2, B, NK, H, D))
    with pytest.raises(ValueError, match="key_padding_mask: expected .*, got .* " + SWAPPED):
        call(z(B, NK, H, D), *z(2, B, NK, H, D), key_padding_mask=z(B, NK).bool())


@both
def test_fewer_heads_in_key_than_in_query_are_no_swapped_axes(call):
    with pytest.raises(ValueError) as error:
        call(z(B, H, NQ, D), *z(2, B, 2, NQ, D))
    assert str(error.value) == "key: expected as many heads as query, 4 (fewer need enable_gqa=True), got 2"


@both
def test_a_boolean_mask_is_told_how_to_become_a_bias_or_a_soft_mask(call):
    with pytest.raises(ValueError, match=r"^mask: expected dtype .*, got torch.bool \(where True is to be attended: torch") as error:
        call(z(B, H, NQ, D), *z(2, B, H, NK, D), z(B, NQ, NK).bool())
    torch.manual_seed(0)
    q, k, v, mask = torch.randn(B, H, NQ, D), *torch.randn(2, B, H, NK, D), torch.rand(B, NQ, NK) > 0.5
    bias = re.search(r"torch.zeros_like\(.*-torch.inf\)", str(error.value))[0]
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    torch.testing.assert_close(soft_masked_attention(q, k, v, eval(bias)), expected)


@both
def test_numbers_for_alpha_are_to_be_a_tensor(call):
    q, k, v, mask = z(B, H, NQ, D), *z(2, B, H, NK, D), z(B, NQ, NK)
    arguments = (q, k, v, mask) if call is attend else (q, k, mask)
    for numbers in ([8.0] * H, (8.0,) * H):
        hint = r"\(for a number a head: torch.tensor\(alpha\), of shape \(4,\)\)"
        with pytest.raises(TypeError, match=f"^alpha: expected a float or a tensor, got {type(numbers).__name__} {hint}"):
            (soft_masked_attention if call is attend else attention_map)(*arguments, numbers)


@both
@pytest.mark.parametrize("name", ["mask", "mask_logits"])
@pytest.mark.parametrize("batch", [(B,), (2, 3)], ids=str)
@pytest.mark.parametrize("mask", [(NQ, NK), (1, NK), (H, NQ, NK), (H, 1, NK)], ids=str)
def test_a_mask_without_batch_axes_is_told_how_to_get_them(call, name, batch, mask):
    nones = ", ".join(["None"] * len(batch))
    q, k, v, given = z(*batch, H, NQ, D), *z(2, *batch, H, NK, D), z(*mask)
    with pytest.raises(ValueError, match=rf"^{name}: expected shape .* \(to share it along the batch: {name}\[{nones}\]\)$"):
        call(q, k, v, **{name: given})
    call(q, k, v, **{name: eval(f"given[{nones}]")})


@both
@pytest.mark.parametrize("batch", [(B,), (2, 3)], ids=str)
@pytest.mark.parametrize("rows", [1, NQ])
def test_a_mask_whose_heads_lie_in_the_batch_is_to_be_unflattened(call, batch, rows):
    q, k, v, mask = z(*batch, H, NQ, D), *z(2, *batch, H, NK, D), z(math.prod(batch) * H, rows, NK)
    sizes = str((*batch, H)).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"\(its first axis holds batch and heads: mask.unflatten\(0, {sizes}\)\)$"):
        call(q, k, v, mask)
    call(q, k, v, mask.unflatten(0, (*batch, H)))


def test_no_hint_that_does_not_fit():
    for mask in ((NQ + 1, NK), (NQ, NK - 1), (3, NQ, NK), (B * H, NQ + 1, NK), (NK,)):
        with pytest.raises(ValueError, match=r"^mask: expected shape .*, got [^[a-z]*$"):
            attend(z(B, H, NQ, D), *z(2, B, H, NK, D), z(*mask))


MODULES = [
    SoftMaskedAttention(16, H),
    HardMaskedAttention(16, H),
    *(SoftMaskedTransformerLayer(16, H, masking=masking) for masking in ("soft", "detached", "hard")),
]


def called(module, mask, **options):
    query, features = z(B, NQ, 16), z(B, NK, 16)
    return module(query, features, mask, **options) if isinstance(module, SoftMaskedTransformerLayer) else module(
        query, features, features, mask, **options
    )  # fmt: skip


@pytest.mark.parametrize("module", MODULES, ids=lambda m: getattr(m, "masking", type(m).__name__))
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "mask, says",
    [
        (None, "mask: expected a tensor .*, got NoneType"),
        (z(NQ, NK), r"mask: expected a tensor .*, got \(6, 35\) \(to share it along the batch: mask\[None\]\)"),
        (z(B, NQ, NK).bool(), r"mask: expected a floating dtype, got torch.bool \(as a soft mask: mask.float\(\)\)"),
        (z(B, NQ, 5, 7), r"mask: expected .*, got \(2, 6, 5, 7\) " + FLATTEN),
        (z(B, NQ, NK - 1), r"mask: expected .*, got \(2, 6, 34\)"),
    ],
    ids=["none", "two axes", "boolean", "picture", "keys"],
)
def test_a_module_names_its_mask(module, padded, mask, says):
    with pytest.raises(ValueError, match=says):
        called(module, mask, key_padding_mask=z(B, NK).bool() if padded else None)


@pytest.mark.parametrize(
    "attn_mask, error, says",
    [
        (z(NK, NQ), ValueError, r"attn_mask: expected shape \(Nq, Nk\) = \(6, 35\) or \(B \* H, Nq, Nk\) = \(8, 6, 35\), got \(35, 6\)"),
        (z(B, NQ, NK), ValueError, r"attn_mask: expected shape .*, got \(2, 6, 35\)"),
        (z(B, H, NQ, NK), ValueError, r"attn_mask: expected shape .*, got \(2, 4, 6, 35\)"),
        (z(1, NK), ValueError, r"attn_mask: expected shape .*, got \(1, 35\)"),
        (z(NK).bool(), ValueError, r"attn_mask: expected shape .*, got \(35,\)"),
        (z(NQ, NK).int(), ValueError, "attn_mask: expected dtype torch.bool or a floating one, got torch.int32"),
        ([[0.0]], TypeError, "attn_mask: expected a torch.Tensor, got list"),
    ],
)
@pytest.mark.parametrize("batch_first", [False, True])
def test_the_drop_in_names_attn_mask(attn_mask, error, says, batch_first):
    drop_in = SoftMaskedMultiheadAttention.from_module(nn.MultiheadAttention(16, H, batch_first=batch_first))
    query, features = (z(B, n, 16) if batch_first else z(n, B, 16) for n in (NQ, NK))
    with pytest.raises(error, match=says):
        drop_in(query, features, features, attn_mask=attn_mask)


def test_a_dtensor_is_sent_to_sharded_attention():
    from torch.distributed.tensor import DTensor, init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain = dict(query=z(B, H, NQ, D), key=z(B, H, NK, D), value=z(B, H, NK, D), mask=z(B, NQ, NK), alpha=z(H))
        for name, tensor in plain.items():
            for parameter in (False, True):
                given = DTensor.from_local(tensor, mesh)
                given = nn.Parameter(given) if parameter else given
                with pytest.raises(TypeError, match=f"{name}: expected .*smattn.distributed.sharded_attention.*, got DTensor"):
                    soft_masked_attention(**plain | {name: given})
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("device_type", ["mps", "xpu", "privateuseone"])
def test_the_reference_runs_on_every_device_and_says_what_else_was_tried(device_type):
    problem = make_case(1, 1, 1, 1, 1).problem()._replace(device_type=device_type)
    for operation in ("forward", "backward", "attention_map", "attention_map_backward"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert resolve(problem, "", operation) is resolve(problem, "reference", operation)
        assert all("reference" in str(w.message) and f"on device type '{device_type}'" in str(w.message) for w in caught)
    with pytest.raises(ValueError, match=f"'cpu' cannot run this call: it does not run on device type '{device_type}'"):
        resolve(problem, "cpu", "forward")


@pytest.mark.parametrize("key", ["CPU", "CUDA", "MPS", "XPU", "PrivateUse1"])
def test_the_operations_are_there_on_every_device(key):
    for op in (ops.forward, ops.backward, ops.attention_map, ops.attention_map_backward):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(op._schema.name, key)


def test_the_accelerator_that_torch_has_is_asked_for_backends(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("mps"))
    status = smattn.backends()
    assert status["reference"].available and "'mps'" in " ".join(status["cuda"].reasons)
