"""The error budget: how far from float64 a tensor may be, whatever backend computed it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..call import Call, Gradients, Needs
from .cases import Case, Results, run_plain


class Exact(NamedTuple):
    """A case in float64: every tensor T, its magnitude A(T), the same formula with absolute values in place of signs, and max|S|."""

    values: Results
    magnitudes: Results
    largest_score: float


def run_exact(case: Case) -> Exact:
    """A case's outputs and gradients in float64 by reference.py, named as in `run`."""
    c = replace(case.with_inputs({name: t.detach().double() for name, t in case.inputs().items()}), dout=case.dout.double())
    call = c.call()
    t = reference.softmax(call)
    largest = t.s.masked_fill(t.s == float("-inf"), 0).abs().max().item() if t.s.numel() else 0.0
    run_exactly = _exact_map if c.is_map else _exact_attention
    values, magnitudes, ds, dl = run_exactly(c, call, t)
    magnitudes |= _score_magnitudes(call, t, ds, dl)
    if "lse" in values:
        magnitudes["lse"] = torch.full_like(t.lse, 1 + largest)
    return Exact(_as_given(values, case), _as_given(magnitudes, case), largest)


_Named = dict[str, "Tensor | None"]


def _exact_attention(c: Case, call: Call, t: reference.Scores) -> tuple[_Named, _Named, Tensor, Tensor]:
    """Values, the magnitudes of out and dvalue, and the magnitudes of dS and dL."""
    dlse = None if c.dlse is None else c.dlse.double()
    out, saved = reference.forward(call, save_out=True, save_mbar=True)
    has_mask = call.mask is not None
    grads = reference.backward(call, saved, c.dout, dlse, Needs(True, True, True, has_mask, has_mask))
    values: _Named = {"out": out, **_named(grads)}
    if dlse is not None:
        values["lse"] = saved.lse

    problem, seed = call.problem, call.seed
    v = reference.query_head_values(call).abs()
    keep = torch.ones((), dtype=v.dtype, device=v.device) if seed is None else reference.dropout_factor(problem, seed)
    do = c.dout.masked_fill(t.dead, 0).abs()
    dl = torch.zeros_like(t.lse) if dlse is None else dlse.masked_fill(t.dead[..., 0], 0).abs()
    out_magnitude = (t.p * keep) @ v
    ds = t.p * ((do @ v.mT) * keep + (do * out_magnitude).sum(-1, keepdim=True) + dl[..., None])
    dvalue = reference.to_kv_heads((t.p * keep).mT @ do, problem)
    return values, {"out": out_magnitude, "dvalue": dvalue}, ds, dl


def _exact_map(c: Case, call: Call, t: reference.Scores) -> tuple[_Named, _Named, Tensor, Tensor]:
    """Values, the magnitudes of map and dhead_weights, and the magnitudes of dS and dL."""
    assert c.head_weights is not None
    amap, lse = reference.attention_map(call)
    has_mask = call.mask is not None
    grads = reference.attention_map_backward(call, lse, c.dout, Needs(True, True, False, has_mask, has_mask, True))
    values: _Named = {"map": amap, **_named(grads)}

    dmap = c.dout[:, None].masked_fill(t.p == 0, 0).abs()  # padded keys may be fed anything
    w = c.head_weights.abs()[:, None, None]
    eta = (dmap * t.p).sum(-1)
    ds = w * t.p * (dmap + eta[..., None])
    return values, {"map": (w * t.p).sum(1), "dhead_weights": eta.sum((0, 2))}, ds, torch.zeros_like(eta)


def _named(grads: Gradients) -> _Named:
    return {f"d{name}": grad for name, grad in grads._asdict().items()}


def _score_magnitudes(call: Call, t: reference.Scores, ds: Tensor, dl: Tensor) -> _Named:
    """A(T) of the gradients that come from dS, given the magnitudes of dS and dL."""
    positive = t._replace(query=t.query.abs(), key=t.key.abs(), alpha=None if t.alpha is None else t.alpha.abs())
    call = call._replace(problem=call.problem._replace(scale=abs(call.problem.scale)))
    needs = Needs(query=True, key=True, value=False, mask=call.mask is not None, alpha=False)
    dquery, dkey, _, dmask, *_ = reference.score_gradients(call, positive, ds, dl, needs)
    dalpha = None
    if t.mask is not None:
        mbar = (t.p * t.mask).sum(-1, keepdim=True)
        dalpha = (ds * (t.mask - mbar).abs()).sum((0, 2, 3)) + (mbar[..., 0] * dl).abs().sum((0, 2))
    return {"dquery": dquery, "dkey": dkey, "dmask": dmask, "dalpha": dalpha}


