"""The error budget: how far from float64 a tensor may be, whatever backend computed it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..call import Call, Gradients, Needs
from ..canonical import of_batch, one_batch_axis
from .cases import Case, Results
from .plain import run_plain_and_dead


class Exact(NamedTuple):
    """A case in float64."""

    values: Results  # every tensor T
    magnitudes: Results  # A(T): T's formula with absolute values in place of signs
    largest_score: float  # max|S| where P is not 0
    dead: Tensor  # (B, H, Nq) bool: queries that have no key to attend to


def run_exact(case: Case) -> Exact:
    """A case's outputs and gradients in float64 by reference.py, named as in `run`."""
    c = _in_float64(case)
    call = c.call()
    t = reference.softmax(call)
    largest = t.s.abs().where(t.p > 0, 0).max().item() if t.s.numel() else 0.0
    run_exactly = _exact_map if c.is_map else _exact_attention
    values, magnitudes, ds, dl = run_exactly(c, call, t)
    magnitudes |= _score_magnitudes(call, t, ds, dl)
    if "lse" in values:
        magnitudes["lse"] = torch.full_like(t.lse, 1 + largest)
    return Exact(_as_given(values, case), _as_given(magnitudes, case), largest, t.dead[..., 0])


def dead_queries(case: Case) -> Tensor:
    """The queries that have no key to attend to, because all are padding or all their scores count as -inf: (B, H, Nq) bool."""
    return reference.softmax(_in_float64(case).call()).dead[..., 0]


def _in_float64(case: Case) -> Case:
    doubles = {name: t.detach().double() for name, t in case.inputs().items()}
    return replace(case.with_inputs(doubles), dout=case.dout.double(), dlse=None if case.dlse is None else case.dlse.double())


_Named = dict[str, "Tensor | None"]


def _exact_attention(c: Case, call: Call, t: reference.Scores) -> tuple[_Named, _Named, Tensor, Tensor]:
    """Values, the magnitudes of out and dvalue, and the magnitudes of dS and dL."""
    dout, dlse = one_batch_axis(c.dout, 3), one_batch_axis(c.dlse, 2)
    out, saved = reference.forward(call, save_out=False, save_mbar=True)
    has_mask = call.mask is not None
    grads = reference.backward(call, saved, dout, dlse, Needs(True, True, True, has_mask, has_mask))
    values: _Named = {"out": out, **_named(grads)}
    if dlse is not None:
        values["lse"] = saved.lse

    problem, seed = call.problem, call.seed
    v = reference.query_head_values(call).abs()
    keep = torch.ones((), dtype=v.dtype, device=v.device) if seed is None else reference.dropout_factor(problem, seed)
    do = dout.masked_fill(t.dead, 0).abs()
    dl = torch.zeros_like(t.lse) if dlse is None else dlse.masked_fill(t.dead[..., 0], 0).abs()
    out_magnitude = (t.p * keep) @ v
    ds = t.p * ((do @ v.mT) * keep + (do * out_magnitude).sum(-1, keepdim=True) + dl[..., None])
    dvalue = reference.to_kv_heads((t.p * keep).mT @ do, problem)
    return values, {"out": out_magnitude, "dvalue": dvalue}, ds, dl


def _exact_map(c: Case, call: Call, t: reference.Scores) -> tuple[_Named, _Named, Tensor, Tensor]:
    """Values, the magnitudes of map and dhead_weights, and the magnitudes of dS and dL."""
    assert c.head_weights is not None
    amap, saved = reference.attention_map(call)
    has_mask, dmap = call.mask is not None, one_batch_axis(c.dout, 2)
    grads = reference.attention_map_backward(call, saved, dmap, Needs(True, True, False, has_mask, has_mask, True))
    values: _Named = {"map": amap, **_named(grads)}

    dmap = dmap[:, None].masked_fill(t.p == 0, 0).abs()  # padded keys may be fed anything
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
    """The budget of every tensor in actual, in both norms: `err <= 2 * err_plain + eps * |T64| + 4 * u * (1 + max|S|) * |A(T)|`.

    eps is that of the tensor's dtype, for dmask and dmask_logits the coarser of that and query's: the gradient of a float32 mask comes
    through 16-bit products. u = 2^-24 (2^-53 for float64 inputs). Whatever is not finite must equal the exact value.
    """
    return _errors(actual, case, run_exact(case))


def _errors(actual: Results, case: Case, exact: Exact) -> list[Error]:
    yardstick, plainly_dead = run_plain_and_dead(case)
    overflowed = not torch.equal(plainly_dead, exact.dead)
    u = 2.0**-53 if case.query.dtype == torch.float64 else 2.0**-24
    band = 4 * u * (1 + exact.largest_score)
    rows = []
    for name, value in actual.items():
        expected = exact.values[name]
        difference = _difference(value, expected)
        error, plain = _norms(difference), _norms(_difference(yardstick[name], expected))
        if overflowed or not all(map(math.isfinite, plain)):
            plain = (0.0, 0.0)  # a yardstick that overflowed excuses nothing
        sizes = zip(plain, _norms(expected.nan_to_num(0, 0, 0)), _norms(exact.magnitudes[name]), strict=True)
        max_allowed, frobenius_allowed = (2 * p + _eps(name, value, case) * size + band * a for p, size, a in sizes)
        worst = torch.unravel_index(difference.argmax(), difference.shape) if difference.numel() else ()
        rows.append(Error(name, error, plain, (max_allowed, frobenius_allowed), tuple(int(i) for i in worst)))
    return rows


