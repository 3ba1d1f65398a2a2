"""The drop-in for nn.MultiheadAttention computes the same, loads the same state, and takes a soft mask."""

import copy
import pickle

import pytest
import torch
from torch import nn

import smattn
from smattn.integrations import SoftMaskedMultiheadAttention

pytestmark = pytest.mark.promise("modules")
B, NQ, NK, WIDTH, H = 2, 3, 7, 8, 4
FORMS = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"kdim": 5, "vdim": 6, "batch_first": True},
]


def pair(**form):
    torch.manual_seed(0)
    original = nn.MultiheadAttention(WIDTH, H, **form)
    with torch.no_grad():
        for parameter in original.parameters():  # otherwise biases are zeros
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return original, SoftMaskedMultiheadAttention.from_module(original)


def inputs(module):
    shapes = (NQ, WIDTH), (NK, module.kdim), (NK, module.vdim)
    return [torch.randn(*((B, n) if module.batch_first else (n, B)), width) for n, width in shapes]


def masks():
    padding = torch.zeros(B, NK, dtype=torch.bool)
    padding[1, -2:] = True
    pairs = torch.rand(B * H, NQ, NK) < 0.3
    pairs[..., 0] = False
    return {
        "nothing": {},
        "padding": {"key_padding_mask": padding},
        "pairs": {"attn_mask": pairs[0]},
        "pairs a head": {"attn_mask": pairs},
        "added": {"attn_mask": torch.randn(NQ, NK), "key_padding_mask": padding},
        "causal": {"attn_mask": torch.ones(NQ, NK).triu(1).bool(), "is_causal": True},
    }


def parameters(module):
    """The parameters that an nn.MultiheadAttention has too."""
    return [p for name, p in module.named_parameters() if name != "scaling_factors"]


def gradients(module, tensors, options):
    out, weights = module(*tensors, **options)
    return [out, weights, *torch.autograd.grad(out.square().sum(), parameters(module))]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("name", masks())
