"""gradcheck: gradients in float64 agree with finite differences, and the explicit backward with autograd through the formulas."""

from dataclasses import replace

import pytest
import torch

from smattn import attention_map, reference, soft_masked_attention
from smattn.testing import run
from tests.support.expected import BACKENDS
from tests.support.small_doubles import NK, SHAPES, B, a_case, leaves

pytestmark = pytest.mark.promise("gradcheck")
DOUBLE = [name for name, b in BACKENDS.items() if torch.float64 in b.dtypes]
DOUBLE_MAPS = [name for name in DOUBLE if BACKENDS[name].attention_map]


@pytest.mark.parametrize("padded", [0.0, 0.4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", DOUBLE)
def test_attention_with_lse(name, shape, padded):
    case = a_case(shape, padded=padded)
    options = dict(key_padding_mask=case.key_padding_mask, enable_gqa=True, return_lse=True, backend=name)
    assert torch.autograd.gradcheck(lambda *x: soft_masked_attention(*x, **options), leaves(case))


@pytest.mark.parametrize("name", DOUBLE)
def test_attention_with_dropout(name):
    case = a_case((2, 3, 5))

    def call(*inputs):
        torch.manual_seed(0)
        return soft_masked_attention(*inputs, enable_gqa=True, dropout_p=0.3, backend=name)

    assert torch.autograd.gradcheck(call, leaves(case))


@pytest.mark.parametrize("name", DOUBLE)
def test_a_scalar_alpha_and_a_mixed_mask(name):
    case = a_case((2, 3, 5))
    query, key, value, mask, _ = leaves(case)
    alpha = torch.tensor(1.5, requires_grad=True)  # float32, with float64 inputs

    def call(*inputs):
        return soft_masked_attention(*inputs, alpha.double(), enable_gqa=True, backend=name)

    assert torch.autograd.gradcheck(call, (query, key, value, mask))
    call(query, key, value, mask).sum().backward()
    assert alpha.grad.dtype == torch.float32 and alpha.grad.shape == ()


@pytest.mark.parametrize("padded", [0.0, 0.4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", DOUBLE_MAPS)
def test_attention_map(name, shape, padded):
    case = a_case(shape, padded=padded, as_map=True)
    weights = case.head_weights.clone().requires_grad_()

    def call(query, key, weights, *mask_and_alpha):
        options = dict(key_padding_mask=case.key_padding_mask, enable_gqa=True, backend=name)
        return attention_map(query, key, *mask_and_alpha, head_weights=weights, **options)

    query, key, *mask_and_alpha = leaves(case)
    assert torch.autograd.gradcheck(call, (query, key, weights, *mask_and_alpha))


def through_the_formulas(case):
    """Outputs and gradients by autograd through reference.forward or reference.attention_map."""
    tensors = {name: t.detach().clone().requires_grad_() for name, t in case.inputs().items()}
    c = case.with_inputs(tensors)
    if c.is_map:
        outputs = reference.attention_map(c.call())[:1]
    else:
        out, saved = reference.forward(c.call(), save_out=False, save_mbar=False)
        outputs = (out, saved.lse)
    incoming = [c.dout] if c.is_map else [c.dout, c.dlse]
    grads = torch.autograd.grad(outputs, list(tensors.values()), incoming)
    return {f"d{name}": grad for name, grad in zip(tensors, grads, strict=True)}


@pytest.mark.parametrize("options", [{}, {"padded": 0.5}, {"dropout_p": 0.4}, {"as_map": True}, {"as_map": True, "padded": 0.5}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_explicit_backward_is_autograd_through_the_formulas(shape, options):
    case = a_case(shape, with_lse="as_map" not in options, **options)
    explicit = run(case, "reference")
    by_autograd = through_the_formulas(case)
    assert by_autograd.keys() == {name for name in explicit if name.startswith("d")}
    for name, expected in by_autograd.items():
        torch.testing.assert_close(explicit[name], expected, rtol=1e-10, atol=1e-12)


def test_a_row_without_keys_has_no_gradient_through_the_formulas():
    """All keys are padding in batch element 1; the mask rules out all keys of query 2 in element 0."""
    padding = torch.zeros(B, NK, dtype=torch.bool)
    padding[1] = True
    case = replace(a_case((2, 3, 5), with_lse=True), key_padding_mask=padding)
    case.mask[0, 2] = torch.finfo(torch.float64).min
    grads = through_the_formulas(case)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert not any(grads[name][1].any() for name in ("dquery", "dkey", "dvalue", "dmask"))
    assert not grads["dquery"][0, :, 2].any() and not grads["dmask"][0, 2].any()
