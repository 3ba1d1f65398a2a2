"""mask_logits: M = sigmoid(mask_logits) inside the operation, on every backend."""

from dataclasses import replace

import pytest
import torch

from smattn import attention_map, soft_masked_attention
from smattn.testing import assert_within_budget, make_case, run
from tests.support.expected import BACKENDS

# M's batch size, its heads (None: no such axis) and whether it has a row for each query
SHAPES = [(2, True), (1, True), (2, False), (1, False), (2, 2, True), (1, 2, True), (2, 2, False)]
LENGTHS = [
    *((shape, 5) for shape in SHAPES),
    *((shape, 131) for shape in SHAPES if shape in [(2, True), (1, False), (1, 2, True), (2, 2, False)]),
]


def a_case(shape, Nq, Nk=35, **kw):
    *axes, has_queries = shape
    return make_case(2, 2, Nq, Nk, 8, Hkv=1, mask="logits", mask_shape=(*axes, Nq if has_queries else 1, Nk), rng=Nq, **kw)


def poisoned(case):
    """A case with NaN in the logits of every key that is padding for all who use it."""
    logits, padding = case.mask_logits.clone(), case.key_padding_mask
    unseen = padding if logits.shape[0] > 1 else padding.all(0, keepdim=True)
    logits.masked_fill_(unseen.view(len(unseen), *[1] * (logits.dim() - 2), -1), float("nan"))
    assert logits.isnan().any()
    return replace(case, mask_logits=logits)


@pytest.mark.promise("exact")
@pytest.mark.parametrize("shape, Nq", LENGTHS, ids=str)
def test_within_budget(backend, device, shape, Nq):
    case = a_case(shape, Nq, with_lse=True, device=device)
    results = run(case, backend)
    assert results["dmask_logits"].shape == case.mask_logits.shape and "dmask" not in results
    assert_within_budget(results, case)


@pytest.mark.promise("exact")
@pytest.mark.parametrize("shape, Nq", LENGTHS, ids=str)
def test_a_map_within_budget(map_backend, device, shape, Nq):
    case = poisoned(a_case(shape, Nq, as_map=True, padded=0.5, device=device))
    assert_within_budget(run(case, map_backend), case)


@pytest.mark.promise("exact")
@pytest.mark.parametrize("own, Nq", [(True, 5), (False, 5), (True, 131)], ids=["logits of the dtype", "float32 logits", "many queries"])
def test_dtypes_with_padding_and_dropout(backend, dtype, device, own, Nq):
    mask_dtype = dtype if own else torch.float32
    case = poisoned(a_case((2, True), Nq, dtype=dtype, mask_dtype=mask_dtype, padded=0.4, dropout_p=0.2, with_lse=True, device=device))
    results = run(case, backend)
    assert results["dmask_logits"].dtype == mask_dtype
    assert_within_budget(results, case)


@pytest.mark.promise("exact")
@pytest.mark.parametrize("Nq", [5, 131])
def test_logits_far_out_have_no_gradient_and_the_others_that_of_a_mask(backend, device, Nq):
    case = a_case((2, True), Nq, device=device)
    far = torch.where(case.mask_logits > 0, float("inf"), -200.0)
    results = run(replace(case, mask_logits=far), backend)
    assert torch.equal(results.pop("dmask_logits"), torch.zeros_like(far))
    as_mask = replace(case, mask=(far > 0).float(), mask_logits=None)
    assert_within_budget(results, as_mask)


@pytest.mark.promise("exact")
def test_a_gradient_keeps_its_digits_where_m_is_near_1(backend, device):
    """At a logit of 12, 1 - M keeps half of float32's digits and exp(-|x|) / (1 + exp(-|x|))^2 keeps all."""
    case = a_case((2, True), 5, device=device)
    case = replace(case, mask_logits=torch.full_like(case.mask_logits, 12.0))
    single, double = (run(c, name)["dmask_logits"] for c, name in ((case, backend), (doubled(case), "reference")))
    largest = double.abs().amax()
    assert largest > 0 and (single - double).abs().amax() < 2e-5 * largest


def doubled(case):
    return replace(case.with_inputs({name: t.double() for name, t in case.inputs().items()}), dout=case.dout.double())


@pytest.mark.promise("only what is asked")
@pytest.mark.parametrize("needs", [("query", "key"), ("mask_logits",), ("mask_logits", "alpha"), ("alpha",)], ids=str)
@pytest.mark.parametrize("Nq", [5, 131])
def test_only_what_is_asked_for(backend, device, needs, Nq):
    case = a_case((2, True), Nq, device=device)
    results = run(case, backend, needs)
    assert set(results) == {"out"} | {f"d{name}" for name in needs}
    assert_within_budget(results, case)


@pytest.mark.promise("gradcheck")
def test_gradcheck():
    case = a_case((2, True), 3, Nk=5, dtype=torch.float64, mask_dtype=torch.float64, padded=0.4)
    inputs = [t.clone().requires_grad_() for t in (case.query, case.key, case.value, case.mask_logits, case.alpha / 8)]
    options = dict(key_padding_mask=case.key_padding_mask, enable_gqa=True)
    for backend in (name for name, b in BACKENDS.items() if torch.float64 in b.dtypes):

        def attend(q, k, v, x, a, backend=backend):
            return soft_masked_attention(q, k, v, mask_logits=x, alpha=a, return_lse=True, backend=backend, **options)

        def attend_map(q, k, x, a, backend=backend):
            return attention_map(q, k, mask_logits=x, alpha=a, backend=backend, **options)

        assert torch.autograd.gradcheck(attend, inputs)
        assert torch.autograd.gradcheck(attend_map, [*inputs[:2], *inputs[3:]])


@pytest.mark.promise("composes")
def test_compiled_and_vmapped(backend, device):
    case = a_case((2, True), 5, device=device)

    def loss(logits):
        options = dict(mask_logits=logits, alpha=case.alpha, enable_gqa=True, backend=backend)
        return (soft_masked_attention(case.query, case.key, case.value, **options) * case.dout).sum()

    grad = torch.func.grad(loss)
    expected = grad(case.mask_logits)
    torch.testing.assert_close(expected, run(case, backend, ("mask_logits",))["dmask_logits"], rtol=0, atol=0)
    batch = torch.stack([case.mask_logits, -case.mask_logits])
    torch.testing.assert_close(torch.vmap(grad)(batch), torch.stack([expected, grad(-case.mask_logits)]))
    torch._dynamo.reset()
    leaf = case.mask_logits.clone().requires_grad_()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(leaf).backward()
    torch.testing.assert_close(leaf.grad, expected)
