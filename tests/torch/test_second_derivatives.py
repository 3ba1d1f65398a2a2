"""Second derivatives and forward mode are refused on every route; none gives a wrong number in silence.

The reference has second derivatives where it is asked for by name (promises/test_reference_derivatives.py). Here backend=None takes it,
and `any_function` has what it refuses as well.
"""

import sys
from itertools import product

import pytest
import torch

from smattn import attention_map, soft_masked_attention
from smattn.testing import make_case
from tests.support.expected import names

pytestmark = pytest.mark.promise("second derivatives", "refuses well")
NOT_IMPLEMENTED = "second derivatives of soft-masked attention are not implemented"
NO_FORWARD_MODE = "forward-mode derivatives of soft-masked attention are not implemented.* jacrev of jacrev with backend='reference'"


CALLS = [*product(["out", "lse"], names()), *product(["map"], names(attention_map=True))]


def scalar(what, backend, device):
    """A scalar function of the mask that can be differentiated once, and a mask."""
    case = make_case(1, 2, 3, 7, 4, device=device)

    def call(mask):
        if what == "map":
            return attention_map(case.query, case.key, mask, case.alpha, backend=backend).square().sum()
        out, lse = soft_masked_attention(case.query, case.key, case.value, mask, case.alpha, return_lse=True, backend=backend)
        return (out if what == "out" else lse).square().sum()

    return call, case.mask


@pytest.fixture(params=CALLS, ids="-".join)
def any_function(request, device):
    return scalar(*request.param, device)


@pytest.fixture(params=CALLS, ids="-".join)
def function(request, device, monkeypatch):
    what, backend = request.param
    if backend != "reference":
        return scalar(what, backend, device)
    table = sys.modules["smattn.backends"]  # smattn.backends is the function
    monkeypatch.setattr(table, "TABLE", [row for row in table.TABLE if row.name == "reference"])
    return scalar(what, None, device)


def test_a_gradient_penalty_by_autograd_grad(function):
    call, mask = function
    mask.requires_grad_()
    (gradient,) = torch.autograd.grad(call(mask), mask, create_graph=True)
    with pytest.raises(NotImplementedError, match=NOT_IMPLEMENTED):
        torch.autograd.grad(gradient.square().sum(), mask)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_a_gradient_penalty_by_backward(function):
    call, mask = function
    mask.requires_grad_()
    call(mask).backward(create_graph=True)
    with pytest.raises(NotImplementedError, match=NOT_IMPLEMENTED):
        mask.grad.square().sum().backward()
    mask.grad = None


def test_the_derivative_with_respect_to_the_incoming_gradient(function):
    call, mask = function
    mask.requires_grad_()
    weight = torch.ones((), device=mask.device, requires_grad=True)
    (gradient,) = torch.autograd.grad(call(mask) * weight, mask, create_graph=True)
    with pytest.raises(NotImplementedError, match=NOT_IMPLEMENTED):
        torch.autograd.grad(gradient.sum(), weight)


def test_batched_gradients(any_function):
    call, mask = any_function
    mask.requires_grad_()
    value, rows = call(mask), torch.ones(2, device=mask.device)
    torch.autograd.grad(value, mask, rows, is_grads_batched=True, retain_graph=True)
    with pytest.raises(NotImplementedError, match=NOT_IMPLEMENTED):
        torch.autograd.grad(value, mask, rows, is_grads_batched=True, create_graph=True)


def test_a_vectorized_jacobian_with_its_graph(any_function):
    call, mask = any_function
    with pytest.raises(NotImplementedError, match=NOT_IMPLEMENTED):
        torch.autograd.functional.jacobian(call, mask, create_graph=True, vectorize=True)


def test_func_grad_of_grad(function):
    call, mask = function
    with pytest.raises(NotImplementedError, match=NOT_IMPLEMENTED):
        torch.func.grad(lambda m: torch.func.grad(call)(m).square().sum())(mask)


