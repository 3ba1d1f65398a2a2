"""In float32 and float64 backward rebuilds P from each row's largest score and sum, and rounds every score as forward did.

Of scores whose terms are large and cancel little more is left than what rounding took: one that is rounded otherwise has another weight.
"""

import pytest
import torch

from smattn import soft_masked_attention
from tests.support.cpu_kernels import KERNELS, forced
from tests.support.expected import BACKENDS, MANY

pytestmark = pytest.mark.promise("exact")
KEYS = 24  # one block, whose output is not rescaled


# What goes with products <q, k> of 8 * size^2, in which a few multiples of size tell the keys apart.
def masked(products, size):
    return dict(scale=1.0, mask=products + torch.rand_like(products), alpha=-1.0)


def masked_by_key(products, size):
    """The mean over the queries is as large as each product, and has all that tells the keys apart but a few units."""
    return masked(products.mean(1, keepdim=True), size)


def masked_by_logits(products, size):
    return dict(scale=1.0, mask_logits=(products / (16 * size**2)).logit(), alpha=-16 * size**2)


def unmasked(products, size):
    return dict(scale=1 / size)


OPTIONS = pytest.mark.parametrize("options", [masked, masked_by_key, masked_by_logits, unmasked])


def weights(backend, dtype, device, options, Nq, rows):
    """P of some rows as forward and as backward have it, (rows, keys) each."""
    torch.manual_seed(0)
    size = 2.0**10 if dtype == torch.float32 else 2.0**24
    query, key = (size * (1 + torch.rand(1, 1, n, 8, dtype=dtype) / size) for n in (Nq, KEYS))
    given = options((query @ key.mT)[:, 0], size)
    on_device = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    value = torch.eye(KEYS, dtype=dtype, device=device)[None, None].requires_grad_()
    padding = torch.arange(KEYS, device=device)[None] % 5 == 3
    out = soft_masked_attention(query.to(device), key.to(device), value, key_padding_mask=padding, backend=backend, **on_device)
    backward = []
    for row in rows:  # dV is the row's weights where dO is 1
        dout = torch.zeros_like(out)
        dout[..., row, :] = 1
        backward.append(torch.autograd.grad(out, value, dout, retain_graph=True)[0][0, 0, :, 0])
    forward = out.detach()[0, 0, rows]
    assert ((forward > 1e-3).sum(1) > 1).all()
    return forward, torch.stack(backward)


ROWS = [(name, dtype) for name in BACKENDS for dtype in BACKENDS[name].dtypes if dtype.itemsize > 2]
WIDE = pytest.mark.parametrize("name, dtype", ROWS, ids=[f"{name}-{str(dtype)[6:]}" for name, dtype in ROWS])


@pytest.mark.parametrize("Nq", [5, MANY])
@OPTIONS
@WIDE
def test_the_weights_of_backward_are_those_of_forward(name, dtype, device, options, Nq):
    """But for the last places, where forward divides what it has merged."""
    forward, backward = weights(name, dtype, device, options, Nq, [0, Nq // 2, Nq - 1])
    torch.testing.assert_close(backward, forward, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.promise("CPU kernels")
@pytest.mark.parametrize("Nq", [1, 13, 37, 100])
@OPTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kernels", KERNELS)
def test_to_the_last_bit_on_every_set_of_cpu_kernels(kernels, dtype, options, Nq):
    """Of weights that are normal numbers; in backward the others are 0."""
    with forced(kernels):
        forward, backward = weights("cpu", dtype, "cpu", options, Nq, range(Nq))
    assert torch.equal(backward, forward.where(forward > 2 * torch.finfo(dtype).tiny, 0))


@pytest.mark.promise("defined")
@pytest.mark.parametrize("Nq", [5, MANY])
@WIDE
def test_no_weight_is_above_1_where_large_terms_cancel(name, dtype, device, Nq):
    """Nothing is left of them but what rounding took, and with an L that is rounded too, 2^(S - L) may be anything up to infinity.

    Of 16-bit inputs this is not promised: see docs/guide/alpha-and-masks.md.
    """
    torch.manual_seed(0)
    query, key = (1e5 * (1 + torch.rand(1, 1, n, 2, dtype=dtype)) for n in (Nq, 35))
    mask = -(query @ key.mT)
    value = torch.zeros(1, 1, 35, 1, dtype=dtype, device=device, requires_grad=True)
    out = soft_masked_attention(query.to(device), key.to(device), value, mask.to(device), scale=1.0, backend=name)
    (weights,) = torch.autograd.grad(out.sum(), value)
    assert weights.min() >= 0 and weights.max() <= Nq and weights.any()
