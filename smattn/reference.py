"""The maths, written down once, and the slow exact implementation every backend is compared with.

Batch b, query head h, query i, key j, kv head g = h // (H / Hkv); alpha_h is a learned scalar per head, M a soft mask.

    (1)  S   = scale * <q_bhi, k_bgj> + alpha_h * M_bhij
    (2)  P   = softmax over the keys that are not padding         P = exp(S - L)
         A score below -2.3e38 counts as -inf. A query whose keys are all padding, or all score -inf, is dead: its P, O and gradients
         are 0, its L is -inf, and what is fed to its dL is not looked at. A row with a score of NaN or +inf is NaN.
    (3)  O_i = sum_j P_ij C_ij/(1-p) v_bgj                        C = keep mask of dropout, only when p > 0
    (4)  L_i = logsumexp_j S_ij over the same keys                natural logarithm

Backward, given dO, and dL when the caller uses L:

    (5)  delta_i = <dO_i, O_i> - dL_i                             from the unrounded O
    (6)  dP = (dO V^T) * C/(1-p)          dS = P * (dP - delta)
    (7)  dV = (P*C/(1-p))^T dO            dQ = scale * dS K       dK = scale * dS^T Q     (dK, dV summed over the heads of a kv head)
    (8)  dM = sum over M's size-1 axes of alpha_h * dS
         dalpha_h = sum_bij dS * (M - mbar_i) + sum_bi mbar_i * dL_i,   mbar_i = sum_j P_ij M_ij
         Where the call gives logits X instead, M = sigmoid(X) and dX = dM * M (1 - M).

Attention map with head weights w:

    (9)  A_bij = sum_h w_h P_bhij
    (10) eta_bhi = sum_j dA_bij P_bhij    dS_bhij = w_h P_bhij (dA_bij - eta_bhi)
         dw_h = sum_bi eta_bhi                dQ, dK, dM, dalpha as in (7), (8)

dalpha is centred by mbar because a row of dS sums to dL_i only up to rounding: the uncentred sum cancels.
Soft-masked attention is arXiv 2206.00182, section 3; its code writes S - alpha*(1 - M), a constant per row away from (1).

Everything here runs on a whole (B, H, Nq, Nk) score tensor in float32 (float64 for float64 inputs), and `forward` and `attention_map`
are themselves differentiable by autograd, which is how the explicit backward is checked.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .call import Call, Gradients, Needs, Problem, Saved, normalizer_shape, with_remainder, without_rounding

LOWEST_SCORE = -2.3e38  # a score below counts as -inf: in base 2, which the kernels compute in, float32 ends at -2.36e38
_LOW32 = 0xFFFFFFFF


class Scores(NamedTuple):
    """Inputs in the accumulation dtype with padding selected out, and the rows computed from them."""

    query: Tensor  # (B, H, Nq, D)
    key: Tensor  # (B, H, Nk, D): repeated over each group of query heads
    mask: Tensor | None  # (B, H, Nq, Nk), 0 where P is 0
    alpha: Tensor | None  # (H, 1, 1)
    dead: Tensor  # (B, H, Nq, 1) bool: the query has no key to attend to
    s: Tensor  # (B, H, Nq, Nk), -inf at padded keys, 0 in dead rows
    p: Tensor  # (B, H, Nq, Nk)
    lse: Tensor  # (B, H, Nq)


def unsupported_reasons(problem: Problem) -> list[str]:
    """Why this backend cannot run the call; the reference runs everything."""
    return []


def forward(call: Call, *, save_out: bool, save_mbar: bool) -> tuple[Tensor, Saved]:
    """Equations (1)-(4): out (B, H, Nq, Dv), and what backward needs of it."""
    t = softmax(call)
    weights = t.p if call.seed is None else t.p * dropout_factor(call.problem, call.seed)
    out, remainder = with_remainder(weights @ query_head_values(call), call.problem.dtype)  # (3)
    mbar = (t.p * t.mask).sum(-1) if save_mbar and t.mask is not None else None
    return out, Saved(out if save_out else None, remainder if save_out else None, t.lse, mbar, _normalizer(call.problem, t))


def backward(call: Call, saved: Saved, dout: Tensor, dlse: Tensor | None, needs: Needs) -> Gradients:
    """Equations (5)-(8). The rows of `saved` may be over more keys than the call's, which then get the share of P that is theirs."""
    problem, padding = call.problem, call.key_padding_mask
    t = _over_the_keys_of(saved, softmax(call), problem)
    do = dout.to(t.p.dtype).masked_fill(t.dead, 0)
    if dlse is None or problem.Nk == 0:  # a call without keys leaves every gradient 0, on every backend
        dlse = torch.zeros_like(t.lse)
    dl = dlse.masked_fill(t.dead[..., 0], 0)
    dp = do @ query_head_values(call).mT  # (6)
    weights = t.p
    if call.seed is not None:
        keep = dropout_factor(problem, call.seed)
        dp, weights = dp * keep, weights * keep
    delta = (t.p * dp if saved.out is None else do * without_rounding(saved)).sum(-1) - dl  # (5)
    ds = _at_attended(t.p * (dp - delta[..., None]), padding)  # (6)
    grads = score_gradients(call, t, ds, dl, needs, saved.mbar)
    if not needs.value:
        return grads
    # Padding is selected out again: a NaN in dout times a weight of 0 is NaN.
    dvalue = attended(to_kv_heads(weights.mT @ do, problem), padding).to(problem.dtype)  # (7)
    return grads._replace(value=dvalue)


