"""Composes with torch.compile and torch.export: one graph for all lengths, with gradients and dropout."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from smattn import attention_map, ops, soft_masked_attention
from smattn.canonical import _torch_allows_tf32
from smattn.nn import SoftMaskedAttention
from smattn.testing import assert_within_budget, make_case, run

pytestmark = pytest.mark.promise("composes")
LENGTHS = [(5, 40), (6, 41), (9, 67), (2, 33)]
INPUTS = ("query", "key", "value", "mask", "alpha")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def tensors(case, names=INPUTS):
    return [getattr(case, name).detach().clone().requires_grad_() for name in names]


@pytest.mark.parametrize("dynamic", ["dynamic=True", "mark_dynamic"])
def test_forward_and_backward_in_one_graph_for_every_length(backend, device, dynamic):
    counter = CompileCounterWithBackend("aot_eager")

    def call(query, key, value, mask, alpha):
        return soft_masked_attention(query, key, value, mask, alpha, return_lse=True, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True if dynamic == "dynamic=True" else None)
    compilations = set()  # how many graphs there are after each length; Dynamo may start over within the first call
    for Nq, Nk in LENGTHS:
        case = make_case(2, 2, Nq, Nk, 8, with_lse=True, device=device)
        inputs = tensors(case)
        if dynamic == "mark_dynamic":
            for tensor, axes in zip(inputs[:4], ((2,), (2,), (2,), (1, 2)), strict=True):
                for axis in axes:
                    torch._dynamo.mark_dynamic(tensor, axis)
        out, lse = compiled(*inputs)
        grads = torch.autograd.grad([out, lse], inputs, [case.dout, case.dlse])
        expected = run(case, backend)
        assert torch.equal(out, expected["out"]) and torch.equal(lse, expected["lse"])
        assert all(torch.equal(grad, expected[f"d{name}"]) for name, grad in zip(INPUTS, grads, strict=True))
        compilations.add(counter.frame_count)
    assert len(compilations) == 1 and 0 not in compilations


def kept_where_keys_are_many(problem):
    """As memory.queries_with_remainder, at sizes that compile in a moment."""
    return problem.Nq * torch.sym_min(1, problem.Nk // torch.sym_max(1, problem.Nq))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_one_graph_with_the_remainder_kept_and_one_without(backend, device, compiler, monkeypatch):
    monkeypatch.setattr(ops, "queries_with_remainder", kept_where_keys_are_many)
    counter = CompileCounterWithBackend(compiler)

    def call(*inputs):
        return soft_masked_attention(*inputs, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
    compilations = []
    for Nq, Nk in ((9, 5), (5, 33), (30, 7), (4, 21), (12, 3)):
        case = make_case(2, 2, Nq, Nk, 8, dtype=torch.float16, device=device)
        inputs = tensors(case)
        out = compiled(*inputs)
        grads = torch.autograd.grad(out, inputs, case.dout)
        expected = run(case, backend)
        assert torch.equal(out, expected["out"])
        assert all(torch.equal(grad, expected[f"d{name}"]) for name, grad in zip(INPUTS, grads, strict=True))
        compilations.append(counter.frame_count)
    assert compilations[1] == compilations[-1] <= compilations[0] + 1


def test_a_map_in_one_graph_for_every_length(map_backend, device):
    counter = CompileCounterWithBackend("aot_eager")

    def call(query, key, mask, alpha, weights):
        return attention_map(query, key, mask, alpha, head_weights=weights, backend=map_backend)

    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
    names = ("query", "key", "mask", "alpha", "head_weights")
    compilations = set()
    for Nq, Nk in LENGTHS:
        case = make_case(2, 2, Nq, Nk, 8, as_map=True, device=device)
        inputs = tensors(case, names)
        amap = compiled(*inputs)
        expected = run(case, map_backend)
        assert torch.equal(amap, expected["map"])
        grads = torch.autograd.grad(amap, inputs, case.dout)
        assert all(torch.equal(grad, expected[f"d{name}"]) for name, grad in zip(names, grads, strict=True))
        compilations.add(counter.frame_count)
    assert len(compilations) == 1 and 0 not in compilations


@pytest.mark.parametrize("options", [{"dropout_p": 0.3}, {"padded": 0.4}, {"Hkv": 1}, {"mask": None}, {"dtype": torch.float16}], ids=str)
def test_every_option_in_one_graph(backend, device, options):
    case = make_case(2, 2, 5, 40, 8, device=device, **options)
    names = INPUTS[: 3 if case.mask is None else 5]

    def call(query, key, value, mask=None, alpha=None):
        rest = dict(key_padding_mask=case.key_padding_mask, dropout_p=case.dropout_p, enable_gqa=case.enable_gqa)
        return soft_masked_attention(query, key, value, mask, alpha, backend=backend, **rest)

    inputs = tensors(case, names)
    torch.manual_seed(case.rng)
    out = torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.equal(out, run(case, backend)["out"])
    grads = torch.autograd.grad(out, inputs, case.dout)
    assert_within_budget({f"d{name}": grad for name, grad in zip(names, grads, strict=True)}, case)


def test_a_mask_alone_in_one_graph(backend, device):
    case = make_case(2, 2, 5, 40, 8, device=device)
    mask = case.mask.clone().requires_grad_()

    def call(mask):
        return soft_masked_attention(case.query, case.key, case.value, mask, case.alpha, backend=backend)

    (grad,) = torch.autograd.grad(torch.compile(call, fullgraph=True, backend="aot_eager")(mask), mask, case.dout)
    assert torch.equal(grad, run(case, backend, needs=["mask"])["dmask"])


def test_none_finds_its_backend_in_a_graph_too(device):
    case = make_case(2, 2, 5, 40, 8, device=device)
    inputs = [getattr(case, name) for name in INPUTS]
    compiled = torch.compile(soft_masked_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), soft_masked_attention(*inputs))


def test_autocast_in_one_graph(backend, device):
    def call(*inputs):
        with torch.autocast(device, dtype=torch.bfloat16):
            return soft_masked_attention(*inputs, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for rng in range(5):  # a sum in another order has the same bits now and then
        inputs = tensors(make_case(2, 2, 5, 40, 8, device=device, rng=rng))
        out, expected = compiled(*inputs), call(*inputs)
        assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
        for got, want in zip(torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True):
            assert got.dtype == torch.float32 and torch.equal(got, want)


def test_no_gradient_of_lse_and_a_gradient_of_zeros_are_the_same_bits(backend, device):
    """For an lse that nobody reads, backward gets None in eager mode and zeros in a graph."""
    for rng in range(5):
        case = make_case(2, 2, 5, 40, 8, device=device, rng=rng)
        inputs = tensors(case)
        out, lse = soft_masked_attention(*inputs, return_lse=True, backend=backend)
        without = torch.autograd.grad(out, inputs, case.dout, retain_graph=True)
        zeros = torch.autograd.grad([out, lse], inputs, [case.dout, torch.zeros_like(lse)])
        assert [name for name, a, b in zip(INPUTS, without, zeros, strict=True) if not torch.equal(a, b)] == []


def test_a_compiled_call_sees_when_the_matmul_precision_changes():
    """The setting that allows TF32 on a GPU is read at call time, in a graph too."""
    compiled = torch.compile(lambda x: x + int(_torch_allows_tf32()), fullgraph=True, backend="eager")
    before = torch.backends.cuda.matmul.fp32_precision
    seen = []
    try:
        for precision in ("ieee", "tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = precision
            seen.append(compiled(torch.zeros(())).item())
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert seen == [0, 1, 0]


@pytest.mark.slow
def test_the_default_compiler_with_dropout(backend, device):
    """Inductor draws other random numbers, but as many, and repeats them under manual_seed."""
    B, H, Nq, Nk, p = 4, 8, 8, 32, 0.3
    query, key, value = torch.zeros(B, H, Nq, 4), torch.zeros(B, H, Nk, 4), torch.eye(Nk).expand(B, H, Nk, Nk)

    def call(query, key, value):
        return soft_masked_attention(query, key, value, dropout_p=p, backend=backend)

    compiled = torch.compile(call, fullgraph=True)
    inputs = [t.to(device).requires_grad_() for t in (query, key, value)]
    torch.manual_seed(0)
    first, second = compiled(*inputs), compiled(*inputs)
    torch.manual_seed(0)
    assert torch.equal(compiled(*inputs), first) and not torch.equal(first, second)
    share = (torch.stack([first, second]) != 0).float().mean()
    assert abs(share - (1 - p)) < 5 * (p * (1 - p) / (2 * first.numel())) ** 0.5
    (dvalue,) = torch.autograd.grad(first, inputs[2], torch.ones_like(first))  # shows the bits that backward drops
    torch.testing.assert_close(dvalue[..., 0], first.sum(2))


@pytest.mark.slow
def test_the_default_compiler_and_eager_agree(backend, device):
    case = make_case(2, 2, 5, 40, 8, with_lse=True, device=device)
    inputs = tensors(case)

    def call(query, key, value, logits, alpha):
        out, lse = soft_masked_attention(query * 2, key, value, torch.sigmoid(logits), alpha, return_lse=True, backend=backend)
        return out.sin(), lse

    def grads(function):
        return torch.autograd.grad(function(*inputs), inputs, [case.dout, case.dlse])

    for compiled, eager in zip(grads(torch.compile(call, fullgraph=True)), grads(call), strict=True):
        torch.testing.assert_close(compiled, eager)


class Module(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.alpha = torch.nn.Parameter(torch.tensor([3.0, 1.0]))
        self.backend = backend

    def forward(self, query, key, value, mask):
        return soft_masked_attention(query, key, value, mask, self.alpha, backend=self.backend)


@pytest.mark.parametrize("half", [False, True])
def test_export_with_dynamic_lengths(backend, device, half):
    def inputs(Nq, Nk):
        case = make_case(2, 2, Nq, Nk, 8, dtype=torch.float16 if half else torch.float32, device=device)
        return case.query, case.key, case.value, case.mask

    Nq, Nk = torch.export.Dim("Nq"), torch.export.Dim("Nk")
    module = Module(backend).to(device)
    shapes = ({2: Nq}, {2: Nk}, {2: Nk}, {1: Nq, 2: Nk})
    program = torch.export.export(module, inputs(5, 40), dynamic_shapes=shapes)
    for lengths in LENGTHS:
        assert torch.equal(program.module()(*inputs(*lengths)), module(*inputs(*lengths)))


def test_an_exported_program_is_saved_and_loaded(backend, device, tmp_path):
    case = make_case(2, 2, 5, 40, 8, device=device)
    inputs = (case.query, case.key, case.value, case.mask)
    module = Module(backend).to(device)
    torch.export.save(torch.export.export(module, inputs), tmp_path / "program.pt2")
    assert torch.equal(torch.export.load(tmp_path / "program.pt2").module()(*inputs), module(*inputs))


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_an_exported_program_can_be_trained(backend, device, strict, dtype):
    """The graph that is exported for inputs without gradients holds nothing but the operation."""
    case = make_case(2, 2, 5, 40, 8, dtype=dtype, device=device)
    module = Module(backend).to(device, case.alpha.dtype)
    with torch.no_grad():
        module.alpha.copy_(case.alpha)
    exported = torch.export.export(module, (case.query, case.key, case.value, case.mask), strict=strict).module()
    *inputs, _ = tensors(case)
    grads = torch.autograd.grad(exported(*inputs), [*inputs, exported.alpha], case.dout)
    assert_within_budget({f"d{name}": grad for name, grad in zip(INPUTS, grads, strict=True)}, case)


def in_a_graph(step):
    """The step captured, after one call on a side stream, which compiles; and what it returned, which every replay fills anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph, captured


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_cuda_graph_of_a_module(device):
    """As its docstring says: captured once, and replayed on what lies in the captured inputs."""
    layer = SoftMaskedAttention(64, 4).to(device)
    query, pixels = (torch.randn(2, N, 64, device=device) for N in (13, 400))
    mask = torch.rand(2, 13, 400, device=device)
    wanted = list(layer.parameters())

    def step():
        out = layer(query, pixels, pixels, mask)
        return out, *torch.autograd.grad(out.sum(), wanted)

    graph, captured = in_a_graph(step)
    for tensor in (query, mask):
        tensor.mul_(0.5)
        graph.replay()
        assert_close(captured, step())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("Nq", [13, 150], ids=["few queries", "many queries"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_cuda_graph_replay(fused_backend, device, dropout_p, Nq):
    case = make_case(2, 2, Nq, 400, 32, dropout_p=dropout_p, device=device)
    inputs = tensors(case)

    def step():
        out = soft_masked_attention(*inputs, dropout_p=dropout_p, backend=fused_backend)
        return out, torch.autograd.grad(out, inputs, case.dout)

    graph, (out, grads) = in_a_graph(step)
    graph.replay()
    first = [t.clone() for t in (out, *grads)]
    graph.replay()
    if dropout_p:
        assert not torch.equal(first[0], out)
    else:
        assert all(torch.equal(a, b) for a, b in zip(first, (out, *grads), strict=True))
        inputs[3].data.mul_(0.5)
        graph.replay()
        assert torch.equal(out, step()[0])
