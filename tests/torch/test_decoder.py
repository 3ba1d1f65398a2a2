"""torch's transformer decoder with soft masks computes what torch's does without one, and hands a mask down to every layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from smattn.integrations import SoftMaskedTransformerDecoder, SoftMaskedTransformerDecoderLayer
from smattn.nn import parameter_groups

pytestmark = pytest.mark.promise("modules")
B, NQ, NK, WIDTH, H = 2, 4, 7, 16, 4
FORMS = [{}, {"batch_first": True}, {"batch_first": True, "norm_first": True}, {"activation": "gelu", "bias": False}]


def decoder(**form):
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(WIDTH, H, 32, dropout=0.0, **form)
    original = nn.TransformerDecoder(layer, 2, norm=nn.LayerNorm(WIDTH))
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return original


def inputs(batch_first):
    g = torch.Generator().manual_seed(1)
    tgt, memory = (torch.randn(B, n, WIDTH, generator=g) for n in (NQ, NK))
    return (tgt, memory) if batch_first else (tgt.transpose(0, 1), memory.transpose(0, 1))


def masks():
    padding = torch.zeros(B, NK, dtype=torch.bool)
    padding[1, -2:] = True
    causal = torch.ones(NQ, NQ).triu(1).bool()
    return {
        "nothing": {},
        "causal": {"tgt_mask": causal, "tgt_is_causal": True},
        "padding": {"memory_key_padding_mask": padding, "tgt_mask": causal},
        "pairs": {"memory_mask": torch.eye(NQ, NK).bool()},
    }


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("name", masks())
def test_without_a_soft_mask_it_is_the_original(form, name):
    original = decoder(**form)
    soft = SoftMaskedTransformerDecoder.from_module(original)
    given, options = inputs(form.get("batch_first", False)), masks()[name]
    results = []
    for module in (soft, original):
        out = module(*given, **options)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(original.parameters()))])  # the same parameters in both
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_mask_reaches_every_layer_and_has_a_gradient_from_each(norm_first):
    original = decoder(batch_first=True, norm_first=norm_first)
    soft, given = SoftMaskedTransformerDecoder.from_module(original, alpha_init=2.0), inputs(True)
    mask = torch.rand(B, NQ, NK, requires_grad=True)
    out = soft(*given, mask=mask)
    assert not torch.allclose(out, original(*given))
    alphas = [layer.multihead_attn.scaling_factors for layer in soft.layers]
    gradients = torch.autograd.grad(out.sin().sum(), [mask, *alphas])
    assert all(gradient.any() for gradient in gradients)
    torch.testing.assert_close(soft(*given, mask=torch.zeros(B, NQ, NK)), original(*given))
    added = 2.0 * mask.detach()[:, None].expand(B, H, NQ, NK).flatten(0, 1)
    torch.testing.assert_close(out, original(*given, memory_mask=added))


def test_the_original_stays_and_state_dicts_load_both_ways():
    original = decoder()
    kinds = [type(module) for module in original.modules()]
    soft = SoftMaskedTransformerDecoder.from_module(original, learnable_alpha=False)
    assert [type(module) for module in original.modules()] == kinds
    assert {id(p) for p in soft.parameters()} == {id(p) for p in original.parameters()}
    added = {f"layers.{i}.multihead_attn.scaling_factors" for i in range(2)}
    assert set(soft.state_dict()) - set(original.state_dict()) == added
    soft.load_state_dict(copy.deepcopy(original.state_dict()))
    assert len(parameter_groups(soft, alpha_lr=1.0)) == 1  # there is no alpha to learn
    soft.eval()
    assert original.training and not soft.training and not soft.layers[0].training
    twin = copy.deepcopy(soft)
    assert torch.equal(twin(*inputs(False)), soft(*inputs(False)))


def test_hooks_and_buffers_of_one_are_not_the_others():
    original = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 32), 1)
    soft = SoftMaskedTransformerDecoder.from_module(original)
    soft.register_forward_hook(lambda *_: None)
    soft.layers[0].register_buffer("seen", torch.zeros(()))
    assert not original._forward_hooks and "seen" not in dict(original.named_buffers(recurse=True)) and not original.layers[0]._buffers


def test_one_layer_and_what_is_refused():
    layer = nn.TransformerDecoderLayer(WIDTH, H, 32, dropout=0.0, batch_first=True)
    soft, given = SoftMaskedTransformerDecoderLayer.from_module(layer), inputs(True)
    torch.testing.assert_close(soft(*given), layer(*given))
    with pytest.raises(ValueError, match="attn_mask: expected None when mask is given"):
        soft(*given, memory_mask=torch.zeros(NQ, NK), mask=torch.rand(B, NQ, NK))
    with pytest.raises(ValueError, match="mask: expected shape"):
        soft(*given, mask=torch.rand(B, NK, NQ))
