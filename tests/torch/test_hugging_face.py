"""Small random models of transformers with attn_implementation="smattn" compute what they compute with "eager"."""

from __future__ import annotations

import copy

import pytest
import torch

from smattn.integrations import hugging_face, register_transformers

pytestmark = [pytest.mark.promise("modules"), pytest.mark.slow]
transformers = pytest.importorskip("transformers", reason="pip install transformers")

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
PICTURES = dict(image_size=32, patch_size=8)
SWIN = dict(image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2, out_features=[f"stage{i}" for i in range(1, 5)])
DETR = dict(
    d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=32,
    decoder_ffn_dim=32, num_queries=5, num_labels=3, dropout=0.0,
)  # fmt: skip
B, N = 2, 7


def resnet():
    return transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, out_features=["stage4"])


def detr():
    return transformers.DetrConfig(use_timm_backbone=False, backbone=None, backbone_config=resnet(), **DETR)


def clip():
    text = dict(**SIZES, vocab_size=64, max_position_embeddings=16, bos_token_id=1, eos_token_id=2)
    return transformers.CLIPConfig(text_config=text, vision_config=SIZES | PICTURES, projection_dim=16)


def segformer():
    return transformers.SegformerConfig(
        hidden_sizes=[8, 16, 16, 32], depths=[1] * 4, num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=16, num_labels=3
    )  # fmt: skip


def maskformer():
    decoder = transformers.DetrConfig(backbone_config=resnet(), **DETR)
    return transformers.MaskFormerConfig(
        backbone_config=transformers.SwinConfig(**SWIN), decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32, num_labels=3
    )  # fmt: skip


def t5():
    return transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=64, dropout_rate=0.0)


def tokens(left_padded=False):
    """Of the two sequences one has two tokens of padding."""
    attended = torch.ones(B, N, dtype=torch.long)
    attended[0, :2] = 0
    ids = torch.randint(3, 60, (B, N), generator=torch.Generator().manual_seed(0))
    return dict(input_ids=ids, attention_mask=attended if left_padded else attended.flip(1))


def picture(side=32, **more):
    return dict(pixel_values=torch.rand(B, 3, side, side, generator=torch.Generator().manual_seed(0)), **more)


MODELS = {  # name -> class, configuration, inputs, the output to compare, the layers that must have called
    "ViT": ("ViTModel", lambda: transformers.ViTConfig(**SIZES, **PICTURES), picture, "last_hidden_state", {"ViTAttention"}),
    "DINOv2": ("Dinov2Model", lambda: transformers.Dinov2Config(**SIZES, **PICTURES), picture, "last_hidden_state", {"Dinov2Attention"}),
    "CLIP": ("CLIPModel", clip, lambda: tokens() | picture(), "logits_per_image", {"CLIPAttention"}),
    "SegFormer": ("SegformerForSemanticSegmentation", segformer, picture, "logits", {"SegformerAttention"}),
    "Swin": ("SwinModel", lambda: transformers.SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4],
             window_size=4), picture, "last_hidden_state", {"SwinAttention"}),
    "DETR": ("DetrForObjectDetection", detr, lambda: picture(64, pixel_mask=padded_pixels()), "logits",
             {"DetrSelfAttention", "DetrCrossAttention"}),
    "MaskFormer": ("MaskFormerForInstanceSegmentation", maskformer, lambda: picture(64), "masks_queries_logits",
                   {"MaskFormerDetrSelfAttention", "MaskFormerDetrCrossAttention"}),
    "BERT": ("BertModel", lambda: transformers.BertConfig(**SIZES, vocab_size=64), tokens, "last_hidden_state", {"BertSelfAttention"}),
    "T5": ("T5ForConditionalGeneration", t5, lambda: tokens() | dict(decoder_input_ids=tokens()["input_ids"]), "logits", {"T5Attention"}),
    "Llama": ("LlamaForCausalLM", lambda: transformers.LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=64),
              lambda: tokens(left_padded=True), "logits", {"LlamaAttention"}),
}  # fmt: skip
ROWS_ARE_TOKENS = ("BERT", "Llama")


