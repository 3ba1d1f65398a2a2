"""Every refusal of the public functions: ValueError or TypeError before anything runs, saying "argument: expected this, got that"."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import hints
from .backends import NAMES
from .call import acc_dtype
from .canonical import two_batch_axes

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def validate(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    mask: Tensor | None,
    alpha: float | Tensor | None,
    *,
    mask_logits: Tensor | None,
    head_weights: Tensor | None = None,
    scale: float | None,
    dropout_p: float = 0.0,
    key_padding_mask: Tensor | None,
    enable_gqa: bool,
    return_lse: bool = False,
    backend: str | None,
    is_map: bool = False,
) -> None:
    """Refuse a call that is not well formed, naming the argument, what was expected and what came.

    Raises TypeError for a wrong type, ValueError for anything else.
    """
    for name, flag in (("enable_gqa", enable_gqa), ("return_lse", return_lse)):
        if not isinstance(flag, bool):
            _wrong_type(name, "a bool", flag)
    _check_qkv(query, key, value, enable_gqa, is_map)
    if mask is not None and mask_logits is not None:
        _refuse("mask_logits", "None when mask is given", "both")
    if mask_logits is not None:
        _check_mask("mask_logits", mask_logits, alpha, query, key)
    else:
        _check_mask("mask", mask, alpha, query, key)
    if head_weights is not None:
        _check_head_weights(head_weights, query)
    if key_padding_mask is not None:
        _check_padding(key_padding_mask, query, key)
    if scale is not None:
        _check_number("scale", "a float or None", scale)
        _check_range("scale", scale, query)
    _check_number("dropout_p", "a float", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        _refuse("dropout_p", "a probability in [0, 1)", str(dropout_p))
    if backend is not None and backend not in NAMES:
        _refuse("backend", f"None or one of {NAMES}", repr(backend))


def _check_qkv(query: Tensor, key: Tensor, value: Tensor | None, enable_gqa: bool, is_map: bool) -> None:
    _check_rows("query", query, "(B, H, Nq, D)", query)
    _check_rows("key", key, "(B, Hkv, Nk, D)", query)
    if not is_map:
        _check_rows("value", value, "(B, Hkv, Nk, Dv)", query)
    batch, (H, _, D) = query.shape[:-3], query.shape[-3:]
    Hkv, Nk = key.shape[-3], key.shape[-2]
    if not fits(key.shape[:-3], batch) or key.shape[-1] != D:
        _refuse("key", f"shape (B, Hkv, Nk, D) with B = {_sizes(batch)} and D = {D}", _shape(key))
    if value is not None and not fits(value.shape[:-1], (*batch, Hkv, Nk)):
        _refuse("value", f"shape (B, Hkv, Nk, Dv) with (B, Hkv, Nk) = ({_sizes(batch)}, {Hkv}, {Nk})", _shape(value))
    if Hkv != H and not enable_gqa:
        _refuse("key", f"as many heads as query, {H} (fewer need enable_gqa=True)", f"{Hkv}{hints.of_swapped_heads(query, key)}")
    if H % Hkv != 0:
        _refuse("key", f"a number of heads that divides query's {H}", f"{Hkv}{hints.of_swapped_heads(query, key)}")


def _check_rows(name: str, given: Any, form: str, query: Tensor) -> None:
    tensor = _check_tensor(name, given, query)
    if tensor.dim() < 4:
        _refuse(name, f"a tensor {form}, or with more batch axes", f"shape {_shape(tensor)}")
    if tensor.dtype not in DTYPES:
        _refuse(name, "dtype float16, bfloat16, float32 or float64", str(tensor.dtype))
    if tensor.dtype != query.dtype:
        _refuse(name, f"query's dtype {query.dtype}", str(tensor.dtype))
    if tensor.shape[-3] < 1 or tensor.shape[-1] < 1:
        _refuse(name, "at least one head and a head size of at least 1", f"shape {_shape(tensor)}")


def _check_mask(name: str, mask: Tensor | None, alpha: float | Tensor | None, query: Tensor, key: Tensor) -> None:
    batch, (H, Nq, _), Nk = query.shape[:-3], query.shape[-3:], key.shape[-2]
    if mask is None:
        if alpha is not None:
            _refuse("alpha", "None when there is no mask", "an alpha")
        return
    _check_floating(name, mask, query)
    sizes = (*batch, Nq) if mask.dim() == len(batch) + 2 else (*batch, H, Nq)
    if mask.dim() != len(sizes) + 1 or mask.shape[-1] != Nk or not all(m == 1 or m == n for m, n in zip(mask.shape, sizes)):  # noqa: B905
        hint = hints.of_missing_axes(name, mask, query, Nk) or hints.of_picture(name, mask, Nk) or hints.of_swapped_mask(mask, query, key)
        wanted = "(B|1, Nq|1, Nk), shared by all heads, or (B|1, H|1, Nq|1, Nk)"
        _refuse(name, f"shape {wanted} with B = {_sizes(batch)}, H = {H}, Nq = {Nq}, Nk = {Nk}", f"{_shape(mask)}{hint}")
    if len(batch) > 1 and two_batch_axes(mask if len(sizes) > len(batch) + 1 else mask.unsqueeze(-3), batch) is None:
        one_change = "batch axes that are all of size 1 up to one place and not after it, or the reverse, and whose strides merge"
        _refuse(name, one_change, f"{_shape(mask)} with strides {mask.stride()}")
    _check_alpha(alpha, query)


def _check_alpha(alpha: float | Tensor | None, query: Tensor) -> None:
    H = query.shape[-3]
    if alpha is None:
        return
    if isinstance(alpha, Tensor):
        _check_floating("alpha", alpha, query)
        if alpha.dim() > 1 or (alpha.dim() == 1 and alpha.shape[0] != H):
            _refuse("alpha", f"shape () or (H,) = ({H},)", _shape(alpha))
    else:
        _check_number("alpha", "a float or a tensor", alpha, hints.of_numbers(alpha, H))
        _check_range("alpha", alpha, query)


def _check_head_weights(head_weights: Tensor, query: Tensor) -> None:
    H = query.shape[-3]
    _check_floating("head_weights", head_weights, query)
    if head_weights.dim() != 1 or head_weights.shape[0] != H:
        _refuse("head_weights", f"shape (H,) = ({H},)", _shape(head_weights))


def _check_padding(key_padding_mask: Tensor, query: Tensor, key: Tensor) -> None:
    batch, Nk = query.shape[:-3], key.shape[-2]
    _check_tensor("key_padding_mask", key_padding_mask, query)
    if key_padding_mask.dtype != torch.bool:
        _refuse("key_padding_mask", "dtype torch.bool, True = padding", str(key_padding_mask.dtype))
    if not fits(key_padding_mask.shape, (*batch, Nk)):
        hint = hints.of_swapped_padding(key_padding_mask.shape, key)
        _refuse("key_padding_mask", f"shape (B, Nk) = ({_sizes(batch)}, {Nk})", f"{_shape(key_padding_mask)}{hint}")


def _check_number(name: str, expected: str, number: Any, hint: str = "") -> None:
    """A number is Python's, numpy's, or a tensor () that can be read without waiting for a device and has no gradient to lose."""
    if isinstance(number, Tensor):
        if number.dim() != 0 or number.dtype == torch.bool or number.is_complex():
            _refuse(name, expected, f"a tensor of shape {_shape(number)} and dtype {number.dtype}")
        if number.requires_grad or number.device.type != "cpu":
            _refuse(name, f"{expected}: a tensor only on the CPU and without requires_grad", f"one on {number.device}")
    elif isinstance(number, bool) or not isinstance(number, (int, float, torch.SymFloat, torch.SymInt, Real)):
        _wrong_type(name, expected, number, hint)


def _check_range(name: str, number: float, query: Tensor) -> None:
    acc = acc_dtype(query.dtype)
    if not abs(number) <= torch.finfo(acc).max:  # NaN is refused too
        _refuse(name, f"a number that {acc} can hold", str(number))


def _check_tensor(name: str, tensor: Any, query: Tensor) -> Tensor:
    is_distributed = type(tensor).__name__ == "DTensor"  # asked by name, because its import takes longer than that of smattn
    if is_distributed or not isinstance(tensor, Tensor):
        hint = " that is no DTensor (smattn.distributed.sharded_attention takes those)" if is_distributed else ""
        _wrong_type(name, f"a torch.Tensor{hint}", tensor)
    if tensor.layout != torch.strided or tensor.is_nested:
        _refuse(name, "a dense tensor", "a nested one" if tensor.is_nested else str(tensor.layout))
    if tensor.device != query.device:
        _refuse(name, f"query's device {query.device}", str(tensor.device))
    return tensor


def _check_floating(name: str, tensor: Any, query: Tensor) -> None:
    _check_tensor(name, tensor, query)
    if tensor.dtype not in DTYPES:
        hint = hints.of_boolean_mask(name, tensor)
        _refuse(name, "dtype float16, bfloat16, float32 or float64", f"{tensor.dtype}{hint}")


def fits(shape: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether they are the same. torch.Size's own comparison would make symbolic sizes concrete."""
    return len(shape) == len(sizes) and all(a == b for a, b in zip(shape, sizes, strict=True))


def _sizes(batch: Sequence[int]) -> str:
    """The sizes of the batch axes: "2", or of several "(2, 3)"."""
    return str(batch[0]) if len(batch) == 1 else str(tuple(batch))


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _refuse(argument: str, expected: str, got: str) -> NoReturn:
    raise ValueError(f"{argument}: expected {expected}, got {got}")


def _wrong_type(argument: str, expected: str, got: Any, hint: str = "") -> NoReturn:
    raise TypeError(f"{argument}: expected {expected}, got {type(got).__name__}{hint}")
