"""Soft-masked attention in plain PyTorch: the yardstick of the error budget."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import reference
from ..call import Call
from ..canonical import of_batch
from .cases import Case, Results, with_gradients


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    alpha: Tensor | None = None,
    *,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Soft-masked attention as one writes it in plain PyTorch, by its promotion rules.

    A score below reference.LOWEST_SCORE counts as -inf. A query whose scores are all -inf is dead: its rows of all three results are 0.

    Args:
        query, key, value: (B, H, Nq, D), (B, H, Nk, D), (B, H, Nk, Dv); heads of keys and values are repeated by the caller.
        mask: (B|1, H|1, Nq|1, Nk).
        alpha: (H,).
        scale, key_padding_mask: as in soft_masked_attention.
        keep: the dropout factor, 0 or 1/(1-p), (B, H, Nq, Nk).

    Returns:
        The output (B, H, Nq, Dv), the scores S and the probabilities P, both (B, H, Nq, Nk).
    """
    s = (query @ key.mT) * (query.shape[3] ** -0.5 if scale is None else scale)
    if mask is not None and alpha is not None:
        s = s + alpha[:, None, None].to(mask.dtype) * mask
    if key_padding_mask is not None:
        s = s.masked_fill(key_padding_mask[:, None, None, :], float("-inf"))
    s = s.masked_fill(s < reference.LOWEST_SCORE, float("-inf"))
    dead = (s == float("-inf")).all(-1, keepdim=True)
    s = s.masked_fill(dead, 0)
    p = torch.softmax(s, -1).masked_fill(dead, 0)
    return (p if keep is None else p * keep).to(value.dtype) @ value, s, p


def run_plain(case: Case) -> Results:
    """plain() on a case, and its gradients by autograd, named as in `run`."""
    return run_plain_and_dead(case)[0]


def run_plain_and_dead(case: Case) -> tuple[Results, Tensor]:
    """run_plain, and which queries are dead in plain()'s arithmetic, (B, H, Nq).

    Padded keys are zeroed first, and so are the gradients that are fed to dead queries.
    """
    leaves = {name: t.detach().requires_grad_() for name, t in case.inputs().items()}
    c = case.with_inputs(leaves)
    call = c.call()
    problem, padding, seed = call.problem, call.key_padding_mask, call.seed
    groups = problem.H // problem.Hkv
    k = reference.attended(call.key, padding).repeat_interleave(groups, 1)
    v = k if call.value is None else reference.attended(call.value, padding).repeat_interleave(groups, 1)
    keep = None if seed is None else reference.dropout_factor(problem, seed)
    out, s, p = plain(call.query, k, v, _mask(call), call.alpha, scale=problem.scale, key_padding_mask=padding, keep=keep)
    dead = ~p.any(-1)
    if call.head_weights is not None:
        amap = (call.head_weights[:, None, None] * p).sum(1)
        if padding is not None:
            amap = amap.masked_fill(padding[:, None, :], 0)  # the gradient fed to a padded key may be NaN
        return with_gradients({"map": of_batch(amap, c.batch)}, leaves, c), dead
    outputs = {"out": of_batch(out, c.batch)}
    alive = replace(c, dout=c.dout.masked_fill(of_batch(dead, c.batch)[..., None], 0))
    if c.dlse is not None:
        lse = torch.logsumexp(s, -1).to(problem.acc_dtype).masked_fill(dead, float("-inf"))
        outputs["lse"] = of_batch(lse, c.batch)
        alive = replace(alive, dlse=c.dlse.masked_fill(of_batch(dead, c.batch), 0))
    return with_gradients(outputs, leaves, alive), dead


def _mask(call: Call) -> Tensor | None:
    """M (B|1, H|1, Nq|1, Nk), from logits where the call has them; 0 at padded keys, (B, ...) then."""
    if call.mask is None:
        return None
    mask = reference.mask_of_the_batch(call.mask, call.problem)
    if call.key_padding_mask is not None:
        padding = call.key_padding_mask[:, None, None, :]
        mask = torch.where(padding, torch.zeros((), dtype=mask.dtype, device=mask.device), mask)
    return torch.sigmoid(mask) if call.problem.mask_is_logits else mask
