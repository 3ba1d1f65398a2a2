"""smattn.nn's attention modules: HODOR's state dict, the formula, alpha, and the hard twin."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import smattn
from smattn.nn import HardMaskedAttention, SoftMaskedAttention, SoftMaskedTransformerLayer
from smattn.testing import Case, assert_within_budget
from tests.support.module_inputs import NK, NQ, WIDTH, B, tensors

pytestmark = pytest.mark.promise("modules")


def hodor_state(width, bias, g):
    """The state dict that HODOR saves of an attention module with 8 heads."""
    state = {"scaling_factors": torch.rand(8, generator=g) * 32, "out_proj.bias": torch.randn(width, generator=g)}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        state[f"{name}.weight"] = torch.randn(width, width, generator=g) / width**0.5
        if bias and name != "out_proj":
            state[f"{name}.bias"] = torch.randn(width, generator=g)
    return state


def as_hodor_writes_it(state, query, key, value, mask, padding, heads=8):
    """The published formula, with scores minus alpha * (1 - M), in float64."""
    state = {name: tensor.double() for name, tensor in state.items()}

    def project(name, x):
        return nn.functional.linear(x.double(), state[f"{name}.weight"], state.get(f"{name}.bias"))

    inputs = {"q_proj": query, "k_proj": key, "v_proj": value}
    q, k, v = (project(name, x).unflatten(-1, (heads, -1)).transpose(1, 2) for name, x in inputs.items())
    scores = q @ k.mT / q.shape[-1] ** 0.5 - state["scaling_factors"][:, None, None] * (1 - mask.double()[:, None])
    scores = scores.masked_fill(padding[:, None, None], float("-inf"))
    return project("out_proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("learnable_alpha", [True, False])
def test_a_state_dict_of_hodor_loads_and_computes_what_it_computed(bias, learnable_alpha):
    query, features, mask = tensors()
    state = hodor_state(WIDTH, bias, torch.Generator().manual_seed(1))
    module = SoftMaskedAttention(WIDTH, 8, bias=bias, learnable_alpha=learnable_alpha)
    module.load_state_dict(state)
    assert module.state_dict().keys() == state.keys()
    assert isinstance(module.scaling_factors, nn.Parameter) is learnable_alpha
    padding = torch.zeros(B, NK, dtype=torch.bool)
    padding[1, 15:] = True
    out = module(query, features, features + 1, mask, padding)
    expected = as_hodor_writes_it(state, query, features, features + 1, mask, padding)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)
    gradient = torch.autograd.grad(out.square().sum(), mask)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), mask)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("heads", [1, 2, 8, 16])
@pytest.mark.parametrize("padded", [False, True])
def test_the_module_is_within_the_error_budget_of_the_formula(heads, padded):
    query, features, mask = tensors()
    module = SoftMaskedAttention(WIDTH, heads)
    module.out_proj.load_state_dict({"weight": torch.eye(WIDTH), "bias": torch.zeros(WIDTH)})
    padding = (torch.rand(B, NK, generator=torch.Generator().manual_seed(2)) < 0.4) if padded else None
    out = module(query, features, features, mask, padding)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    dmask, dalpha = torch.autograd.grad(out, (mask, module.scaling_factors), dout)

    def heads_first(x):
        return x.detach().unflatten(-1, (heads, -1)).transpose(1, 2)

    case = Case(
        heads_first(module.q_proj(query)), heads_first(module.k_proj(features)), heads_first(module.v_proj(features)),
        mask.detach(), module.scaling_factors.detach(), heads_first(dout), key_padding_mask=padding,
    )  # fmt: skip
    assert_within_budget({"out": heads_first(out), "dmask": dmask, "dalpha": dalpha}, case)


def test_a_mask_per_head_and_one_for_the_whole_batch():
    query, features, mask = tensors()
    module = SoftMaskedAttention(WIDTH, 4)
    per_head = mask[:, None].expand(-1, 4, -1, -1)
    assert torch.equal(module(query, features, features, per_head), module(query, features, features, mask))
    shared = mask[:1, :1]
    assert torch.equal(module(query, features, features, shared), module(query, features, features, shared.expand(B, NQ, NK)))


def test_a_mask_of_zeros_is_attention_without_one():
    query, features, mask = tensors()
    module = SoftMaskedAttention(WIDTH, 4)
    twin = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
    twin.load_state_dict({
        "in_proj_weight": torch.cat([module.q_proj.weight, module.k_proj.weight, module.v_proj.weight]),
        "in_proj_bias": torch.cat([module.q_proj.bias, module.k_proj.bias, module.v_proj.bias]),
        "out_proj.weight": module.out_proj.weight,
        "out_proj.bias": module.out_proj.bias,
    })  # fmt: skip
    expected = twin(query, features, features, need_weights=False)[0]
    torch.testing.assert_close(module(query, features, features, torch.zeros_like(mask)), expected)


@pytest.mark.parametrize(
    "heads, alpha",
    [
        (8, [32, 32, 16, 16, 8, 8, 4, 4]),
        (4, [32, 16, 8, 4]),
        (2, [16, 4]),
        (1, [8]),
        (12, [32] * 3 + [16] * 3 + [8] * 3 + [4] * 3),
    ],
)
def test_alpha_is_spread_over_any_number_of_heads(heads, alpha):
    module = SoftMaskedAttention(24 * heads, heads)
    assert module.scaling_factors.tolist() == alpha and module.scaling_factors.dtype == torch.float32


def test_alpha_as_given():
    assert SoftMaskedAttention(8, 4, alpha_init=2).scaling_factors.tolist() == [2] * 4
    given = torch.tensor([1.0, 2.0])
    module = SoftMaskedAttention(8, 2, alpha_init=given)
    given.zero_()
    assert module.scaling_factors.tolist() == [1, 2]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (dict(embed_dim=10, num_heads=4), "embed_dim: expected a multiple of num_heads, got 10 and 4"),
        (dict(embed_dim=8, num_heads=0), "num_heads: expected a positive int, got 0"),
        (dict(embed_dim=8, num_heads=2, dropout=1.0), "dropout: expected a probability"),
        (dict(embed_dim=8, num_heads=4, alpha_init=[1.0, 2.0]), r"alpha_init: expected a number or 4 .* got shape \(2,\)"),
    ],
)
def test_the_module_refuses(arguments, says):
    with pytest.raises(ValueError, match=says):
        SoftMaskedAttention(**arguments)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (dict(num_heads=2.0), "num_heads: expected an int, got 2.0"),
        (dict(embed_dim="8"), "embed_dim: expected an int, got '8'"),
        (dict(alpha_init="32"), "alpha_init: expected a number or 4 of them, one a head, got '32'"),
        (dict(alpha_init=True), "alpha_init: expected a number or 4 .* got True"),
        (dict(alpha_init=[1.0, None]), r"alpha_init: expected a number or 4 .* got \[1.0, None\]"),
    ],
)
def test_the_module_refuses_a_wrong_type(arguments, says):
    with pytest.raises(TypeError, match=f"^{says}"):
        SoftMaskedAttention(**dict(embed_dim=8, num_heads=4) | arguments)


def test_the_hard_twin_sees_only_what_the_mask_covers():
    query, features, mask = tensors()
    module = HardMaskedAttention(WIDTH, 4)
    mask = (mask.detach() > 0.7).float()
    mask[0, 2] = 0
    mask[:, 1] = 0
    mask[:, 1, 3] = 0.6
    elsewhere = torch.where((mask > 0.5).any(1)[..., None], features, torch.randn_like(features))
    covered = (mask > 0.5).any(-1)  # (B, Nq)
    assert covered.sum() == B * NQ - 1
    out, changed = module(query, features, features, mask), module(query, elsewhere, elsewhere, mask)
    assert torch.equal(out[covered], changed[covered])
    only = module.out_proj(module.v_proj(features[:, 3]))  # the mask covers one key, and its value is read
    torch.testing.assert_close(out[:, 1], only)


@pytest.mark.parametrize("axes", [3, 4])
def test_the_hard_twin_unmasks_empty_rows(axes):
    query, features, mask = tensors()
    mask = mask.detach().clone()
    mask[0, 2] = 0.5  # not above the threshold
    padding = torch.zeros(B, NK, dtype=torch.bool)
    padding[1, :10] = True
    mask[1, 3] = torch.arange(NK) < 10  # covers nothing but padding
    module = HardMaskedAttention(WIDTH, 4)
    given = mask if axes == 3 else mask[:, None]
    out = module(query, features, features, given, padding)
    plain = SoftMaskedAttention(WIDTH, 4)
    plain.load_state_dict(module.state_dict(), strict=False)
    without = plain(query, features, features, torch.zeros_like(mask), padding)
    assert out.isfinite().all()
    for b, i in ((0, 2), (1, 3)):
        torch.testing.assert_close(out[b, i], without[b, i])
    assert not torch.allclose(out[0, 3], without[0, 3])


def test_dropout_is_of_training_alone():
    query, features, mask = tensors()
    module = SoftMaskedAttention(WIDTH, 4, dropout=0.5)
    assert not torch.equal(module(query, features, features, mask), module(query, features, features, mask))
    module.eval()
    assert torch.equal(module(query, features, features, mask), module(query, features, features, mask))


def test_autocast_leaves_mask_and_alpha_in_float32():
    query, features, mask = tensors()
    module = SoftMaskedAttention(WIDTH, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(query, features, features, mask)
    assert out.dtype == torch.bfloat16
    dmask, dalpha = torch.autograd.grad(out.float().square().sum(), (mask, module.scaling_factors))
    assert dmask.dtype == dalpha.dtype == torch.float32 and dmask.any() and dalpha.any()


def test_nn_is_there_with_the_package():
    assert smattn.nn.SoftMaskedAttention is SoftMaskedAttention


@pytest.mark.parametrize("module", [SoftMaskedAttention(WIDTH, 4), HardMaskedAttention(WIDTH, 4)], ids=lambda m: type(m).__name__)
def test_more_axes_than_one_of_the_batch_are_refused(module):
    """Axis 1 would be taken for the heads."""
    x, mask = torch.randn(2, 4, 4, WIDTH), torch.rand(2, 4, 4, 4)
    with pytest.raises(ValueError, match=r"query: expected shape \(B, N, embed_dim\) with embed_dim = 32, got \(2, 4, 4, "):
        module(x, x, x, mask)
    with pytest.raises(ValueError, match=r"key: expected shape \(B, N, embed_dim\) with"):
        module(x[0], x, x, mask)


@pytest.mark.parametrize("module", [SoftMaskedAttention(WIDTH, 4), HardMaskedAttention(WIDTH, 4)], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_another_width_is_refused(module, name):
    inputs = dict.fromkeys(("query", "key", "value"), torch.randn(2, 7, WIDTH)) | {name: torch.randn(2, 7, 12)}
    with pytest.raises(ValueError, match=rf"^{name}: expected shape \(B, N, embed_dim\) with embed_dim = 32, got \(2, 7, 12\)"):
        module(**inputs, mask=torch.rand(2, 7, 7))


@pytest.mark.parametrize("kind", [SoftMaskedAttention, HardMaskedAttention, SoftMaskedTransformerLayer])
def test_device_and_dtype_are_as_in_torchs_modules(kind):
    meta = kind(WIDTH, 4, device="meta", dtype=torch.bfloat16)
    twin = kind(WIDTH, 4).to("meta", torch.bfloat16)  # which leaves alpha in float32
    assert {name: (p.device, p.dtype) for name, p in meta.state_dict().items()} == {
        name: (p.device, p.dtype) for name, p in twin.state_dict().items()
    }
    double = kind(WIDTH, 4, dtype=torch.float64)
    assert {p.dtype for p in double.parameters()} == {torch.float64}
    x, mask = torch.randn(2, 7, WIDTH, dtype=torch.float64), torch.rand(2, 7, 7)
    features = (x,) if kind is SoftMaskedTransformerLayer else (x, x)
    assert double(x, *features, mask).dtype == torch.float64


@pytest.mark.parametrize(
    "padding", [torch.zeros(2, 7), torch.zeros(7, dtype=torch.bool), torch.zeros(2, 6, dtype=torch.bool), [[False] * 7] * 2], ids=str
)
def test_the_hard_twin_refuses_what_is_no_padding(padding):
    x = torch.randn(2, 7, WIDTH)
    with pytest.raises(ValueError, match=r"key_padding_mask: expected a torch.bool tensor \(B, Nk\) = \(2, 7\)"):
        HardMaskedAttention(WIDTH, 4)(x, x, x, torch.rand(2, 7, 7), padding)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mask", [None, torch.ones(7), torch.ones(3, 7), torch.ones(2, 3, 7, dtype=torch.int64)])
def test_the_hard_twin_refuses_what_its_sibling_refuses(mask, padded):
    module = HardMaskedAttention(WIDTH, 4)
    x = torch.randn(2, 7, WIDTH)
    with pytest.raises(ValueError, match="mask: expected"):
        module(x[:, :3], x, x, mask, torch.zeros(2, 7, dtype=torch.bool) if padded else None)
