"""Composes with torch.func, vmap, activation checkpointing and hooks on saved tensors."""

import pytest
import torch
from torch.func import grad, jacrev, vmap
from torch.utils.checkpoint import checkpoint

from smattn import attention_map, reference, soft_masked_attention
from smattn.testing import make_case

pytestmark = pytest.mark.promise("composes")
NAMES = ("query", "key", "value", "mask", "alpha")
MAP_NAMES = ("query", "key", "mask", "alpha", "head_weights")
N = 3  # mapped calls


def a_case(device, **options):
    return make_case(2, 2, 3, 9, 4, device=device, **options)


def inputs(case, names=NAMES):
    return tuple(getattr(case, name) for name in names)


def loss(backend):
    """A scalar of one call that uses out and lse."""

    def call(*tensors):
        out, lse = soft_masked_attention(*tensors, return_lse=True, backend=backend)
        return out.square().sum() + lse.sum()

    return call


def map_loss(backend):
    def call(query, key, mask, alpha, weights):
        return attention_map(query, key, mask, alpha, head_weights=weights, backend=backend).square().sum()

    return call


def by_autograd(function, tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*leaves), leaves)


def assert_all_close(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_func_grad(backend, device):
    tensors = inputs(a_case(device))
    assert_all_close(grad(loss(backend), argnums=tuple(range(5)))(*tensors), by_autograd(loss(backend), tensors))


def test_func_grad_of_a_map(map_backend, device):
    tensors = inputs(a_case(device, as_map=True), MAP_NAMES)
    assert_all_close(grad(map_loss(map_backend), argnums=tuple(range(5)))(*tensors), by_autograd(map_loss(map_backend), tensors))


def mapped(tensors, batched):
    """in_dims, the tensors with the batched ones stacked N times, and the tensors of the N separate calls."""
    stacked = [torch.stack([t * (1 + 0.1 * i) for i in range(N)]) if i in batched else t for i, t in enumerate(tensors)]
    in_dims = tuple(0 if i in batched else None for i in range(len(tensors)))
    separate = [[t[i] if dim == 0 else t for t, dim in zip(stacked, in_dims, strict=True)] for i in range(N)]
    return in_dims, stacked, separate


BATCHED = [{0, 1, 2, 3, 4}, {0}, {1, 2}, {3}, {4}, {0, 3}, {0, 1, 2}, {0, 4}]


@pytest.mark.parametrize("batched", BATCHED, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 9), (1, 3, 9), (1, 2, 1, 9)], ids=str)
def test_vmap(backend, device, batched, shape):
    in_dims, stacked, separate = mapped(inputs(a_case(device, mask_shape=shape)), batched)

    def call(*tensors):
        return soft_masked_attention(*tensors, return_lse=True, backend=backend)

    for got, expected in zip(vmap(call, in_dims)(*stacked), zip(*(call(*t) for t in separate), strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(expected))


@pytest.mark.parametrize("batched", BATCHED, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 9), (1, 2, 1, 9)], ids=str)
def test_vmap_of_grad(backend, device, batched, shape):
    in_dims, stacked, separate = mapped(inputs(a_case(device, mask_shape=shape)), batched)
    gradients = grad(loss(backend), argnums=tuple(range(5)))
    for got, expected in zip(vmap(gradients, in_dims)(*stacked), zip(*(gradients(*t) for t in separate), strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(expected))


@pytest.mark.parametrize("batched", [{0, 1, 2, 3, 4}, {0}, {2}, {3, 4}], ids=str)
def test_vmap_of_grad_of_a_map(map_backend, device, batched):
    in_dims, stacked, separate = mapped(inputs(a_case(device, as_map=True), MAP_NAMES), batched)
    gradients = grad(map_loss(map_backend), argnums=tuple(range(5)))
    for got, expected in zip(vmap(gradients, in_dims)(*stacked), zip(*(gradients(*t) for t in separate), strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(expected))


@pytest.mark.parametrize("needed", ["query", "alpha", "mask"])
def test_a_mapped_query_is_one_call_of_forward_whatever_requires_grad(device, needed, monkeypatch):
    case, calls = make_case(4, 2, 3, 9, 4, batch=(2, 2), mask_shape=(1, 2, 2, 3, 9), device=device), []
    forward = reference.forward
    monkeypatch.setattr(reference, "forward", lambda *args, **saves: calls.append(args) or forward(*args, **saves))
    leaf = getattr(case, needed).requires_grad_()
    queries = torch.stack([case.query, case.query * 2, case.query * 3])

    def call(query):
        return soft_masked_attention(query, case.key, case.value, case.mask, case.alpha, backend="reference")

    out = vmap(call)(queries)
    assert len(calls) == 1 and out.requires_grad and leaf.requires_grad
    assert_all_close(out.unbind(), [call(query) for query in queries.unbind()])


def test_vmap_over_another_axis_and_nested(backend, device):
    query, key, value, mask, alpha = inputs(a_case(device))
    queries = torch.stack([query, query * 2, query * 3], 2)

    def call(query, mask):
        return soft_masked_attention(query, key, value, mask, alpha, backend=backend)

    got = vmap(call, (2, None), 1)(queries, mask)
    torch.testing.assert_close(got, torch.stack([call(q, mask) for q in queries.unbind(2)], 1))
    masks = torch.stack([mask, mask / 2])
    nested = vmap(vmap(call, (None, 0)), (2, None))(queries, masks)
    torch.testing.assert_close(nested, torch.stack([torch.stack([call(q, m) for m in masks]) for q in queries.unbind(2)]))


def test_vmap_with_dropout_draws_for_each_call(backend, device):
    query, key, value, mask, alpha = inputs(make_case(1, 2, 8, 32, 4, device=device))
    queries = query.expand(N, *query.shape)

    def call(query):
        return soft_masked_attention(query, key, value, mask, alpha, dropout_p=0.5, backend=backend)

    different = vmap(call, randomness="different")(queries)
    assert not torch.equal(different[0], different[1])
    same = vmap(call, randomness="same")(queries)
    assert torch.equal(same[0], same[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(call)(queries)


def test_jacrev(backend, device):
    query, key, value, mask, alpha = inputs(make_case(1, 2, 2, 5, 3, device=device))

    def call(mask, alpha):
        return soft_masked_attention(query, key, value, mask, alpha, backend=backend)

    by_rows = torch.autograd.functional.jacobian(call, (mask, alpha))
    assert_all_close(jacrev(call, argnums=(0, 1))(mask, alpha), by_rows)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_with_dropout(backend, device, use_reentrant):
    """Forward, when it runs again, drops the same weights."""
    tensors = inputs(a_case(device))

    def call(*tensors):
        return soft_masked_attention(*tensors, dropout_p=0.4, backend=backend)

    def gradients(function):
        leaves = [t.clone().requires_grad_() for t in tensors]
        torch.manual_seed(5)
        out = function(*leaves)
        torch.rand(3, device=device)  # the generator moves on before backward
        return out, torch.autograd.grad(out.square().sum(), leaves)

    out, grads = gradients(call)
    if use_reentrant:  # the reentrant form works with .backward() only
        leaves = [t.clone().requires_grad_() for t in tensors]
        torch.manual_seed(5)
        again = checkpoint(call, *leaves, use_reentrant=True)
        again.square().sum().backward()
        again_grads = [leaf.grad for leaf in leaves]
    else:
        again, again_grads = gradients(lambda *leaves: checkpoint(call, *leaves, use_reentrant=False))
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, again_grads, strict=True))


def test_saved_tensor_hooks_see_every_saved_tensor(backend, device):
    """Offloading works, because every saved tensor goes through torch's hooks."""
    tensors = inputs(a_case(device))
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        leaves = [t.clone().requires_grad_() for t in tensors]
        result = loss(backend)(*leaves)
    assert packed
    assert_all_close(torch.autograd.grad(result, leaves), by_autograd(loss(backend), tensors))


def test_an_input_changed_in_place_is_noticed(backend, device):
    leaves = [t.clone().requires_grad_() for t in inputs(a_case(device))]
    key = leaves[1] * 1
    out = soft_masked_attention(leaves[0], key, *leaves[2:], backend=backend)
    key.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("value", [2, 2.5])
def test_a_number_for_alpha_is_the_same_number_for_every_head(backend, device, value):
    query, key, mask_value, mask, _ = inputs(a_case(device))
    tensor = torch.full((2,), float(value), device=device)
    got = soft_masked_attention(query, key, mask_value, mask, value, backend=backend)
    assert torch.equal(got, soft_masked_attention(query, key, mask_value, mask, tensor, backend=backend))
    assert torch.equal(got, soft_masked_attention(query, key, mask_value, mask, tensor[0], backend=backend))


def many_masks(backend, device):
    """A scalar function of a mask and alpha, and N of both."""
    query, key, value, mask, alpha = inputs(a_case(device))

    def call(mask, alpha):
        return soft_masked_attention(query, key, value, mask, alpha, backend=backend).square().sum()

    return call, torch.stack([mask / i for i in range(1, N + 1)]), torch.stack([alpha / i for i in range(1, N + 1)])


COMPILERS = pytest.mark.parametrize("compiler", ["eager", "aot_eager"])


@COMPILERS
def test_compiled_transforms_have_eager_values(backend, device, compiler):
    call, masks, alphas = many_masks(backend, device)
    both = (0, 1)
    for transformed, arguments in (
        (grad(call, both), (masks[0], alphas[0])),
        (jacrev(call, both), (masks[0], alphas[0])),
        (vmap(grad(call, both)), (masks, alphas)),
        (grad(lambda m, a: vmap(call)(m, a).sum(), both), (masks, alphas)),
    ):
        torch._dynamo.reset()
        assert_all_close(torch.compile(transformed, backend=compiler, fullgraph=True)(*arguments), transformed(*arguments))


@pytest.mark.parametrize("which", [0, 3, 4], ids=["query", "mask", "alpha"])
def test_a_compiled_gradient_finds_what_forward_keeps_for_it(device, which, monkeypatch):
    tensors, kept = inputs(a_case(device, dtype=torch.bfloat16)), []
    forward = reference.forward

    def watched(*args, save_out, save_mbar):
        kept.append((save_out, save_mbar))
        return forward(*args, save_out=save_out, save_mbar=save_mbar)

    monkeypatch.setattr(reference, "forward", watched)
    gradient = grad(loss("reference"), argnums=which)
    torch._dynamo.reset()
    torch.compile(gradient, backend="aot_eager", fullgraph=True)(*tensors)
    gradient(*tensors)
    assert kept == [(True, which == 4)] * 2


@COMPILERS
def test_a_compiled_vmap_has_its_gradients(backend, device, compiler):
    call, masks, alphas = many_masks(backend, device)

    def total(masks, alphas):
        return vmap(call)(masks, alphas).sum()

    torch._dynamo.reset()
    leaves = masks.requires_grad_(), alphas.requires_grad_()
    (torch.compile(total, backend=compiler, fullgraph=True)(*leaves) + leaves[0].sum() + leaves[1].sum()).backward()
    for leaf, gradient in zip(leaves, grad(total, (0, 1))(*leaves), strict=True):
        torch.testing.assert_close(leaf.grad, gradient + 1)


def test_vmap_over_nothing(backend, device):
    """Mapped over an axis of size 0, results have that axis, and inputs that are not mapped get gradients of zero."""
    tensors = inputs(a_case(device))
    gradients = grad(lambda *t: vmap(loss(backend), (0, None, None, 0, 0))(*t).sum(), argnums=tuple(range(5)))
    nothing = [t.expand(0, *t.shape) if i in (0, 3, 4) else t for i, t in enumerate(tensors)]
    assert vmap(loss(backend), (0, None, None, None, None))(nothing[0], *tensors[1:]).shape == (0,)
    for got, given in zip(gradients(*nothing), nothing, strict=True):
        assert torch.equal(got, torch.zeros_like(given))
