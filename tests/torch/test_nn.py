"""smattn.nn: HODOR's state dict, equality with the formula, the hard twin, the layer, alpha's parameter group."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import smattn
from smattn.nn import HardMaskedAttention, SoftMaskedAttention, SoftMaskedTransformerLayer, parameter_groups
from smattn.testing import Case, assert_within_budget

pytestmark = pytest.mark.promise("modules")
B, NQ, NK, WIDTH = 2, 5, 23, 32


def tensors(width=WIDTH, rng=0):
    """query (B, Nq, width), features (B, Nk, width) and a mask (B, Nq, Nk)."""
    g = torch.Generator().manual_seed(rng)
    return (
        torch.randn(B, NQ, width, generator=g),
        torch.randn(B, NK, width, generator=g),
        torch.rand(B, NQ, NK, generator=g).requires_grad_(),
    )


def hodor_state(width, bias, g):
    """What HODOR saves of an attention module with 8 heads."""
    state = {"scaling_factors": torch.rand(8, generator=g) * 32, "out_proj.bias": torch.randn(width, generator=g)}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        state[f"{name}.weight"] = torch.randn(width, width, generator=g) / width**0.5
        if bias and name != "out_proj":
            state[f"{name}.bias"] = torch.randn(width, generator=g)
    return state


def as_hodor_writes_it(state, query, key, value, mask, padding, heads=8):
    """The published formula, scores minus alpha * (1 - M), in float64."""
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
        (dict(embed_dim=8, num_heads=0), "embed_dim"),
        (dict(embed_dim=8, num_heads=2, dropout=1.0), "dropout: expected a probability"),
        (dict(embed_dim=8, num_heads=4, alpha_init=[1.0, 2.0]), r"alpha_init: expected a number or 4 .* got shape \(2,\)"),
    ],
)
def test_the_module_refuses(arguments, says):
    with pytest.raises(ValueError, match=says):
        SoftMaskedAttention(**arguments)


def test_the_layer_refuses_an_unknown_masking():
    with pytest.raises(ValueError, match="masking: expected one of soft, detached, hard, none, got 'sofft'"):
        SoftMaskedTransformerLayer(8, 2, masking="sofft")


def gradient_of_mask(module, *arguments):
    """The mask's gradient, None when nothing reaches it."""
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
    assert torch.equal(pre(query, features, mask), query)  # the residual passes by the norms


def test_positions_steer_who_looks_where_but_are_not_read():
    query, features, mask = tensors()
    layer = SoftMaskedTransformerLayer(WIDTH, 4)
    pos = torch.randn(NK, WIDTH, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(layer(query, features, mask, features_pos=pos), layer(query, features, mask))
    assert not torch.equal(layer(query, features, mask, query_pos=pos[:NQ]), layer(query, features, mask))
    constant = torch.zeros_like(features)  # nothing to read: keys alone differ, and every query reads the same
    expected = layer(query, constant, mask)
    torch.testing.assert_close(layer(query, constant, mask, features_pos=pos), expected)


def test_a_padded_query_is_seen_by_no_other():
    query, features, mask = tensors()
    layer = SoftMaskedTransformerLayer(WIDTH, 4)
    padding = torch.tensor([[False] * 4 + [True], [False] * 5])
    out = layer(query, features, mask, query_padding_mask=padding)
    torch.testing.assert_close(out[0, :4], layer(query[:, :4], features, mask[:, :4])[0])
    torch.testing.assert_close(out[1], layer(query, features, mask)[1])


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
    only = module.out_proj(module.v_proj(features[:, 3]))  # one key covered: its value is what is read
    torch.testing.assert_close(out[:, 1], only)


@pytest.mark.parametrize("axes", [3, 4])
def test_the_hard_twin_unmasks_empty_rows(axes):
    query, features, mask = tensors()
    mask = mask.detach().clone()
    mask[0, 2] = 0.5  # not above
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


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mask", [None, torch.ones(7), torch.ones(3, 7)])
def test_the_hard_twin_refuses_what_its_sibling_refuses(mask, padded):
    module = HardMaskedAttention(WIDTH, 4)
    x = torch.randn(2, 7, WIDTH)
    with pytest.raises(ValueError, match="mask: expected"):
        module(x[:, :3], x, x, mask, torch.zeros(2, 7, dtype=torch.bool) if padded else None)
