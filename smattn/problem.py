"""One call, described and checked: every refusal of the public functions is here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BACKENDS = ("triton", "cuda", "cpu", "reference")
Grads = tuple["Tensor | None", "Tensor | None", "Tensor | None", "Tensor | None", "Tensor | None"]


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, softmax, alpha, lse and every accumulation: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Problem(NamedTuple):
    """Sizes, dtypes and flags of one call: all that a backend needs to say whether it can run it, and how."""

    B: int
    H: int
    Hkv: int
    Nq: int
    Nk: int
    D: int
    Dv: int  # attention_map has no value: Dv = D
    dtype: torch.dtype
    mask_dtype: torch.dtype | None
    mask_shape: tuple[int, int, int, int] | None  # (B|1, H|1, Nq|1, Nk)
    device_type: str
    has_padding: bool = False
    scale: float = 1.0
    dropout_p: float = 0.0
    allow_tf32: bool = False
    mask_is_logits: bool = False

    @property
    def acc_dtype(self) -> torch.dtype:
        return acc_dtype(self.dtype)

    def bytes_of_inputs(self) -> int:
        """Query, key, value, mask, the output and its gradient: what backward's buffers are measured against."""
        rows = self.H * self.Nq * (self.D + 2 * self.Dv) + self.Hkv * self.Nk * (self.D + self.Dv)
        mask = 0 if self.mask_shape is None or self.mask_dtype is None else math.prod(self.mask_shape) * self.mask_dtype.itemsize
        return self.B * rows * self.dtype.itemsize + mask

    def bytes_kept(self) -> int:
        """What forward leaves to backward, where it keeps the unrounded output, and 8 bytes a query and head more: backward's own rows."""
        return 4 * self.B * self.H * self.Nq * (4 + (self.Dv if self.acc_dtype != self.dtype else 0))