def padded_pixels():
    mask = torch.ones(B, 64, 64, dtype=torch.long)
    mask[0, :, 40:] = 0
    return mask


@pytest.fixture
def called(monkeypatch):
    """The kinds of layers that called smattn's function, which is registered here."""
    layers, real = set(), hugging_face.attention

    def watched(module, *rest, **more):
        layers.add(type(module).__name__)
        return real(module, *rest, **more)

    monkeypatch.setattr(hugging_face, "attention", watched)
    register_transformers()
    yield layers
    monkeypatch.undo()
    register_transformers()


def pair(kind, configuration):
    """The same model with "eager" and with "smattn"."""
    made = []
    for implementation in ("eager", "smattn"):
        torch.manual_seed(0)
        model = getattr(transformers, kind)._from_config(copy.deepcopy(configuration), attn_implementation=implementation)
        made.append(model.eval())
    made[1].load_state_dict(made[0].state_dict())
    return made


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_what_it_computes_with_eager(name, called):
    """Compared are the output of tokens that are not padding, and the gradients of a loss on it for every parameter, each in max norm.

    The model in float64 says what is right, and "eager" how far float32 may be from it: in a gradient of MaskFormer's it is 1e-5.
    """
    kind, configuration, inputs, output, layers = MODELS[name]
    eager, ours = pair(kind, configuration())
    most_exact = torch.float32 if name == "Llama" else torch.float64  # its softmax is float32's, where float64's lowest is -inf
    results = []
    for model, dtype in ((ours, torch.float32), (eager, torch.float32), (eager, most_exact)):
        given = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs().items()}
        out = getattr(model.to(dtype)(**given), output)
        live = out[given["attention_mask"].bool()] if name in ROWS_ARE_TOKENS else out
        parameters = [p for p in model.parameters() if p.requires_grad]
        weights = torch.randn(live.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
        gradients = torch.autograd.grad((weights * live).sum(), parameters, allow_unused=True)
        results.append([live, *gradients])
    assert layers <= called
    for got, plain, exact in zip(*results, strict=True):
        assert (got is None) == (exact is None)
        if got is not None:
            allowed = 1e-5 * exact.abs().max().clamp_min(1) + (plain - exact).abs().max()
            torch.testing.assert_close(got.to(exact.dtype), exact, rtol=0, atol=allowed.item())


def test_llama_generates_the_same_from_prompts_of_two_lengths(called):
    kind, configuration, inputs, *_ = MODELS["Llama"]
    eager, ours = (m.generate(**inputs(), max_new_tokens=6, do_sample=False, pad_token_id=0) for m in pair(kind, configuration()))
    assert called == {"LlamaAttention"} and eager.shape == (B, N + 6) and torch.equal(eager, ours)


# the function itself, beside transformers' own


class Layer(torch.nn.Module):
    def __init__(self, is_causal=False, groups=1):
        super().__init__()
        self.is_causal, self.num_key_value_groups = is_causal, groups


H, NQ, NK, D = 4, 5, 9, 8


def qkv(batch=B, kv_heads=H, queries=NQ):
    g = torch.Generator().manual_seed(1)
    q = torch.randn(batch, H, queries, D, generator=g, dtype=torch.float64)
    return [q, *torch.randn(2, B, kv_heads, NK, D, generator=g, dtype=torch.float64)]


def attended(shape):
    """A boolean mask in which every query has a key."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[..., 0] = True
    return mask


BIAS = torch.randn(1, H, NQ, NK, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
MASKS = {
    "none": None,
    "of keys": attended((B, 1, 1, NK)),
    "of keys, expanded": attended((B, 1, 1, NK)).expand(B, 1, NQ, NK),
    "of pairs": attended((B, 1, NQ, NK)),
    "of pairs, one for the batch": attended((1, 1, NQ, NK)),
    "of pairs and heads": attended((B, H, NQ, NK)),
    "added": torch.zeros(B, 1, NQ, NK, dtype=torch.float64).masked_fill(~attended((B, 1, NQ, NK)), torch.finfo(torch.float64).min),
    "added, float32": torch.zeros(B, 1, NQ, NK).masked_fill(~attended((B, 1, NQ, NK)), torch.finfo(torch.float32).min),
}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", [dict(), dict(kv_heads=2), dict(batch=1), dict(queries=1)], ids=str)
def test_masks_and_biases_mean_what_they_mean_in_sdpa(mask, biased, form):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    tensors, bias, given = qkv(**form), BIAS.clone().requires_grad_(), MASKS[mask]
    queries = tensors[0].shape[2]
    options = dict(position_bias=bias[..., :queries, :]) if biased else {}
    if given is not None and given.shape[2] > queries:
        given = given[..., :queries, :]
    results = []
    for function in (hugging_face.attention, sdpa_attention_forward):
        leaves = [x.clone().requires_grad_() for x in tensors]
        theirs = given.double() if given is not None and given.is_floating_point() and function is sdpa_attention_forward else given
        out, weights = function(Layer(groups=H // tensors[1].shape[1]), *leaves, theirs, scaling=0.3, **options)
        assert weights is None
        results.append([out, *torch.autograd.grad(out.square().sum(), [*leaves, bias] if biased else leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("queries", [1, NQ, NK])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("of_module", [False, True])
def test_causal_without_a_mask(queries, biased, of_module):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    options = dict(position_bias=torch.randn(1, H, queries, NK, dtype=torch.float64)) if biased else {}
    options |= {} if of_module else dict(is_causal=True)
    both = hugging_face.attention, sdpa_attention_forward
    got, expected = (function(Layer(of_module), *qkv(queries=queries), None, **options)[0] for function in both)
    torch.testing.assert_close(got, expected)


def test_a_query_that_may_attend_to_nothing_gives_zeros():
    mask = attended((B, 1, NQ, NK))
    mask[0, 0, 2] = False
    out, _ = hugging_face.attention(Layer(), *qkv(), mask)
    assert not out[0, 2].any() and out[1, 2].any()


def test_dropout_is_the_models():
    torch.manual_seed(0)
    one, two = (hugging_face.attention(Layer(), *qkv(), None, dropout=0.5)[0] for _ in range(2))
    assert not torch.equal(one, two)


# what is not supported


def language(**more):
    return dict(**SIZES, num_key_value_heads=2, head_dim=8, vocab_size=64, **more)


@pytest.mark.parametrize(
    "kind, configuration, options, says",
    [
        ("Gemma2Model", lambda: transformers.Gemma2Config(**language()), {}, "softcap"),
        ("GptOssModel", lambda: transformers.GptOssConfig(**language(num_local_experts=2)), {}, "s_aux"),
        ("BertModel", lambda: transformers.BertConfig(**SIZES, vocab_size=64), dict(output_attentions=True), "output_attentions"),
    ],
)
def test_what_a_layer_wants_beside_masks_is_refused(called, kind, configuration, options, says):
    model = getattr(transformers, kind)._from_config(configuration(), attn_implementation="smattn")
    with pytest.raises(ValueError, match=f"{says}: expected none with attn_implementation='smattn', got one"):
        model(**tokens(), **options)


def mask2former():
    return transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(**SWIN), feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=10, dropout=0.0, num_labels=3,
    )  # fmt: skip


KEEP_THEIR_OWN = {
    "Mask2FormerModel": (mask2former, lambda: dict(pixel_values=torch.rand(1, 3, 64, 64)), {"SwinAttention"}),
    "BloomModel": (lambda: transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=64), tokens, set()),
    "XLNetModel": (lambda: transformers.XLNetConfig(d_model=32, n_layer=1, n_head=2, d_inner=32, vocab_size=64), tokens, set()),
    "DebertaV2Model": (lambda: transformers.DebertaV2Config(**SIZES, vocab_size=64), tokens, set()),
}


@pytest.mark.parametrize("kind", KEEP_THEIR_OWN)
def test_layers_that_do_not_ask_for_an_implementation_keep_their_own(called, kind):
    """The docstring lists them. One that begins to ask leaves this test red, and the list."""
    configuration, inputs, layers = KEEP_THEIR_OWN[kind]
    try:
        model = getattr(transformers, kind)._from_config(configuration(), attn_implementation="smattn").eval()
    except ValueError:  # some versions refuse the name
        assert not layers
        return
    model(**inputs())
    assert called == layers