def test_func_jacrev_of_grad(function):
    call, mask = function
    with pytest.raises(NotImplementedError, match=NOT_IMPLEMENTED):
        torch.func.jacrev(torch.func.grad(call))(mask)


def test_a_hessian_by_forward_mode(any_function):
    call, mask = any_function
    with pytest.raises(NotImplementedError, match=NO_FORWARD_MODE):
        torch.func.hessian(call)(mask)


def test_a_hessian_by_backward(function):
    call, mask = function
    with pytest.raises(NotImplementedError, match=NOT_IMPLEMENTED):
        torch.autograd.functional.hessian(call, mask)


def test_forward_mode(any_function):
    call, mask = any_function
    with pytest.raises(NotImplementedError, match=NO_FORWARD_MODE):
        torch.func.jvp(call, (mask,), (torch.ones_like(mask),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match=NO_FORWARD_MODE):
        call(torch.autograd.forward_ad.make_dual(mask, torch.ones_like(mask)))


def test_forward_mode_of_a_gradient(function):
    """The tangent is of the incoming gradient alone, so that it meets backward and not forward."""
    call, mask = function
    _, gradient_of = torch.func.vjp(call, mask)
    one = torch.ones((), device=mask.device)
    with pytest.raises(NotImplementedError, match=NO_FORWARD_MODE):
        torch.func.jvp(gradient_of, (one,), (one,))


def test_a_compiled_gradient_penalty(any_function):
    call, mask = any_function
    torch._dynamo.reset()
    mask.requires_grad_()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(mask), mask, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient.square().sum().backward()
    with pytest.raises(RuntimeError, match="appears to not have been used"):
        torch.autograd.grad(gradient.square().sum(), mask)


COMPILERS = pytest.mark.parametrize("compiler", ["eager", "aot_eager"])


@COMPILERS
def test_transforms_of_a_gradient_inside_a_compiled_function(function, compiler):
    call, mask = function
    for transformed in (
        torch.func.grad(lambda m: torch.func.grad(call)(m).square().sum()),
        torch.func.grad(lambda m: call(m) + torch.func.grad(call)(m).square().sum()),
        torch.func.jacrev(torch.func.grad(call)),
    ):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=NOT_IMPLEMENTED):
            torch.compile(transformed, backend=compiler, fullgraph=True)(mask)


@COMPILERS
def test_backward_through_a_gradient_inside_a_compiled_function(function, compiler):
    call, mask = function
    mask.requires_grad_()
    for penalised in (
        lambda m: torch.func.grad(call)(m).square().sum(),
        lambda m: call(m) + torch.func.grad(call)(m).square().sum(),
    ):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=NOT_IMPLEMENTED):
            torch.compile(penalised, backend=compiler, fullgraph=True)(mask).backward()


@COMPILERS
def test_a_penalty_inside_a_compiled_function(function, compiler):
    """Dynamo leaves torch.autograd.grad to Python, between a graph before it and one after it."""
    call, mask = function
    torch._dynamo.reset()
    mask.requires_grad_()

    def penalised(mask):
        value = call(mask)
        (gradient,) = torch.autograd.grad(value, mask, create_graph=True)
        return value + gradient.square().sum()

    torchs_own = "does not currently support double backward"
    with pytest.raises(RuntimeError, match=NOT_IMPLEMENTED if compiler == "eager" else torchs_own):
        torch.compile(penalised, backend=compiler)(mask).backward()


def test_checkpointing_does_not_open_a_way(function):
    call, mask = function
    mask.requires_grad_()
    value = torch.utils.checkpoint.checkpoint(call, mask, use_reentrant=False)
    (gradient,) = torch.autograd.grad(value, mask, create_graph=True)
    with pytest.raises(NotImplementedError, match=NOT_IMPLEMENTED):
        torch.autograd.grad(gradient.sum(), mask)