def new_gradients(problem: Problem, inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> Grads:
    """Room for the gradients of five inputs, contiguous, None where not needed; uninitialised, but zeros where there are no scores."""
    new = torch.zeros_like if 0 in (problem.B, problem.Nq, problem.Nk) else torch.empty_like
    a, b, c, d, e = (
        new(x, memory_format=torch.contiguous_format) if needed and x is not None else None for x, needed in zip(inputs, needs, strict=True)
    )
    return a, b, c, d, e


def queries_kept_unrounded(problem: Problem) -> int:
    """How many queries' outputs forward also leaves unrounded where `out` is rounded: all, or none where those would be too large.

    All where a quarter of the inputs and 4 MiB hold them; else backward sums delta as P*dP, (5). Written without a comparison, which for
    symbolic sizes would be a guard, and that would forbid torch.export its dynamic lengths; torch.compile makes one graph for each case.
    """
    t = problem
    return t.Nq * torch.sym_min(1, (t.bytes_of_inputs() // 4 + (4 << 20)) // torch.sym_max(1, t.bytes_kept()))


def describe(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    mask: Tensor | None,
    mask_logits: Tensor | None,
    key_padding_mask: Tensor | None,
    scale: float,
    dropout_p: float,
    allow_tf32: bool,
) -> Problem:
    """The Problem of canonical tensors: mask 4-D, everything validated."""
    B, H, Nq, D = query.shape
    _, Hkv, Nk, _ = key.shape
    soft = mask if mask is not None else mask_logits
    return Problem(
        B, H, Hkv, Nq, Nk, D,
        Dv=D if value is None else value.shape[3],
        dtype=query.dtype,
        mask_dtype=None if soft is None else soft.dtype,
        mask_shape=None if soft is None else tuple(soft.shape),  # type: ignore[arg-type]  # it has four axes
        device_type=query.device.type,
        has_padding=key_padding_mask is not None,
        scale=scale,
        dropout_p=dropout_p,
        allow_tf32=allow_tf32,
        mask_is_logits=mask_logits is not None,
    )  # fmt: skip


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
    B, H, Nq, _ = query.shape
    Nk = key.shape[2]
    if mask is not None and mask_logits is not None:
        _refuse("mask_logits", "None when mask is given", "both")
    if mask_logits is not None:
        _check_mask("mask_logits", mask_logits, alpha, query, Nk)
    else:
        _check_mask("mask", mask, alpha, query, Nk)
    if head_weights is not None:
        _check_floating("head_weights", head_weights, query)
        if head_weights.dim() != 1 or head_weights.shape[0] != H:
            _refuse("head_weights", f"shape (H,) = ({H},)", _shape(head_weights))
    if key_padding_mask is not None:
        _check_tensor("key_padding_mask", key_padding_mask, query)
        if key_padding_mask.dtype != torch.bool:
            _refuse("key_padding_mask", "dtype torch.bool, True = padding", str(key_padding_mask.dtype))
        if key_padding_mask.dim() != 2 or key_padding_mask.shape[0] != B or key_padding_mask.shape[1] != Nk:
            _refuse("key_padding_mask", f"shape (B, Nk) = ({B}, {Nk})", _shape(key_padding_mask))
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat, torch.SymInt))):
        _wrong_type("scale", "a float or None", scale)
    _check_range("scale", scale, query)
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float, torch.SymFloat, torch.SymInt)):
        _wrong_type("dropout_p", "a float", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        _refuse("dropout_p", "a probability in [0, 1)", str(dropout_p))
    if backend is not None and backend not in BACKENDS:
        _refuse("backend", f"None or one of {BACKENDS}", repr(backend))


def _check_qkv(query: Tensor, key: Tensor, value: Tensor | None, enable_gqa: bool, is_map: bool) -> None:
    tensors: dict[str, tuple[Tensor | None, str]] = {"query": (query, "(B, H, Nq, D)"), "key": (key, "(B, Hkv, Nk, D)")}
    if not is_map:
        tensors["value"] = (value, "(B, Hkv, Nk, Dv)")
    for name, (given, form) in tensors.items():
        tensor = _check_tensor(name, given, query)
        if tensor.dim() != 4:
            _refuse(name, f"a 4-D tensor {form}", f"shape {_shape(tensor)}")
        if tensor.dtype not in DTYPES:
            _refuse(name, "dtype float16, bfloat16, float32 or float64", str(tensor.dtype))
        if tensor.dtype != query.dtype:
            _refuse(name, f"query's dtype {query.dtype}", str(tensor.dtype))
        if tensor.shape[1] < 1 or tensor.shape[3] < 1:
            _refuse(name, "at least one head and a head size of at least 1", f"shape {_shape(tensor)}")
    B, H, _, D = query.shape
    Hkv = key.shape[1]
    if key.shape[0] != B or key.shape[3] != D:
        _refuse("key", f"shape (B, Hkv, Nk, D) with B = {B} and D = {D}", _shape(key))
    if value is not None and (value.shape[0] != B or value.shape[1] != Hkv or value.shape[2] != key.shape[2]):
        _refuse("value", f"shape (B, Hkv, Nk, Dv) with (B, Hkv, Nk) = ({B}, {Hkv}, {key.shape[2]})", _shape(value))
    if Hkv != H and not enable_gqa:
        _refuse("key", f"as many heads as query, {H} (fewer need enable_gqa=True)", str(Hkv))
    if H % Hkv != 0:
        _refuse("key", f"a number of heads that divides query's {H}", str(Hkv))


def _check_mask(name: str, mask: Tensor | None, alpha: float | Tensor | None, query: Tensor, Nk: int) -> None:
    B, H, Nq, _ = query.shape
    if mask is None:
        if alpha is not None:
            _refuse("alpha", "None when there is no mask", "an alpha")
        return
    _check_floating(name, mask, query)
    if mask.dim() == 3:
        fits = mask.shape[0] in (1, B) and mask.shape[1] in (1, Nq) and mask.shape[2] == Nk
    elif mask.dim() == 4:
        fits = mask.shape[0] in (1, B) and mask.shape[1] in (1, H) and mask.shape[2] in (1, Nq) and mask.shape[3] == Nk
    else:
        fits = False
    if not fits:
        sizes = f"B = {B}, H = {H}, Nq = {Nq}, Nk = {Nk}"
        _refuse(name, f"shape (B|1, Nq|1, Nk), shared by all heads, or (B|1, H|1, Nq|1, Nk) with {sizes}", _shape(mask))
    if alpha is None:
        _refuse("alpha", "a float or a tensor of shape () or (H,), since a mask is given", "None")
    if isinstance(alpha, Tensor):
        _check_floating("alpha", alpha, query)
        if alpha.dim() > 1 or (alpha.dim() == 1 and alpha.shape[0] != H):
            _refuse("alpha", f"shape () or (H,) = ({H},)", _shape(alpha))
    elif isinstance(alpha, bool) or not isinstance(alpha, (int, float, torch.SymFloat, torch.SymInt)):
        _wrong_type("alpha", "a float or a tensor", alpha)
    else:
        _check_range("alpha", alpha, query)


def _check_range(name: str, number: float | None, query: Tensor) -> None:
    acc = acc_dtype(query.dtype)
    if number is not None and abs(number) > torch.finfo(acc).max:
        _refuse(name, f"a number that {acc} can hold", str(number))


def _check_tensor(name: str, tensor: Any, query: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor):
        _wrong_type(name, "a torch.Tensor", tensor)
    if tensor.layout != torch.strided or tensor.is_nested:
        _refuse(name, "a dense tensor", "a nested one" if tensor.is_nested else str(tensor.layout))
    if tensor.device != query.device:
        _refuse(name, f"query's device {query.device}", str(tensor.device))
    return tensor


def _check_floating(name: str, tensor: Any, query: Tensor) -> None:
    _check_tensor(name, tensor, query)
    if tensor.dtype not in DTYPES:
        _refuse(name, "dtype float16, bfloat16, float32 or float64", str(tensor.dtype))


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _refuse(argument: str, expected: str, got: str) -> NoReturn:
    raise ValueError(f"{argument}: expected {expected}, got {got}")


def _wrong_type(argument: str, expected: str, got: Any) -> NoReturn:
    raise TypeError(f"{argument}: expected {expected}, got {type(got).__name__}")