@dataclass(frozen=True)
class Error:
    """How far one tensor is from float64, beside plain PyTorch's distance and what the budget allows; in max norm and Frobenius norm."""

    name: str
    error: tuple[float, float]
    plain: tuple[float, float]
    allowed: tuple[float, float]
    worst: tuple[int, ...]  # index of the largest error

    @property
    def within(self) -> bool:
        return all(math.isfinite(error) and error <= allowed for error, allowed in zip(self.error, self.allowed, strict=True))

    def __str__(self) -> str:
        parts = (
            f"{norm} {error:.3e} (allowed {allowed:.3e}, plain {plain:.3e})"
            for norm, error, allowed, plain in zip(("max", "Frobenius"), self.error, self.allowed, self.plain, strict=True)
        )
        return f"{self.name}: error {', '.join(parts)}, worst at {self.worst}"


def errors(actual: Results, case: Case) -> list[Error]:
    """The budget of every tensor in actual, in both norms: err <= 2 * err_plain + eps * |T64| + 4 * u * (1 + max|S|) * |A(T)|.

    eps is that of the tensor's dtype, u = 2^-24 (2^-53 for float64 inputs). Whatever is not finite must equal the exact value.
    """
    exact, yardstick = run_exact(case), run_plain(case)
    u = 2.0**-53 if case.query.dtype == torch.float64 else 2.0**-24
    band = 4 * u * (1 + exact.largest_score)
    rows = []
    for name, value in actual.items():
        expected = exact.values[name]
        difference = _difference(value, expected)
        error, plain = _norms(difference), _norms(_difference(yardstick[name], expected))
        plain = plain if all(map(math.isfinite, plain)) else (0.0, 0.0)  # a yardstick that overflowed excuses nothing
        eps = torch.finfo(value.dtype).eps
        sizes = zip(plain, _norms(expected.nan_to_num(0, 0, 0)), _norms(exact.magnitudes[name]), strict=True)
        max_allowed, frobenius_allowed = (2 * p + eps * size + band * a for p, size, a in sizes)
        worst = torch.unravel_index(difference.argmax(), difference.shape) if difference.numel() else ()
        rows.append(Error(name, error, plain, (max_allowed, frobenius_allowed), tuple(int(i) for i in worst)))
    return rows


def assert_within_budget(actual: Results, case: Case) -> None:
    """Raise AssertionError for no result, for one of the wrong shape or dtype, or naming each tensor outside its budget."""
    if not actual:
        raise AssertionError("expected at least one result, got none")
    inputs, acc = case.inputs(), case.problem().acc_dtype
    B, H, Nq, _ = case.query.shape
    forms = {"out": (case.dout.shape, case.query.dtype), "lse": ((B, H, Nq), acc), "map": (case.dout.shape, acc)}
    forms |= {f"d{name}": (tensor.shape, tensor.dtype) for name, tensor in inputs.items()}
    for name, tensor in actual.items():
        if name not in forms:
            raise AssertionError(f"{name}: not a result of this call, which has {', '.join(forms)}")
        shape, dtype = forms[name]
        if tensor.shape != shape or tensor.dtype != dtype:
            raise AssertionError(f"{name}: expected {tuple(shape)} {dtype}, got {tuple(tensor.shape)} {tensor.dtype}")
    outside = [str(row) for row in errors(actual, case) if not row.within]
    if outside:
        raise AssertionError("outside the error budget\n" + "\n".join(outside))


def _difference(actual: Tensor, exact: Tensor) -> Tensor:
    """|actual - exact| in float64: 0 where both are the same infinity (exact's once rounded), inf where anything else is not finite."""
    difference = (actual.double() - exact).abs()
    overflow = actual.isinf() & (actual == exact.to(actual.dtype))
    return difference.masked_fill(overflow, 0).nan_to_num(float("inf"), float("inf"))


def _norms(tensor: Tensor) -> tuple[float, float]:
    return (tensor.abs().max().item(), torch.linalg.vector_norm(tensor).item()) if tensor.numel() else (0.0, 0.0)


def _as_given(results: _Named, case: Case) -> Results:
    """Canonical gradients by the names and in the shapes of the case's own arguments: a 3-D mask, an alpha of shape ()."""
    inputs = case.inputs()
    if "mask_logits" in inputs:
        results = {"dmask_logits" if name == "dmask" else name: tensor for name, tensor in results.items()}
    given = {}
    for name, tensor in results.items():
        if tensor is None or name.startswith("d") and name[1:] not in inputs:
            continue
        argument = inputs.get(name[1:])
        given[name] = (
            tensor if argument is None else tensor.sum_to_size(argument.shape) if argument.dim() < 2 else tensor.view(argument.shape)
        )
    return given
