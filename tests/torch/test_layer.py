"""smattn.nn.SoftMaskedTransformerLayer: its ways of masking, its norms and positions, and the parameter group of alpha."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn

from smattn.nn import SoftMaskedTransformerLayer, parameter_groups
from tests.support.module_inputs import NK, NQ, WIDTH, B, tensors

pytestmark = pytest.mark.promise("modules")


def test_the_layer_refuses_an_unknown_masking():
    with pytest.raises(ValueError, match="masking: expected one of soft, detached, hard, none, got 'sofft'"):
        SoftMaskedTransformerLayer(8, 2, masking="sofft")


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    "changed, says",
    [
        (dict(query=torch.zeros(B, NQ, 12)), "query: expected shape (B, N, embed_dim) with embed_dim = 32, got (2, 5, 12)"),
        (dict(features=torch.zeros(B, NK, 12)), "features: expected shape (B, N, embed_dim) with embed_dim = 32, got (2, 23, 12)"),
        (dict(features_pos=torch.zeros(22, 32)), "features_pos: expected a shape that broadcasts to (2, 23, 32), got (22, 32)"),
        (dict(features_pos=torch.zeros(3, NK, 32)), "features_pos: expected a shape that broadcasts to (2, 23, 32), got (3, 23, 32)"),
        (dict(query_pos=torch.zeros(1, 1, 1, 32)), "query_pos: expected a shape that broadcasts to (2, 5, 32), got (1, 1, 1, 32)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_layer_names_what_does_not_fit(changed, says, norm_first):
    query, features, mask = tensors()
    with pytest.raises(ValueError, match=re.escape(says)):
        SoftMaskedTransformerLayer(WIDTH, 4, norm_first=norm_first)(**dict(query=query, features=features, mask=mask) | changed)


def gradient_of_mask(module, *arguments):
    """The gradient of the mask, or None when none reaches it."""
    mask = arguments[-1]
    return torch.autograd.grad(module(*arguments).square().sum(), mask, allow_unused=True)[0]


@pytest.mark.parametrize("masking", ["soft", "detached", "hard", "none"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_which_masking_lets_a_gradient_reach_the_mask(masking, norm_first):
    query, features, mask = tensors()
    layer = SoftMaskedTransformerLayer(WIDTH, 4, masking=masking, norm_first=norm_first)
    gradient = gradient_of_mask(layer, query, features, mask)
    assert (gradient is not None) == (masking == "soft")
    layer(query, features, mask).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("masking, follows", [("soft", True), ("detached", True), ("hard", True), ("none", False)])
def test_which_masking_follows_the_mask(masking, follows):
    query, features, mask = tensors()
    layer = SoftMaskedTransformerLayer(WIDTH, 4, masking=masking)
    assert torch.equal(layer(query, features, mask), layer(query, features, 1 - mask)) is not follows


def test_soft_and_detached_compute_the_same():
    query, features, mask = tensors()
    soft, detached = (SoftMaskedTransformerLayer(WIDTH, 4, masking=masking) for masking in ("soft", "detached"))
    detached.load_state_dict(soft.state_dict())
    assert torch.equal(soft(query, features, mask), detached(query, features, mask))


def test_the_layer_is_post_norm_unless_asked():
    query, features, mask = tensors()
    post, pre = (SoftMaskedTransformerLayer(WIDTH, 4, norm_first=norm_first) for norm_first in (False, True))
    out = post(query, features, mask)
    torch.testing.assert_close(out.mean(-1), torch.zeros(B, NQ), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.std(-1, correction=0), torch.ones(B, NQ), rtol=0, atol=1e-3)
    for projection in (pre.self_attention.out_proj, pre.cross_attention.out_proj, pre.feed_forward[-1]):
        nn.init.zeros_(projection.weight)
        nn.init.zeros_(projection.bias)
    assert torch.equal(pre(query, features, mask), query)  # the residual passes the norms by


def test_positions_steer_who_looks_where_but_are_not_read():
    query, features, mask = tensors()
    layer = SoftMaskedTransformerLayer(WIDTH, 4)
    pos = torch.randn(NK, WIDTH, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(layer(query, features, mask, features_pos=pos), layer(query, features, mask))
    assert not torch.equal(layer(query, features, mask, query_pos=pos[:NQ]), layer(query, features, mask))
    constant = torch.zeros_like(features)  # only keys differ, so that every query reads the same
    expected = layer(query, constant, mask)
    torch.testing.assert_close(layer(query, constant, mask, features_pos=pos), expected)


def test_a_padded_query_is_seen_by_no_other():
    query, features, mask = tensors()
    layer = SoftMaskedTransformerLayer(WIDTH, 4)
    padding = torch.tensor([[False] * 4 + [True], [False] * 5])
    out = layer(query, features, mask, query_padding_mask=padding)
    torch.testing.assert_close(out[0, :4], layer(query[:, :4], features, mask[:, :4])[0])
    torch.testing.assert_close(out[1], layer(query, features, mask)[1])


def test_alpha_has_a_learning_rate_of_its_own_and_no_decay():
    layers = nn.ModuleList([SoftMaskedTransformerLayer(WIDTH, 4), SoftMaskedTransformerLayer(WIDTH, 4, learnable_alpha=False)])
    layers[0].norms[0].weight.requires_grad_(False)
    others, alphas = parameter_groups(layers, alpha_lr=0.1)
    assert [id(p) for p in alphas["params"]] == [id(layers[0].cross_attention.scaling_factors)]
    trained = {id(p) for p in layers.parameters() if p.requires_grad}
    assert {id(p) for p in others["params"] + alphas["params"]} == trained and len(others["params"]) == len(trained) - 1
    optimizer = torch.optim.AdamW([others, alphas], lr=1e-3, weight_decay=0.5)
    before = layers[0].cross_attention.scaling_factors.detach().clone()
    for p in layers.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(layers[0].cross_attention.scaling_factors, before)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 0.1]


def test_a_model_without_alpha_has_one_group():
    (only,) = parameter_groups(SoftMaskedTransformerLayer(WIDTH, 4, masking="hard"), alpha_lr=0.1)
    assert only.keys() == {"params"}


@pytest.mark.parametrize("masking", ["soft", "hard"])
def test_a_layer_compiles_in_one_graph(masking):
    torch._dynamo.reset()
    query, features, mask = tensors()
    layer = SoftMaskedTransformerLayer(WIDTH, 4, masking=masking)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    out, expected = compiled(query, features, mask), layer(query, features, mask)
    torch.testing.assert_close(out, expected)
    parameters = list(layer.parameters())
    grads, expected_grads = (torch.autograd.grad(x.square().sum(), parameters) for x in (out, expected))
    torch.testing.assert_close(grads, expected_grads)
    assert len(parameter_groups(compiled, alpha_lr=0.1)[0]["params"]) == len(parameters) - (masking == "soft")


def test_a_layer_is_copied_and_pickled():
    query, features, mask = tensors()
    layer = SoftMaskedTransformerLayer(WIDTH, 4)
    expected = layer(query, features, mask)
    saved = io.BytesIO()
    torch.save(layer.state_dict(), saved)
    saved.seek(0)
    loaded = SoftMaskedTransformerLayer(WIDTH, 4)
    loaded.load_state_dict(torch.load(saved, weights_only=True))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(twin(query, features, mask), expected)
