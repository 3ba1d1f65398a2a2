"""backend="reference" has derivatives of any order by reverse mode, which agree with finite differences, on every route."""

import pytest
import torch
from torch.func import grad, jacrev, vmap
from torch.utils.checkpoint import checkpoint

from smattn import attention_map, reference, soft_masked_attention
from smattn.call import make_call
from smattn.testing import dead_queries, make_case
from tests.support.called import Called
from tests.support.small_doubles import SHAPES, a_case, leaves

pytestmark = pytest.mark.promise("second derivatives")
NAMES = ("query", "key", "value", "mask", "alpha")
MAP_NAMES = ("query", "key", "mask", "alpha", "head_weights")


def attention(case, **options):
    """A function of leaves(case) that returns out and lse. For finite differences the lse of a row without keys is 0 and not -inf."""

    def call(*tensors):
        torch.manual_seed(0)  # of dropout
        settings = dict(key_padding_mask=case.key_padding_mask, enable_gqa=True, return_lse=True, backend="reference")
        out, lse = soft_masked_attention(*tensors, **settings, **options)
        return out, lse.masked_fill(lse.isinf(), 0)

    return call


def with_a_dead_row(case):
    case.key_padding_mask[1] = True
    return case


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_with_lse(shape, padded):
    case = with_a_dead_row(a_case(shape, padded=0.4)) if padded else a_case(shape)
    assert torch.autograd.gradgradcheck(attention(case), leaves(case), fast_mode=True)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 4, 3, 5), (1, 1, 5)], ids=str)
def test_where_the_mask_leaves_a_query_no_key(shape):
    case = a_case(shape)
    case.mask[(0,) * (len(shape) - 1)] = torch.finfo(torch.float64).min
    assert dead_queries(case).any()
    assert torch.autograd.gradgradcheck(attention(case), leaves(case), fast_mode=True)


def test_every_element_of_every_second_derivative():
    case = with_a_dead_row(a_case((2, 1, 5), padded=0.4))
    assert torch.autograd.gradgradcheck(attention(case), leaves(case))


@pytest.mark.parametrize("Nk", [1, 5])
def test_logits(Nk):
    """With one key dM is exactly 0, and yet it has a derivative."""
    case = with_a_dead_row(make_case(2, 2, 3, Nk, 3, dtype=torch.float64, mask="logits", mask_dtype=torch.float64, padded=0.4, rng=1))
    inputs = [t.clone().requires_grad_() for t in (case.query, case.key, case.value, case.mask_logits, case.alpha / 8)]

    def call(query, key, value, logits, alpha):
        return attention(case, mask_logits=logits)(query, key, value, None, alpha)

    assert torch.autograd.gradgradcheck(call, inputs)


def test_attention_with_dropout():
    case = a_case((2, 3, 5))
    assert torch.autograd.gradgradcheck(attention(case, dropout_p=0.3), leaves(case), fast_mode=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_map(shape):
    case = with_a_dead_row(a_case(shape, padded=0.4, as_map=True))
    weights = case.head_weights.clone().requires_grad_()

    def call(query, key, weights, *mask_and_alpha):
        options = dict(key_padding_mask=case.key_padding_mask, enable_gqa=True, backend="reference")
        return attention_map(query, key, *mask_and_alpha, head_weights=weights, **options)

    query, key, *mask_and_alpha = leaves(case)
    assert torch.autograd.gradgradcheck(call, (query, key, weights, *mask_and_alpha), fast_mode=True)


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 1, 5)], ids=str)
def test_mask_logits(shape):
    """Some logits are 0, where a formula with |x| would have no second derivative. Where every key is padding they are NaN."""
    case = with_a_dead_row(a_case(shape, padded=0.4))
    query, key, value, mask, alpha = leaves(case)
    logits = (4 * mask.detach() - 2).requires_grad_()
    unread = case.key_padding_mask if shape[0] > 1 else case.key_padding_mask.all(0, keepdim=True)
    options = dict(key_padding_mask=case.key_padding_mask, enable_gqa=True, backend="reference")

    def inside(logits, *rest):
        logits = torch.cat([torch.zeros_like(logits[..., :1]), logits[..., 1:]], -1)
        logits = logits.masked_fill(unread[:, None, :], float("nan"))
        return soft_masked_attention(*rest[:3], mask_logits=logits, alpha=rest[3], **options)

    def outside(logits):
        logits = torch.cat([torch.zeros_like(logits[..., :1]), logits[..., 1:]], -1)
        return soft_masked_attention(query, key, value, logits.sigmoid(), alpha, **options)

    rest = query, key, value, alpha
    assert torch.autograd.gradgradcheck(inside, (logits, *rest), fast_mode=True)
    # Backward runs twice, at first from a gradient of 0 whose derivative is not 0.
    direction = torch.ones_like(logits)
    got, expected = (torch.autograd.functional.jvp(f, logits, direction)[1] for f in (lambda x: inside(x, *rest), outside))
    assert expected.any()
    torch.testing.assert_close(got, expected)


