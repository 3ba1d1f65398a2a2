"""In float32 and float64 backward rebuilds P from each row's largest score and sum, and rounds every score as forward did: to the last bit.

Where large terms cancel, nothing is left of a score but what rounding took, and a score that is rounded otherwise has another weight.
"""

import pytest
import torch

from smattn import soft_masked_attention
from tests.support.cpu_kernels import KERNELS, forced

pytestmark = pytest.mark.promise("CPU kernels", "exact")
KEYS = 40  # one block, whose output is not rescaled


def masked(scores, _):
    """alpha = -1: of the two terms a unit is left, and their roundings."""
    return dict(mask=scores + torch.rand_like(scores), alpha=-1.0)


def masked_by_row(scores, _):
    scores = scores.mean(1, keepdim=True)
    return dict(mask=scores + torch.rand_like(scores), alpha=-1.0)


def no_mask(_, size):
    """Scores of like size, thousands of units apart from 0."""
    return dict(scale=2.0**-13 * size)


def logits(scores, size):
    return dict(mask_logits=scores / size**2, alpha=-(size**2))


@pytest.mark.parametrize("Nq", [1, 13, 37, 100])
@pytest.mark.parametrize("options", [masked, masked_by_row, no_mask, logits])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_the_weights_of_backward_are_those_of_forward(name, dtype, padded, options, Nq):
    torch.manual_seed(0)
    size = 2.0**10 if dtype == torch.float32 else 2.0**24
    query, key = (size * (1 + torch.rand(1, 1, n, 8, dtype=dtype) / size) for n in (Nq, KEYS))
    call = dict(scale=1.0, backend="cpu") | options((query @ key.mT)[:, 0], size)
    if padded:
        call["key_padding_mask"] = torch.arange(KEYS)[None] % 5 == 3
    value = torch.eye(KEYS, dtype=dtype)[None, None].requires_grad_()
    with forced(name):
        forward = soft_masked_attention(query, key, value, **call)[0, 0]
        backward = torch.empty(Nq, KEYS, dtype=dtype)
        for row in range(Nq):  # dV is the row's weights where dO is 1
            one = torch.zeros(1, 1, Nq, KEYS, dtype=dtype)
            one[..., row, :] = 1
            backward[row] = torch.autograd.grad(soft_masked_attention(query, key, value, **call), value, one)[0][0, 0, :, 0]
    assert 0.01 < forward.detach().std(1).mean() * KEYS < KEYS  # the weights differ
    assert torch.equal(forward, backward)