def _eps(name: str, tensor: Tensor, case: Case) -> float:
    eps = torch.finfo(tensor.dtype).eps
    return max(eps, torch.finfo(case.query.dtype).eps) if name in ("dmask", "dmask_logits") else eps


def assert_within_budget(actual: Results, case: Case) -> None:
    """Raise AssertionError naming each tensor that is outside its budget, or that is not exactly 0 (lse: -inf) where a query is dead.

    No result at all is an error as well, and so is one of the wrong shape or dtype.
    """
    _assert_forms(actual, case)
    exact = run_exact(case)
    _assert_dead(actual, case, exact.dead)
    outside = [str(row) for row in _errors(actual, case, exact) if not row.within]
    if outside:
        raise AssertionError("outside the error budget\n" + "\n".join(outside))


def assert_dead_rows(actual: Results, case: Case) -> None:
    """Raise AssertionError unless a dead query's lse is -inf and every element that sums dead queries alone is exactly 0."""
    _assert_forms(actual, case)
    _assert_dead(actual, case, dead_queries(case))


def _assert_forms(actual: Results, case: Case) -> None:
    if not actual:
        raise AssertionError("expected at least one result, got none")
    inputs, acc = case.inputs(), case.problem().acc_dtype
    forms = {"out": (case.dout.shape, case.query.dtype), "lse": (case.query.shape[:-1], acc), "map": (case.dout.shape, acc)}
    forms |= {f"d{name}": (tensor.shape, tensor.dtype) for name, tensor in inputs.items()}
    for name, tensor in actual.items():
        if name not in forms:
            raise AssertionError(f"{name}: not a result of this call, which has {', '.join(forms)}")
        shape, dtype = forms[name]
        if tensor.shape != shape or tensor.dtype != dtype:
            raise AssertionError(f"{name}: expected {tuple(shape)} {dtype}, got {tuple(tensor.shape)} {tensor.dtype}")


def _assert_dead(actual: Results, case: Case, dead: Tensor) -> None:
    wrong, dead = [], of_batch(dead, case.batch)
    for name, tensor in actual.items():
        if name == "lse":
            if not tensor[dead].eq(float("-inf")).all():
                wrong.append("lse: expected -inf for every dead query")
        elif tensor.masked_fill(~_summed_from(dead, name, case), 0).any():
            wrong.append(f"{name}: expected exact zeros for every dead query")
    if wrong:
        raise AssertionError("\n".join(wrong))


def _summed_from(dead: Tensor, name: str, case: Case) -> Tensor:
    """Which elements of a tensor are computed from dead queries alone, in a shape that broadcasts to the tensor's.

    dead: (*batch, H, Nq).
    """
    if name == "map":
        return dead.all(-2)[..., None]
    if name in ("dkey", "dvalue"):
        Hkv = case.key.shape[-3]
        return dead.all(-1).unflatten(-1, (Hkv, -1)).all(-1)[..., None, None]
    if name in ("dmask", "dmask_logits"):
        mask = case.inputs()[name[1:]]
        with_heads = mask if mask.dim() == dead.dim() + 1 else mask.unsqueeze(-3)
        alive = (~dead[..., None]).long().sum_to_size(*with_heads.shape[:-1], 1)
        return (alive == 0).view(*mask.shape[:-1], 1)
    if name in ("dalpha", "dhead_weights"):
        of_head = dead.all(-1).flatten(0, -2).all(0)
        return of_head if case.inputs()[name[1:]].dim() else of_head.all()
    return dead[..., None]  # out, dquery


def _difference(actual: Tensor, exact: Tensor) -> Tensor:
    """|actual - exact| in float64: 0 where both are the same infinity (exact once rounded), inf where anything else is not finite."""
    difference = (actual.double() - exact).abs()
    overflow = actual.isinf() & (actual == exact.to(actual.dtype))
    return difference.masked_fill(overflow, 0).nan_to_num(float("inf"), float("inf"))


def _norms(tensor: Tensor) -> tuple[float, float]:
    return (tensor.abs().max().item(), torch.linalg.vector_norm(tensor).item()) if tensor.numel() else (0.0, 0.0)


def _as_given(results: _Named, case: Case) -> Results:
    """Canonical gradients by the names and in the shapes of the case's own arguments: a 3-D mask, an alpha of shape ()."""
    inputs = case.inputs()
    outputs = {"out": case.dout, "map": case.dout, "lse": case.dlse}
    if "mask_logits" in inputs:
        results = {"dmask_logits" if name == "dmask" else name: tensor for name, tensor in results.items()}
    given = {}
    for name, tensor in results.items():
        if tensor is None or name.startswith("d") and name[1:] not in inputs:
            continue
        form = outputs[name] if name in outputs else inputs[name[1:]]
        assert form is not None
        given[name] = tensor.sum_to_size(form.shape) if form.dim() < 2 else tensor.view(form.shape)
    return given
