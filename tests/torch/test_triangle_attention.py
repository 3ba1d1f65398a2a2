"""smattn.integrations.triangle_attention: cuEquivariance's shapes and meaning, against plain torch."""

import pytest
import torch

from smattn.integrations import triangle_attention

pytestmark = pytest.mark.promise("modules")
B, H, D = 2, 4, 16


def inputs(N, dtype=torch.float32, batch=(B,), K=None):
    torch.manual_seed(N)
    K = N if K is None else K
    q, k, v = (torch.randn(*batch, N, H, n, D, dtype=dtype, requires_grad=True) for n in (N, K, K))
    bias = torch.randn(*batch, 1, H, N, K, requires_grad=True) if batch else torch.randn(1, H, N, K, requires_grad=True)
    mask = torch.rand(*batch, N, 1, 1, K) < 0.8
    mask[..., 0] = True
    return q, k, v, bias, mask


def plain(q, k, v, bias, mask, scale=None, computed_in=torch.float64):
    """The formula of the documentation; a fully masked row is zeros."""
    q, k, v, bias = (x.to(computed_in) for x in (q, k, v, bias))
    s = q @ k.mT * (D**-0.5 if scale is None else scale) + bias
    s = s.masked_fill(~mask, float("-inf"))
    dead = ~mask.any(-1, keepdim=True)
    p = torch.softmax(s.masked_fill(dead, 0), -1).masked_fill(dead, 0)
    return p @ v, torch.logsumexp(s, -1, keepdim=True)


def close(actual, expected, dtype, yardstick=None):
    """yardstick: plain torch's result, whose error may be made twice as well, as in the error budget."""
    tolerance = 4 * torch.finfo(dtype).eps * (1 + expected.abs().max())
    if yardstick is not None:
        tolerance = tolerance + 2 * (yardstick.double() - expected).abs().max()
    return (actual.double() - expected).abs().max() <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N", [1, 2, 7, 33, 64])
def test_it_is_the_formula_at_every_length(N, dtype):
    q, k, v, bias, mask = inputs(N, dtype)
    out, lse, maximum = triangle_attention(q, k, v, bias, mask, return_aux=True)
    expected, expected_lse = plain(q, k, v, bias, mask)
    assert out.shape == (B, N, H, N, D) and out.dtype == dtype and close(out, expected, dtype)
    assert lse.shape == (B, N, H, N, 1) and lse.dtype == torch.float32 and close(lse, expected_lse, dtype) and maximum is None
    assert torch.equal(triangle_attention(q, k, v, bias, mask), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_its_gradients_are_those_of_the_formula(dtype):
    leaves = inputs(24, dtype)
    dout = torch.randn(B, 24, H, 24, D, dtype=dtype)
    grads = torch.autograd.grad(triangle_attention(*leaves), leaves[:4], dout)
    expected = torch.autograd.grad(plain(*leaves)[0], leaves[:4], dout.double())
    yardsticks = torch.autograd.grad(plain(*leaves, computed_in=torch.float32)[0], leaves[:4], dout.float())
    for grad, leaf, exact, yardstick in zip(grads, leaves, expected, yardsticks, strict=False):
        assert grad.shape == leaf.shape and grad.dtype == leaf.dtype
        assert close(grad, exact.double(), dtype, yardstick)


def test_one_batch_element_may_leave_the_batch_axis_out():
    q, k, v, bias, mask = inputs(9, batch=())
    out = triangle_attention(q, k, v, bias, mask)
    with_batch = triangle_attention(q[None], k[None], v[None], bias[None], mask[None])
    assert out.shape == (9, H, 9, D) and torch.equal(out, with_batch[0])


def test_a_row_that_keeps_no_key_is_zeros():
    q, k, v, bias, mask = inputs(8)
    mask[1, 3] = False
    out, lse, _ = triangle_attention(q, k, v, bias, mask, return_aux=True)
    out.sum().backward()
    assert not out[1, 3].any() and lse[1, 3].isneginf().all() and out[1, 2].any()
    assert not q.grad[1, 3].any() and all(x.grad.isfinite().all() for x in (q, k, v, bias))


def test_queries_and_keys_may_differ_in_number_and_a_scale_may_be_given():
    q, k, v, bias, mask = inputs(6, K=11)
    assert close(triangle_attention(q, k, v, bias, mask, scale=0.5), plain(q, k, v, bias, mask, 0.5)[0], torch.float32)
    assert close(triangle_attention(q, k, v, bias), plain(q, k, v, bias, torch.ones_like(mask))[0], torch.float32)


def test_attention_of_the_ending_node_takes_transposed_pairs():
    q, k, v, bias, mask = inputs(7)
    turned = [x.detach().transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    assert torch.equal(triangle_attention(*turned, bias, mask), triangle_attention(q, k, v, bias, mask))


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "mask"])
def test_what_is_no_tensor_is_refused_by_its_name(name):
    arguments = dict(zip(("q", "k", "v", "bias", "mask"), inputs(7), strict=True))
    with pytest.raises(TypeError, match=f"^{name}: expected a torch.Tensor, got list"):
        triangle_attention(**arguments | {name: [1.0]})


@pytest.mark.parametrize("shape", [(B, 7, 7), (B, 7, H, 1, 7), (B, 7, 1, 7, 7), (B + 1, 7, 1, 1, 7), (B, 7, 1, 1, 6)])
def test_a_mask_of_another_form_is_refused(shape):
    q, k, v, bias, _ = inputs(7)
    with pytest.raises(ValueError, match=r"mask: expected \(B, N, 1, 1, K\)"):
        triangle_attention(q, k, v, bias, torch.ones(shape, dtype=torch.bool))


def test_shifted_windows_of_a_swin_transformer():
    """A bias shared by windows and batch, and a mask of -inf shared by the batch, in one mask without a copy for each image."""
    import smattn

    windows, n = 3, 16
    query, key, value = (torch.randn(B, windows, H, n, D) for _ in range(3))
    position = torch.randn(1, 1, H, n, n, requires_grad=True)
    shifted = torch.zeros(1, windows, 1, n, n)
    shifted[:, -1, :, : n // 2, n // 2 :] = -torch.inf
    out = smattn.soft_masked_attention(query, key, value, position + shifted)
    s = query.double() @ key.double().mT * D**-0.5 + position.double() + shifted
    expected = torch.softmax(s, -1) @ value.double()
    assert close(out, expected, torch.float32)
    (grad,) = torch.autograd.grad(out.sum(), position, retain_graph=True)
    (exact,) = torch.autograd.grad(expected.sum(), position)
    assert close(grad, exact.double(), torch.float32)
