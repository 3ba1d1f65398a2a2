"""Tensor subclasses of other libraries go through the calls."""

from __future__ import annotations

import pytest
import torch

import smattn

pytestmark = pytest.mark.promise("composes")


class TensorWithMeta(torch.Tensor):
    """As MONAI's MetaTensor: every result is one again, and new_empty takes the shape as one tuple and in no other form."""

    def new_empty(self, size, **options):
        assert isinstance(size, tuple), f"size: expected a tuple, got {size!r}"
        return self.as_subclass(torch.Tensor).new_empty(size, **options).as_subclass(type(self))


def inputs(kind, device):
    g = torch.Generator().manual_seed(0)
    tensors = (torch.randn(2, 4, 5, 8, generator=g), *torch.randn(2, 2, 4, 9, 8, generator=g), torch.rand(2, 5, 9, generator=g))
    return [tensor.to(device).as_subclass(kind).requires_grad_() for tensor in tensors]


def attended(q, k, v, mask, backend):
    return smattn.soft_masked_attention(q, k, v, mask, 8.0, backend=backend)


def attended_and_lse(q, k, v, mask, backend):
    out, lse = smattn.soft_masked_attention(q, k, v, mask, 8.0, return_lse=True, backend=backend)
    return torch.cat([out.flatten(), lse.flatten()])


def mapped(q, k, v, mask, backend):
    return smattn.attention_map(q, k, mask, 8.0, backend=backend)


@pytest.mark.parametrize("call", [attended, attended_and_lse, mapped])
@pytest.mark.parametrize("wanted", [slice(4), slice(1), slice(3, 4)], ids=["all", "query", "mask"])
def test_a_subclass_computes_what_a_plain_tensor_does(call, wanted, backend, device):
    results = []
    for kind in (torch.Tensor, TensorWithMeta):
        given = inputs(kind, device)
        out = call(*given, backend)
        assert type(out) is kind
        gradients = torch.autograd.grad(out.square().sum(), given[wanted], allow_unused=True)
        results.append([None if x is None else x.as_subclass(torch.Tensor) for x in (out, *gradients)])
    for plain, of_subclass in zip(*results, strict=True):
        assert (plain is None) == (of_subclass is None) and (plain is None or torch.equal(plain, of_subclass))


def test_the_gradient_of_lse_alone(backend, device):
    given = inputs(TensorWithMeta, device)
    _, lse = smattn.soft_masked_attention(*given, 8.0, return_lse=True, backend=backend)
    lse.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in given)
