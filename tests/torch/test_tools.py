"""Composes with the tools around a model: FLOP counters, selective checkpointing, the profiler, export, per-sample gradients."""

import functools

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import smattn
import smattn.flops  # noqa: F401  registers the formulas
from smattn import attention_map, soft_masked_attention
from smattn.testing import make_case, plain
from tests.support.called import Called

pytestmark = pytest.mark.promise("composes")
NAMES = ("query", "key", "value", "mask", "alpha")


def leaves(case, names=NAMES, needs=NAMES):
    return [getattr(case, name).detach().clone().requires_grad_(name in needs) for name in names]


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("needs", [(), ("query",), ("value",), ("mask",), ("key", "alpha"), NAMES], ids="-".join)
def test_flops_are_those_of_plain_pytorch_and_of_scores_computed_again(device, needs):
    case = make_case(2, 3, 5, 11, 4, Dv=6, device=device)
    q, k, v, mask, alpha = inputs = leaves(case, needs=needs)

    def backward(out):
        if needs:
            out.sum().backward()

    fused = flops(lambda: backward(soft_masked_attention(*inputs)))
    expected = flops(lambda: backward(plain(q, k, v, mask[:, None], alpha)[0]))
    again = flops(lambda: q.detach() @ k.detach().mT) if needs else 0
    assert fused == expected + again > 0


def test_flops_of_a_map_are_those_of_its_products(device):
    case = make_case(2, 3, 5, 11, 4, as_map=True, device=device)
    q, k, mask, alpha, weights = inputs = leaves(case, ("query", "key", "mask", "alpha", "head_weights"), ("query", "mask"))
    fused = flops(lambda: attention_map(*inputs[:4], head_weights=weights).sum().backward())
    assert fused == 3 * flops(lambda: q.detach() @ k.detach().mT)  # the scores, the scores again in backward, and dQ


def test_selective_checkpointing_keeps_what_the_operation_returned(device):
    tensors = leaves(make_case(2, 2, 3, 9, 4, device=device))

    def block(query, *rest):
        return soft_masked_attention(query.sin(), *rest, dropout_p=0.4).square()

    def run(function):
        torch.manual_seed(3)
        with Called() as called:
            return torch.autograd.grad(function(*tensors).sum(), tensors), called.names

    keep = functools.partial(create_selective_checkpoint_contexts, [torch.ops.smattn.forward.default])
    expected, _ = run(block)
    for context, forwards in (({}, 2), ({"context_fn": keep}, 1)):
        grads, names = run(functools.partial(checkpoint, block, use_reentrant=False, **context))
        assert names.count("forward") == forwards and names.count("backward") == 1
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_the_profiler_names_the_operations(device):
    case = make_case(1, 2, 3, 9, 4, device=device)
    tensors = leaves(case)
    with torch.profiler.profile() as profile:
        soft_masked_attention(*tensors).sum().backward()
        attention_map(*(t for t, name in zip(tensors, NAMES, strict=True) if name != "value")).sum().backward()
    expected = {"SoftMaskedAttention", "SoftMaskedAttentionBackward", "AttentionMap", "AttentionMapBackward"}
    expected |= {f"smattn::{name}" for name in ("forward", "backward", "attention_map", "attention_map_backward")}
    assert expected <= {event.key for event in profile.key_averages()}


def test_an_exported_module_runs_at_another_batch_length_and_thread_count(device):
    module = smattn.nn.SoftMaskedAttention(8, 2).to(device)

    def inputs(B, Nq, Nk):
        g = torch.Generator().manual_seed(B)
        shapes = ((B, Nq, 8), (B, Nk, 8), (B, Nk, 8), (B, Nq, Nk))
        return tuple(torch.rand(shape, generator=g).to(device) for shape in shapes)

    B, Nq, Nk = map(torch.export.Dim, ("B", "Nq", "Nk"))
    shapes = {"query": {0: B, 1: Nq}, "key": {0: B, 1: Nk}, "value": {0: B, 1: Nk}, "mask": {0: B, 1: Nq, 2: Nk}}
    exported = torch.export.export(module, inputs(2, 3, 40), dynamic_shapes=shapes).module()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        for sizes in ((2, 3, 40), (5, 7, 1000), (3, 2, 33)):
            assert torch.equal(exported(*inputs(*sizes)), module(*inputs(*sizes)))
    finally:
        torch.set_num_threads(threads)


class Mapped(torch.nn.Module):
    """One call mapped over several queries and masks, one map over several alphas."""

    def __init__(self, case):
        super().__init__()
        self.alpha = torch.nn.Parameter(case.alpha.clone())

    def forward(self, queries, key, value, masks):
        out = vmap(soft_masked_attention, (0, None, None, 0, None))(queries, key, value, masks, self.alpha)
        alphas = torch.stack([self.alpha, 2 * self.alpha])
        return out, vmap(attention_map, (None, None, None, 0))(queries[0], key, masks[0], alphas)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_a_vmap_over_the_calls_is_exported(device, strict):
    case = make_case(2, 2, 3, 9, 4, device=device)
    module = Mapped(case)

    def inputs(repeat):
        tensors = (torch.stack([case.query, case.query + 1]), case.key, case.value, torch.stack([case.mask, case.mask / 2]))
        return tuple(torch.cat([t] * repeat, axis) for t, axis in zip(tensors, (1, 0, 0, 1), strict=True))

    B = torch.export.Dim("B")
    exported = torch.export.export(module, inputs(1), dynamic_shapes=({1: B}, {0: B}, {0: B}, {1: B}), strict=strict).module()
    for repeat in (1, 3):
        got, expected = exported(*inputs(repeat)), module(*inputs(repeat))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    gradients = (torch.autograd.grad(sum(t.square().sum() for t in m(*inputs(1))), m.alpha)[0] for m in (exported, module))
    torch.testing.assert_close(*gradients)


def test_per_sample_gradients_of_a_module(device):
    torch.manual_seed(0)
    module = smattn.nn.SoftMaskedAttention(8, 2).to(device)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    inputs = [torch.rand(shape, device=device) for shape in ((4, 3, 8), (4, 9, 8), (4, 9, 8), (4, 3, 9))]

    def loss(parameters, *sample):
        return functional_call(module, parameters, tuple(t[None] for t in sample)).square().sum()

    per_sample = vmap(grad(loss), (None, 0, 0, 0, 0))(parameters, *inputs)
    assert "scaling_factors" in per_sample
    for i, sample in enumerate(zip(*inputs, strict=True)):
        for name, expected in grad(loss)(parameters, *sample).items():
            torch.testing.assert_close(per_sample[name][i], expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("by", [None, "cpu"])
def test_shapes_are_found_on_the_meta_device(by, dropout_p):
    query, key, value = torch.empty(2, 4, 5, 8, device="meta"), *torch.empty(2, 2, 4, 7, 8, device="meta")
    assert smattn.soft_masked_attention(query, key, value, backend=by, dropout_p=dropout_p).shape == query.shape
