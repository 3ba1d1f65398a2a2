"""A Hugging Face Mask2Former with soft masks has the original's weights, its output in the limit, and a gradient to every mask."""

import copy
from itertools import product

import pytest
import torch

import smattn
from smattn.integrations import soft_mask2former_class, soften_mask2former

pytestmark = [pytest.mark.promise("modules"), pytest.mark.slow]
LAYERS = 4


def tiny(kind="Mask2FormerModel"):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    backbone = transformers.SwinConfig(
        image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2, out_features=[f"stage{i}" for i in range(1, 5)]
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16, encoder_layers=1,
        decoder_layers=LAYERS + 1, num_attention_heads=2, dim_feedforward=16, num_queries=40, dropout=0.0, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, kind)(config).eval()


@pytest.fixture(scope="module")
def original():
    return tiny()


@pytest.fixture(scope="module")
def whole():
    """The whole model, from pixels to masks, classes and the loss."""
    return tiny("Mask2FormerForUniversalSegmentation")


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_weights_load_unchanged(original):
    soft = soften_mask2former(copy.deepcopy(original))
    assert set(soft.state_dict()) - set(original.state_dict()) == {
        f"transformer_module.decoder.layers.{i}.cross_attn.scaling_factors" for i in range(LAYERS)
    }
    state = {name: t + 1 for name, t in original.state_dict().items()}
    soft.load_state_dict(state)
    assert all(torch.equal(t, state[name]) for name, t in soft.state_dict().items() if name in state)
    assert len(smattn.nn.parameter_groups(soft, alpha_lr=1e-2)[1]["params"]) == LAYERS


def test_with_large_alpha_and_sharpness_it_is_the_original(original, pictures):
    """The outputs agree to a millionth. In float64 a mask logit is hardly ever so near to 0 that it is on neither side."""
    hard, x = copy.deepcopy(original).double(), pictures.double()
    seen = []
    for layer in hard.transformer_module.decoder.layers:
        layer.cross_attn.register_forward_hook(lambda module, args, kwargs, _: seen.append(kwargs["attn_mask"]), with_kwargs=True)
    with torch.no_grad():
        expected = hard(pixel_values=x).transformer_decoder_last_hidden_state
        distances = []
        for alpha, sharpness in ((1.0, 1.0), (8.0, 1e3), (64.0, 1e12)):
            soft = soften_mask2former(copy.deepcopy(original).double(), alpha, sharpness=sharpness)
            distances.append((soft(pixel_values=x).transformer_decoder_last_hidden_state - expected).abs().max().item())
    assert any(mask.any() for mask in seen)  # something is masked out
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 1e-6 * expected.abs().max().item()


def test_the_whole_model_with_large_alpha_and_sharpness_is_the_original(whole, pictures):
    """Masks and classes agree to a millionth of the largest."""
    x = pictures.double()
    with torch.no_grad():
        expected = copy.deepcopy(whole).double()(pixel_values=x)
        distances = []
        for alpha, sharpness in ((1.0, 1.0), (8.0, 1e3), (64.0, 1e12)):
            got = soften_mask2former(copy.deepcopy(whole).double(), alpha, sharpness=sharpness)(pixel_values=x)
            pairs = [(got[name], expected[name]) for name in ("masks_queries_logits", "class_queries_logits")]
            distances.append(max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs))
    assert distances[0] > distances[1] > distances[2]
    assert distances[0] > 1e-3 and distances[2] < 1e-6


def test_a_training_step_of_the_whole_model_reaches_the_masks_of_earlier_layers(whole, pictures):
    """The loss has no auxiliary losses, which would contain the masks of every layer. The original sends earlier masks nothing."""

    def gradients(model):
        predicted = []

        def watch(module, args, output):
            output[0].retain_grad()
            predicted.append(output[0])

        model.model.transformer_module.decoder.mask_predictor.register_forward_hook(watch)
        stripes = (torch.arange(64) // 32).expand(2, 64, 64)
        labels = [torch.stack([one == 0, one == 1]).float() for one in stripes], [torch.tensor([0, 2])] * 2
        output = model.train()(pixel_values=pictures)
        losses = model.get_loss_dict(output.masks_queries_logits, output.class_queries_logits, *labels, auxiliary_predictions=None)
        model.get_loss(losses).backward()
        assert len(predicted) == LAYERS + 1 and predicted[-1].grad.any()
        return [logits.grad for logits in predicted[:-1]]

    assert gradients(copy.deepcopy(whole)) == [None] * LAYERS
    soft = gradients(soften_mask2former(copy.deepcopy(whole), alpha_init=8.0))
    assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in soft)


def gradients_to_masks(model, pictures):
    """The gradients of a loss on the last layer's queries, for the masks that earlier layers predicted."""
    output = model(pixel_values=pictures)
    loss = output.transformer_decoder_last_hidden_state.square().sum()
    return torch.autograd.grad(loss, output.masks_queries_logits[:-1], allow_unused=True)


