"""Programs that leave Python: ONNX within the error budget, torch.export in a process without smattn, torch.jit.trace with gradients."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.export import Dim

import smattn
from smattn.integrations import decompositions
from smattn.nn import SoftMaskedAttention
from smattn.testing import assert_within_budget, make_case
from tests.support.module_inputs import NK, NQ, WIDTH, B, tensors

pytestmark = pytest.mark.promise("composes")
ARGUMENTS = ("query", "key", "value", "mask", "mask_logits", "alpha", "head_weights", "key_padding_mask")
CASES = {
    "plain": dict(),
    "lse": dict(with_lse=True),
    "padded": dict(padded=0.4, with_lse=True),
    "grouped heads": dict(Hkv=2, Dv=6),
    "a mask a head": dict(mask_shape=(1, 4, 1, 1)),  # the last is the number of keys: see `case`
    "logits": dict(),
    "no mask": dict(mask=None),
    "float16": dict(dtype=torch.float16),
    "map": dict(as_map=True, padded=0.4),
}


class Calls(nn.Module):
    """The public call of a case, on the tensors that the case has."""

    def __init__(self, case):
        super().__init__()
        self.names = [name for name in ARGUMENTS if isinstance(getattr(case, name), torch.Tensor) and not (case.is_map and name == "value")]
        self.options = dict(enable_gqa=True) if case.is_map else dict(enable_gqa=True, return_lse=True)
        self.call = smattn.attention_map if case.is_map else smattn.soft_masked_attention

    def forward(self, *given):
        return self.call(**dict(zip(self.names, given, strict=True)), **self.options)

    def given(self, case):
        return tuple(getattr(case, name) for name in self.names)


def case_of(kind, batch, queries, keys, rng):
    options = dict(CASES[kind])
    if "mask_shape" in options:
        options["mask_shape"] = (*options["mask_shape"][:-1], keys)
    case = make_case(batch, 4, queries, keys, 8, rng=rng, **options)
    return case.with_inputs(dict(mask=None, mask_logits=case.mask.logit())) if kind == "logits" else case


def in_onnxruntime(path, given):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {one.name: x.numpy() for one, x in zip(session.get_inputs(), given, strict=True)}
    return [torch.from_numpy(x) for x in session.run(None, feed)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_in_onnxruntime_a_call_is_within_the_error_budget_at_every_length(kind, tmp_path):
    """The program is exported at other lengths. A query that is dead in one batch element is dead there too."""
    traced, case = case_of(kind, 2, 5, 9, 0), case_of(kind, 3, 7, 23, 1)
    if case.key_padding_mask is not None:
        case.key_padding_mask[0] = True
    module = Calls(traced)
    sizes = {3: Dim("B"), 7: Dim("Nq"), 23: Dim("Nk")}  # no two alike in the case
    shapes = tuple({axis: sizes[n] for axis, n in enumerate(x.shape) if n in sizes} for x in module.given(case))
    program = torch.export.export(module, module.given(traced), dynamic_shapes=(shapes,)).run_decompositions(decompositions())
    torch.onnx.export(program, (), tmp_path / "program.onnx", verbose=False)
    results = in_onnxruntime(tmp_path / "program.onnx", module.given(case))
    if case.is_map:
        names = ["map"]
    else:
        names = ["out", "lse"] if case.dlse is not None else ["out"]
    assert_within_budget(dict(zip(names, results, strict=False)), case)


@pytest.mark.slow
def test_a_module_in_onnxruntime(tmp_path):
    module, (query, features, mask) = SoftMaskedAttention(WIDTH, 4).eval(), tensors()
    given = query, features, features + 1, mask.detach()
    program = torch.export.export(module, given).run_decompositions(decompositions())
    torch.onnx.export(program, (), tmp_path / "module.onnx", verbose=False)
    torch.testing.assert_close(in_onnxruntime(tmp_path / "module.onnx", given)[0], module(*given).detach())


def test_dropout_has_no_decomposition():
    program = torch.export.export(SoftMaskedAttention(WIDTH, 4, dropout=0.5).train(), (*tensors()[:2], *tensors()[1:]))
    with pytest.raises(ValueError, match=r"dropout_p: expected 0 in a program without smattn .*, got 0.5"):
        program.run_decompositions(decompositions())


def load_elsewhere(line):
    """Runs a line in a process that has imported torch alone."""
    return subprocess.run([sys.executable, "-c", f"import torch; {line}"], capture_output=True, text=True)


@pytest.mark.slow
def test_an_exported_program_needs_smattn_unless_it_is_decomposed(tmp_path):
    module, (query, features, mask) = SoftMaskedAttention(WIDTH, 4).eval(), tensors()
    given = query, features, features, mask.detach()
    program = torch.export.export(module, given)
    torch.export.save(program, tmp_path / "needs.pt2")
    torch.export.save(program.run_decompositions(decompositions()), tmp_path / "alone.pt2")
    alone = load_elsewhere(f"torch.export.load({str(tmp_path / 'alone.pt2')!r}).module()")
    assert alone.returncode == 0, alone.stderr
    refused = load_elsewhere(f"torch.export.load({str(tmp_path / 'needs.pt2')!r})")
    assert refused.returncode != 0 and "smattn.forward" in refused.stderr
    loaded = load_elsewhere(f"import smattn; torch.export.load({str(tmp_path / 'needs.pt2')!r}).module()")
    assert loaded.returncode == 0, loaded.stderr
    torch.testing.assert_close(torch.export.load(tmp_path / "alone.pt2").module()(*given), module(*given))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("grad", [True, False])
def test_a_trace_is_saved_and_loaded_and_has_its_gradients(grad, tmp_path):
    module, (query, features, mask) = SoftMaskedAttention(WIDTH, 4), tensors()
    given = query, features, features, mask
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(module, given)
    traced.save(tmp_path / "traced.pt")
    loaded = torch.jit.load(tmp_path / "traced.pt")
    g = torch.Generator().manual_seed(1)
    features = torch.randn(2, B, NK + 3, WIDTH, generator=g)
    other = torch.randn(B, NQ + 2, WIDTH, generator=g), *features, torch.rand(B, 1, NK + 3, generator=g)
    for tensors_of in (given, other):
        out, expected = loaded(*tensors_of), module(*tensors_of)
        torch.testing.assert_close(out, expected)
        got, want = (torch.autograd.grad(x.square().sum(), list(m.parameters())) for x, m in ((out, loaded), (expected, module)))
        torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning")
def test_a_trace_of_the_map_has_its_gradients():
    case = make_case(2, 4, 5, 9, 8, as_map=True)
    given = [x.requires_grad_() for x in (case.query, case.key, case.mask)]

    def call(q, k, m):
        return smattn.attention_map(q, k, m, 8.0)

    traced = torch.jit.trace(call, given)
    assert any(node.kind() == "smattn::attention_map" for node in traced.graph.nodes())
    got, want = (torch.autograd.grad(call(*given).square().sum(), given) for call in (traced, call))
    torch.testing.assert_close(got, want)