def test_without_a_soft_mask_it_is_the_original(form, name):
    original, drop_in = pair(**form)
    original.double()  # the drop-in has the same parameters
    tensors = [t.double() for t in inputs(original)]
    options = {kind: t.double() if kind == "attn_mask" and t.is_floating_point() else t for kind, t in masks()[name].items()}
    if "attn_mask" in options and "key_padding_mask" in options:  # torch wants both of one dtype
        padding = options["key_padding_mask"]
        added = torch.zeros(B, NK).double().masked_fill(padding, float("-inf"))
        expected = gradients(original, tensors, {**options, "key_padding_mask": added})
    else:
        expected = gradients(original, tensors, options)
    for got, want in zip(gradients(drop_in, tensors, options), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_under_a_soft_mask_it_is_the_module_of_smattn():
    original, drop_in = pair(batch_first=True)
    module = smattn.nn.SoftMaskedAttention(WIDTH, H)
    weights, biases = original.in_proj_weight.chunk(3), original.in_proj_bias.chunk(3)
    state = {f"{n}_proj.{kind}": t for kind, ts in (("weight", weights), ("bias", biases)) for n, t in zip("qkv", ts, strict=True)}
    state |= {f"out_proj.{name}": t for name, t in original.out_proj.state_dict().items()}
    module.load_state_dict(state | {"scaling_factors": drop_in.scaling_factors})
    tensors, mask = inputs(original), torch.rand(B, NQ, NK, requires_grad=True)
    out, attended = drop_in(*tensors, mask=mask)
    expected = module(*tensors, mask)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(attended.sum(-1), torch.ones(B, NQ))
    for got, want in zip(*(torch.autograd.grad(o.square().sum(), mask) for o in (out, expected)), strict=True):
        torch.testing.assert_close(got, want)


def test_parameters_are_shared_and_state_dicts_load_both_ways():
    original, drop_in = pair()
    assert all(a is b for a, b in zip(parameters(original), parameters(drop_in), strict=True))
    assert set(drop_in.state_dict()) == {*original.state_dict(), "scaling_factors"}
    alpha = drop_in.scaling_factors.detach().clone()
    drop_in.load_state_dict({name: t + 1 for name, t in original.state_dict().items()})
    assert torch.equal(drop_in.scaling_factors, alpha)
    drop_in.load_state_dict({name: t + 1 for name, t in drop_in.state_dict().items()})
    assert torch.equal(drop_in.scaling_factors, alpha + 1)
    with pytest.raises(RuntimeError, match="in_proj_weight"):
        drop_in.load_state_dict({"scaling_factors": alpha})
    assert [group["lr"] for group in smattn.nn.parameter_groups(drop_in, alpha_lr=0.5) if "lr" in group] == [0.5]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_it_is_copied_and_pickled(copied):
    original, drop_in = pair()
    tensors, mask = inputs(original), torch.rand(B, NQ, NK)
    assert torch.equal(copied(drop_in)(*tensors, mask=mask)[0], drop_in(*tensors, mask=mask)[0])


def test_it_serves_inside_torchs_decoder_layer():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(WIDTH, H, batch_first=True, dropout=0.0)
    tensors = torch.rand(B, NQ, WIDTH), torch.rand(B, NK, WIDTH)
    expected = layer(*tensors)
    layer.multihead_attn = SoftMaskedMultiheadAttention.from_module(layer.multihead_attn)
    layer.self_attn = SoftMaskedMultiheadAttention.from_module(layer.self_attn)
    torch.testing.assert_close(layer(*tensors), expected)


def test_it_serves_inside_torchs_encoder_layer_with_padding():
    """The layer makes a floating mask of a boolean one before it calls the attention."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    x, padding = torch.randn(2, 5, 16), torch.arange(5) >= torch.tensor([[3], [5]])
    expected = layer(x, src_key_padding_mask=padding)
    layer.self_attn = SoftMaskedMultiheadAttention.from_module(layer.self_attn)
    torch.testing.assert_close(layer(x, src_key_padding_mask=padding), expected)
    with pytest.raises(RuntimeError, match="key_padding_mask: expected 0 and -inf"):
        layer(x, src_key_padding_mask=padding * 0.5)


def test_a_parametrized_module_is_refused():
    module = nn.utils.parametrizations.weight_norm(nn.MultiheadAttention(16, 4), "in_proj_weight")
    with pytest.raises(ValueError, match="module: expected parameters of its own"):
        SoftMaskedMultiheadAttention.from_module(module)


def test_dropout_is_of_training_alone():
    original, drop_in = pair(dropout=0.5)
    tensors = inputs(original)
    assert not torch.equal(drop_in(*tensors)[0], drop_in(*tensors)[0])
    drop_in.eval()
    assert torch.equal(drop_in(*tensors)[0], drop_in(*tensors)[0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"average_attn_weights": False}, "average_attn_weights: expected True"),
        ({"is_causal": True}, "attn_mask: expected one beside is_causal"),
        ({"mask": torch.rand(B, NQ, NK), "attn_mask": torch.zeros(NQ, NK)}, "attn_mask: expected None when mask is given"),
        ({"mask": torch.rand(NQ, NK)}, "mask: expected shape"),
    ],
)
def test_it_refuses(options, message):
    original, drop_in = pair()
    with pytest.raises(ValueError, match=message):
        drop_in(*inputs(original), **options)
    with pytest.raises(ValueError, match="query: expected a batched"):
        drop_in(*(t[:, 0] for t in inputs(original)))


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_batch_on_another_axis_than_the_module_says_is_refused(batch_first):
    _, drop_in = pair(batch_first=batch_first)
    query, memory, _ = (x.transpose(0, 1) for x in inputs(drop_in))
    form, said = (r"\(B, N, E\)" if batch_first else r"\(N, B, E\)"), rf"\(the module has batch_first={batch_first}\)$"
    with pytest.raises(ValueError, match=rf"^key: expected shape {form} with B = 3 and E = 8, got .* {said}"):
        drop_in(query, memory, memory, mask=torch.rand(B, NQ, NK))
    options = dict(mask=torch.rand(B, NK, NK), attn_mask=torch.rand(NK, NK), key_padding_mask=torch.zeros(B, NK, dtype=torch.bool))
    for name, given in options.items():
        with pytest.raises(ValueError, match=rf"^{name}: expected Nk = 2 along its last axis, got .* {said}"):
            drop_in(memory, memory, memory, **{name: given})


def test_another_width_is_refused_by_name():
    _, drop_in = pair(kdim=5, vdim=6)
    query, key, value = inputs(drop_in)
    for name, given in (("query", [key, key, value]), ("key", [query, query, value]), ("value", [query, key, key])):
        with pytest.raises(ValueError, match=rf"^{name}: expected shape \(N, B, E\) with B = 2 and E = [568], got"):
            drop_in(*given)


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_what_it_does_not_cover_is_refused(option):
    with pytest.raises(ValueError, match="without add_bias_kv and add_zero_attn"):
        SoftMaskedMultiheadAttention.from_module(nn.MultiheadAttention(WIDTH, H, **{option: True}))
    with pytest.raises(ValueError, match="without add_bias_kv and add_zero_attn"):
        SoftMaskedMultiheadAttention(WIDTH, H, **{option: True})


@pytest.mark.parametrize("learnable", [True, False])
def test_one_made_by_its_own_arguments_has_alpha(learnable):
    torch.manual_seed(0)
    module = SoftMaskedMultiheadAttention(WIDTH, H, batch_first=True, alpha_init=2.0, learnable_alpha=learnable)
    assert module.scaling_factors.tolist() == [2.0] * H and isinstance(module.scaling_factors, nn.Parameter) == learnable
    x, mask = torch.randn(B, NK, WIDTH), torch.rand(B, NK, NK)
    expected = SoftMaskedMultiheadAttention.from_module(module, alpha_init=2.0)(x, x, x, mask=mask)
    torch.testing.assert_close(module(x, x, x, mask=mask), expected)
    module.reset_parameters()
    assert module.scaling_factors.tolist() == [2.0] * H


def test_a_boolean_window_and_padding_that_leave_a_query_no_key_give_zeros_and_finite_gradients():
    original, module = pair(batch_first=True)
    query, key, value = (x.requires_grad_() for x in inputs(module))
    window = torch.ones(NQ, NK, dtype=torch.bool)
    window[0, -2:] = window[1:] = False  # the first query may look at the last two keys alone, which are padding in batch element 1
    padding = masks()["padding"]["key_padding_mask"]
    out, weights = module(query, key, value, key_padding_mask=padding, attn_mask=window, average_attn_weights=True)
    out.sum().backward()
    with torch.no_grad():
        nothing = module.out_proj(torch.zeros(WIDTH))
    assert torch.equal(out[1, 0], nothing) and not torch.equal(out[0, 0], nothing)
    assert not weights[1, 0].any() and all(x.grad.isfinite().all() for x in (query, key, value, *module.parameters()) if x.grad is not None)


def nested(*lengths):
    return torch.nested.nested_tensor([torch.randn(n, 16) for n in lengths])


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("hooked", [False, True])
def test_it_takes_the_nested_tensors_that_torchs_encoder_makes(activation, hooked):
    """A hook keeps the layer from its fast path, but not the encoder from nesting."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, activation=activation)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 5, 16), torch.arange(5) >= torch.tensor([[3], [5]])
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=padding)
        for one in encoder.layers:
            one.self_attn = SoftMaskedMultiheadAttention.from_module(one.self_attn)
            if hooked:
                one.self_attn.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(encoder(x, src_key_padding_mask=padding), expected)


def test_nested_tensors_are_taken_as_torch_takes_them():
    original = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    drop_in, x = SoftMaskedMultiheadAttention.from_module(original), nested(3, 5)
    with torch.no_grad():
        for got, expected in zip(drop_in(x, x, x)[0].unbind(), original(x, x, x)[0].unbind(), strict=True):
            assert torch.equal(got, expected)
        with pytest.raises(ValueError, match="query: expected a dense tensor beside a soft mask, got a nested one"):
            drop_in(x, x, x, mask=torch.rand(2, 5, 5))
    with pytest.raises(AssertionError, match="NestedTensor outside of its fast path"):  # torch's own refusal
        drop_in(x, x, x)