def test_a_loss_on_the_last_layer_reaches_every_mask_before_it(original, pictures):
    assert all(grad is None for grad in gradients_to_masks(original, pictures))
    soft = soften_mask2former(copy.deepcopy(original), alpha_init=8.0)
    grads = gradients_to_masks(soft, pictures)
    assert len(grads) == LAYERS
    assert all(grad is not None and grad.isfinite().all() and grad.count_nonzero() > 0 for grad in grads)


def test_a_training_step_moves_alpha_and_every_mask_predictor(original, pictures):
    soft = soften_mask2former(copy.deepcopy(original), alpha_init=8.0).train()
    optimizer = torch.optim.SGD(smattn.nn.parameter_groups(soft, alpha_lr=1.0), lr=1e-2)
    decoder = soft.transformer_module.decoder
    watched = [*(layer.cross_attn.scaling_factors for layer in decoder.layers), *decoder.mask_predictor.parameters()]
    before = [p.detach().clone() for p in watched]
    soft(pixel_values=pictures).transformer_decoder_last_hidden_state.square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(watched, before, strict=True))


def test_what_is_no_mask2former_or_is_soft_already_is_refused(original):
    with pytest.raises(ValueError, match="found none in Linear"):
        soften_mask2former(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="soft already"):
        soften_mask2former(soften_mask2former(copy.deepcopy(original)))


def test_a_refused_argument_leaves_the_model_as_it_is(original):
    model = copy.deepcopy(original)
    parts = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="alpha_init: expected a number or"):
        soften_mask2former(model, alpha_init=[1.0, 2.0, 3.0])
    assert [type(module) for module in model.modules()] == parts


SETTINGS = [{}, {"alpha_init": 3.0, "sharpness": 2.5}, {"alpha_init": [1.0, 2.0], "learnable_alpha": False}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ["Mask2FormerModel", "Mask2FormerForUniversalSegmentation"])
def test_a_softened_model_survives_saving_and_loading_bit_for_bit(kind, settings, pictures, tmp_path):
    soft = soften_mask2former(tiny(kind), **settings)
    with torch.no_grad():
        for name, tensor in soft.state_dict().items():
            if name.endswith("scaling_factors"):
                tensor.add_(torch.rand(2))  # as if it had learned
        soft.save_pretrained(tmp_path)
        soft_class = soft_mask2former_class(type(soft))
        loaded = soft_class.from_pretrained(tmp_path)
        assert soft_class is soft_mask2former_class(type(soft)) and not loaded.training
        state, loaded_state = soft.state_dict(), loaded.state_dict()
        assert state.keys() == loaded_state.keys() and all(torch.equal(tensor, loaded_state[name]) for name, tensor in state.items())
        parameters, loaded_parameters = (dict(m.named_parameters()).keys() for m in (soft, loaded))
        assert parameters == loaded_parameters
        for got, expected in zip(*(m(pixel_values=pictures).to_tuple()[:2] for m in (loaded, soft)), strict=True):
            assert all(map(torch.equal, *(x if isinstance(x, tuple) else (x,) for x in (got, expected))))
        loaded.save_pretrained(tmp_path / "again")
        again = soft_class.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())


def test_what_was_saved_of_the_original_begins_with_the_defaults(whole, tmp_path):
    whole.save_pretrained(tmp_path)
    soft, info = soft_mask2former_class(type(whole)).from_pretrained(tmp_path, output_loading_info=True)
    assert len(info["missing_keys"]) == LAYERS and not info["unexpected_keys"]
    alphas = {name: tensor.tolist() for name, tensor in soft.state_dict().items() if name.endswith("scaling_factors")}
    assert set(alphas) == set(info["missing_keys"]) and all(alpha == [16, 4] for alpha in alphas.values())
    state = soft.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.state_dict().items())


def test_alpha_is_float32_in_a_model_that_is_loaded_in_bfloat16(tmp_path):
    soft = soften_mask2former(tiny(), alpha_init=[1.001, 2.003])
    soft.save_pretrained(tmp_path)
    loaded = soft_mask2former_class(type(soft)).from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {name.endswith("scaling_factors"): p.dtype for name, p in loaded.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert torch.equal(loaded.transformer_module.decoder.layers[0].cross_attn.scaling_factors, torch.tensor([1.001, 2.003]))


def test_the_committed_costs_are_those_of_every_part_and_kind_of_mask():
    from examples.mask2former_cost import MASKS, PARTS, Cost
    from examples.shared.rows import RESULTS, read

    assert [row[:2] for row in read(RESULTS / "mask2former_cost.csv", Cost)] == list(product(PARTS, MASKS))