def attention_map(call: Call) -> tuple[Tensor, Saved]:
    """Equation (9): the map (B, Nq, Nk) in the accumulation dtype, and what backward needs of it."""
    t = softmax(call)
    return (_head_weights(call) * t.p).sum(1), Saved(None, None, t.lse, None, _normalizer(call.problem, t))


def attention_map_backward(call: Call, saved: Saved, dmap: Tensor, needs: Needs) -> Gradients:
    """Equation (10): gradients of query, key, mask, alpha and head weights."""
    padding = call.key_padding_mask
    t = softmax(call)
    da = dmap[:, None].to(t.p.dtype).masked_fill(t.dead, 0)
    if padding is not None:
        da = da.masked_fill(padding[:, None, None, :], 0)
    eta = (da * t.p).sum(-1)
    ds = _at_attended(_head_weights(call) * t.p * (da - eta[..., None]), padding)
    grads = score_gradients(call, t, ds, torch.zeros_like(eta), needs)
    return grads._replace(head_weights=eta.sum((0, 2))) if needs.head_weights else grads


def softmax(call: Call) -> Scores:
    """Equations (1), (2), (4). Padded keys are selected out before any product, so that NaN or inf there reaches nothing."""
    problem, padding = call.problem, call.key_padding_mask
    acc = problem.acc_dtype
    q, k = call.query.to(acc), per_query_head(attended(call.key, padding), problem)
    s = (q @ k.mT) * problem.scale  # (1)
    m = a = None
    if call.mask is not None and call.alpha is not None:
        m, a = mask_of_the_batch(call.mask, problem).to(acc), call.alpha[:, None, None]
        if padding is not None:
            m = torch.where(padding[:, None, None, :], 0, m)
        if problem.mask_is_logits:
            m = torch.sigmoid(m)
        s = s + a * m
    s = s.masked_fill(s < LOWEST_SCORE, float("-inf"))
    if padding is not None:
        s = s.masked_fill(padding[:, None, None, :], float("-inf"))
    dead = (s == float("-inf")).all(-1, keepdim=True)
    s = s.masked_fill(dead, 0)  # over nothing but -inf, softmax and its gradient would be NaN
    p = _at_attended(torch.softmax(s, -1).masked_fill(dead, 0), padding)  # (2)
    lse = torch.logsumexp(s, -1).masked_fill(dead[..., 0], float("-inf"))  # (4)
    if m is not None:
        m = m.masked_fill(p == 0, 0)  # what follows multiplies M by P and dS alone: 0 times -inf would be NaN
    return Scores(q, k, m, a, dead, s, p, lse)


def _normalizer(problem: Problem, t: Scores) -> Tensor | None:
    """What Saved calls so."""
    if normalizer_shape(problem) is None:
        return None
    if problem.Nk == 0:
        largest = inverse = torch.zeros_like(t.lse)
    else:  # the weight of the largest score is 1/l
        largest, inverse = t.s.detach().amax(-1), t.p.detach().amax(-1)
    return torch.stack([(largest * math.log2(math.e)).masked_fill(t.dead[..., 0], math.inf), inverse], -1)


def _over_the_keys_of(saved: Saved, t: Scores, problem: Problem) -> Scores:
    """The softmax that the saved rows belong to, at the keys of t. Where those are all of its keys, it is t itself."""
    own = _normalizer(problem, t)
    if saved.normalizer is not None and own is not None:
        (m, inverse), (own_m, own_inverse) = saved.normalizer.unbind(-1), own.unbind(-1)
        dead, share = inverse == 0, torch.exp2(own_m - m) * inverse / own_inverse
    else:
        assert saved.lse is not None, "forward left neither lse nor a normalizer"
        dead, share = saved.lse == float("-inf"), torch.exp(t.lse - saved.lse)
    share = share.masked_fill(dead | t.dead[..., 0], 0)
    return t._replace(p=t.p * share[..., None], dead=dead[..., None])


def score_gradients(call: Call, t: Scores, ds: Tensor, dl: Tensor, needs: Needs, mbar: Tensor | None = None) -> Gradients:
    """Equations (7), (8): what dS (B, H, Nq, Nk) and dL (B, H, Nq) give for query, key, mask and alpha, which are all it fills in.

    mbar: (B, H, Nq), where it is over more keys than t's.
    """
    problem, mask, padding = call.problem, call.mask, call.key_padding_mask
    dquery = dkey = dmask = dalpha = None
    if needs.query:
        dquery = ((ds @ t.key) * problem.scale).to(problem.dtype)
    if needs.key:
        dkey = attended(to_kv_heads((ds.mT @ t.query) * problem.scale, problem), padding).to(problem.dtype)
    if needs.mask and mask is not None and problem.B == 0:
        dmask = torch.zeros_like(mask)
    elif needs.mask and mask is not None and t.alpha is not None:
        dmask = by_mask_axes(t.alpha * ds, problem).sum_to_size(mask.shape)
        if problem.mask_is_logits:
            dmask = through_sigmoid(dmask, mask, None if padding is None else by_mask_axes(padding, problem))
        dmask = dmask.to(mask.dtype)
    if needs.alpha and t.mask is not None:
        mbar = (t.p * t.mask).sum(-1) if mbar is None else mbar
        dalpha = (ds * (t.mask - mbar[..., None])).sum((0, 2, 3)) + (mbar * dl).sum((0, 2))
    return Gradients(dquery, dkey, None, dmask, dalpha)