@pytest.fixture(params=["attention", "map"])
def functions(request, device):
    """A scalar of the call, the same scalar by autograd through the formulas, and the inputs of both."""
    as_map = request.param == "map"
    case = make_case(2, 2, 3, 7, 4, dtype=torch.float64, mask_dtype=torch.float64, as_map=as_map, device=device)
    scale = case.problem().scale

    def call(*tensors):
        if as_map:
            return attention_map(*tensors[:4], head_weights=tensors[4], backend="reference").square().sum()
        out, lse = soft_masked_attention(*tensors, return_lse=True, backend="reference")
        return out.square().sum() + lse.square().sum()

    def formulas(*tensors):
        if as_map:
            query, key, mask, alpha, weights = tensors
            call = make_call(query, key, None, mask[:, None, None], alpha, None, head_weights=weights, scale=scale)
            return reference.attention_map(call)[0].square().sum()
        query, key, value, mask, alpha = tensors
        call = make_call(query, key, value, mask[:, None, None], alpha, None, scale=scale)
        out, saved = reference.forward(call, save_out=False, save_mbar=False)
        return out.square().sum() + saved.lse.square().sum()

    return call, formulas, [getattr(case, name) for name in (MAP_NAMES if as_map else NAMES)]


def penalty(call, *tensors):
    """The call's output and the squares of its gradients."""
    value = call(*tensors)
    return value + sum(g.square().sum() for g in torch.autograd.grad(value, tensors, create_graph=True))


def func_penalty(call, *tensors):
    return call(*tensors) + sum(g.square().sum() for g in grad(call, argnums=tuple(range(5)))(*tensors))


def by_autograd(function, tensors):
    copies = [t.detach().clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*copies), copies)


def assert_all_close(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def expected_of(functions):
    _, formulas, tensors = functions
    return by_autograd(lambda *t: penalty(formulas, *t), tensors)


def test_a_gradient_penalty_by_autograd_grad(functions):
    call, _, tensors = functions
    assert_all_close(by_autograd(lambda *t: penalty(call, *t), tensors), expected_of(functions))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_a_gradient_penalty_by_backward(functions):
    call, _, tensors = functions
    copies = [t.detach().clone().requires_grad_() for t in tensors]
    call(*copies).backward(create_graph=True)
    sum(t.grad.square().sum() for t in copies).backward()  # adds to the first gradients
    assert_all_close([t.grad for t in copies], expected_of(functions))
    for t in copies:
        t.grad = None  # these gradients refer to themselves


def test_a_penalty_under_checkpointing(functions):
    call, _, tensors = functions
    checkpointed = lambda *t: checkpoint(call, *t, use_reentrant=False)  # noqa: E731
    assert_all_close(by_autograd(lambda *t: penalty(checkpointed, *t), tensors), expected_of(functions))


def test_func_grad_of_grad(functions):
    call, _, tensors = functions
    assert_all_close(grad(lambda *t: func_penalty(call, *t), argnums=tuple(range(5)))(*tensors), expected_of(functions))


def test_vmap_of_grad_of_grad(functions):
    call, _, tensors = functions
    of_one = grad(lambda *t: func_penalty(call, *t), argnums=tuple(range(5)))
    stacked = [torch.stack([t, t / 2]) for t in tensors]
    separate = zip(*(of_one(*(t[i] for t in stacked)) for i in range(2)), strict=True)
    assert_all_close(vmap(of_one)(*stacked), [torch.stack(t) for t in separate])


def test_jacrev_of_grad_and_the_hessian(functions):
    call, formulas, (query, *rest) = functions
    expected = torch.autograd.functional.hessian(lambda q: formulas(q, *rest), query)
    torch.testing.assert_close(torch.autograd.functional.hessian(lambda q: call(q, *rest), query), expected)
    torch.testing.assert_close(jacrev(grad(call))(query, *rest), expected)


def test_third_derivatives(functions):
    call, formulas, tensors = functions
    third = lambda function: by_autograd(lambda *t: penalty(lambda *u: penalty(function, *u), *t), tensors)  # noqa: E731
    assert_all_close(third(call), third(formulas))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_penalty_inside_a_compiled_function(functions, compiler):
    call, _, tensors = functions
    torch._dynamo.reset()
    compiled = torch.compile(grad(lambda *t: func_penalty(call, *t), argnums=tuple(range(5))), backend=compiler, fullgraph=True)
    assert_all_close(compiled(*tensors), expected_of(functions))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_penalty_by_autograd_grad_inside_a_compiled_function(functions, compiler):
    """The result is right, or torch refuses."""
    call, _, tensors = functions
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: penalty(call, *t), backend=compiler)
    if compiler == "eager":
        assert_all_close(by_autograd(compiled, tensors), expected_of(functions))
    else:
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            by_autograd(compiled, tensors)


def test_what_is_padding_may_be_nan(device):
    case = make_case(2, 2, 3, 7, 4, padded=0.4, device=device)
    tensors = [getattr(case, name) for name in NAMES]
    padding = case.key_padding_mask
    spoilt = [tensors[0], *(t.masked_fill(padding[:, None, :, None], float("nan")) for t in tensors[1:3])]
    spoilt += [tensors[3].masked_fill(padding[:, None, :], float("nan")), tensors[4]]

    def call(*t):
        return soft_masked_attention(*t, key_padding_mask=padding, backend="reference").square().sum()

    got, expected = (by_autograd(lambda *t: penalty(call, *t), inputs) for inputs in (spoilt, tensors))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_op_runs_where_nobody_asks_for_the_graph(functions):
    call, _, tensors = functions
    copies = [t.detach().clone().requires_grad_() for t in tensors]
    ran = {}
    for create_graph in (False, True):
        with Called() as called:
            torch.autograd.grad(call(*copies), copies, create_graph=create_graph)
        ran[create_graph] = any(name.endswith("backward") for name in called.names)
    assert ran == {False: True, True: False}