def mask_of_the_batch(mask: Tensor, problem: Problem) -> Tensor:
    """A mask (outer|1, inner|1, H|1, Nq|1, Nk) as (B|1, H|1, Nq|1, Nk). Only here is a mask that part of the batch shares ever copied."""
    if problem.B == 0 or mask.shape[0] * mask.shape[1] in (1, problem.B):
        return mask.flatten(0, 1)[: problem.B]
    inner = problem.inner_batch
    return mask.expand(problem.B // inner, inner, *mask.shape[2:]).flatten(0, 1)


def by_mask_axes(rows: Tensor, problem: Problem) -> Tensor:
    """A tensor (B, ...) as (outer, inner, ...), the batch axes of the mask."""
    inner = problem.inner_batch
    return rows.unflatten(0, (problem.B // inner, inner))


def through_sigmoid(dmask: Tensor, logits: Tensor, padding: Tensor | None) -> Tensor:
    """Equation (8): dX from dM and X. 1 - M is computed as the sigmoid of -X, which is as exact as M.

    Keys that are padding wherever X is used are selected out of X.

    dmask, logits: (outer|1, inner|1, H|1, Nq|1, Nk). padding: bool (outer, inner, Nk).
    """
    x = logits.to(dmask.dtype)
    if padding is not None:
        for axis in (0, 1):
            if x.shape[axis] == 1:
                padding = padding.all(axis, keepdim=True)
        x = x.masked_fill(padding[:, :, None, None, :], 0)
    return dmask * torch.sigmoid(x) * torch.sigmoid(-x)


def attended(rows: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """Key or value rows (B, Hkv, Nk, D) with those of padded keys replaced by zeros."""
    return rows if key_padding_mask is None else rows.masked_fill(key_padding_mask[:, None, :, None], 0)


def query_head_values(call: Call) -> Tensor:
    """The value rows (B, H, Nk, Dv) that the query heads read, zeros at padded keys."""
    assert call.value is not None
    return per_query_head(attended(call.value, call.key_padding_mask), call.problem)


def _head_weights(call: Call) -> Tensor:
    """The head weights of an attention map, (H, 1, 1)."""
    assert call.head_weights is not None
    return call.head_weights[:, None, None]


def _at_attended(scores: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """P or dS with padded keys selected out: a NaN elsewhere in the row does not reach them."""
    return scores if key_padding_mask is None else scores.masked_fill(key_padding_mask[:, None, None, :], 0)


def per_query_head(rows: Tensor, problem: Problem) -> Tensor:
    return rows.to(problem.acc_dtype).repeat_interleave(problem.H // problem.Hkv, 1)


def to_kv_heads(rows: Tensor, problem: Problem) -> Tensor:
    return rows.unflatten(1, (problem.Hkv, problem.H // problem.Hkv)).sum(2)


def dropout_factor(problem: Problem, seed: Tensor) -> Tensor:
    """C/(1-p) of (3), in the accumulation dtype."""
    keep = dropout_keep(seed, problem.B, problem.H, problem.Nq, problem.Nk, problem.dropout_p)
    return keep.to(problem.acc_dtype) / (1 - problem.dropout_p)


def dropout_keep(seed: Tensor, B: int, H: int, Nq: int, Nk: int, p: float) -> Tensor:
    """The keep mask C of (3), bool (B, H, Nq, Nk): the same bits on every backend.

    Element (b, h, i, j) is dropped iff word 0 of Philox4x32-10 (Salmon et al., SC'11), key = seed (int64, shape (1,)),
    counter = (j, i, b*H + h, 0), is below floor(p * 2^32).
    """

    def count(n: int) -> Tensor:
        return torch.arange(n, device=seed.device)

    x = torch.broadcast_tensors(count(Nk), count(Nq)[:, None], count(B * H)[:, None, None], count(1))
    c0, c1, c2, c3 = x
    key0, key1 = seed & _LOW32, (seed >> 32) & _LOW32
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps, the 64 bits are right
        c0, c2 = ((product1 >> 32) & _LOW32) ^ c1 ^ key0, ((product0 >> 32) & _LOW32) ^ c3 ^ key1
        c1, c3 = product1 & _LOW32, product0 & _LOW32
        key0, key1 = (key0 + 0x9E3779B9) & _LOW32, (key1 + 0xBB67AE85) & _LOW32
    return (c0 >= int(p * 2**32)).view(B, H, Nq, Nk)
