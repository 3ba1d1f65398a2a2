"""What all contestants are given, and the one call of each that is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.measuring.peers import Attend
from bench.reporting.rows import BOTH, FORWARD
from smattn.testing import Case, Workload, workload_case

Step = Callable[[], tuple[Tensor, ...]]
SCORE_TENSORS = {FORWARD: 4, BOTH: 7}  # the float32 score tensors that a contestant may hold at once


@dataclass(frozen=True)
class Cell:
    """A workload, a kind of mask (in the inputs' dtype), a dtype, a device and a direction."""

    workload: Workload
    mask: str
    dtype: torch.dtype
    device: str
    direction: str
    also_cold: bool = False  # timed with warm caches, and then with cold ones too
    also_graph: bool = False  # and then in a CUDA graph

    def case(self) -> Case:
        return _case(self.workload, self.mask, self.dtype, self.device)

    def outline(self) -> Case:
        """The case without numbers: its tensors have sizes and strides, and no memory."""
        return _outline(self.workload, self.mask, self.dtype)

    def blank(self) -> Case:
        """The case with ones for numbers: nothing that is compiled depends on them, and drawing them takes seconds."""
        outline = self.outline()
        tensors = outline.inputs() | {"dout": outline.dout}
        ones = {name: torch.ones(tensor.shape, dtype=tensor.dtype, device=self.device) for name, tensor in tensors.items()}
        return replace(outline, **ones)

    def smaller(self) -> Cell:
        """The same call with few queries and keys."""
        w = self.workload
        return replace(self, workload=replace(w, B=1, rows=w.rows and 2, Nq=min(w.Nq, 16), Nk=min(w.Nk, 64)))

    @property
    def shape(self) -> tuple[int, ...]:
        """B, H, Nq, Nk, D."""
        *batch, H, Nq, D = self.outline().query.shape
        return (torch.Size(batch).numel(), H, Nq, self.outline().key.shape[-2], D)

    @property
    def flops(self) -> int:
        """Two matmuls forward; with backward 3.5 times that, whatever a contestant recomputes."""
        B, H, Nq, Nk, D = self.shape
        forward = 4 * B * H * Nq * Nk * D
        return forward if self.direction == FORWARD else forward * 7 // 2

    @property
    def io_bytes(self) -> int:
        """Bytes of the inputs and the output; with backward the incoming gradient and the five outgoing ones double them."""
        outline = self.outline()
        given = sum(tensor.nbytes for tensor in [*outline.inputs().values(), outline.dout])  # The output is as large as its gradient.
        return given if self.direction == FORWARD else 2 * given

    @property
    def score_bytes(self) -> int:
        """Bytes of all score tensors that a contestant may hold at once."""
        B, H, Nq, Nk, _ = self.shape
        return SCORE_TENSORS[self.direction] * 4 * B * H * Nq * Nk


@lru_cache(2)  # Both masks of a shape are kept, for the largest take seconds to make.
def _case(workload: Workload, mask: str, dtype: torch.dtype, device: str) -> Case:
    return workload_case(workload, mask=mask, dtype=dtype, device=device)


@lru_cache
def _outline(workload: Workload, mask: str, dtype: torch.dtype) -> Case:
    with FakeTensorMode():
        return workload_case(workload, mask=mask, dtype=dtype)


def bind(attend: Attend, case: Case, direction: str, gradients: int = 5) -> Step:
    """The call to measure. It returns the output, and with BOTH the gradients of the first so many of query, key, value, mask and alpha.

    A mask that all heads share is given with a head axis of size 1, and an alpha that is a float as a tensor without a gradient.
    """
    assert case.mask is not None and case.alpha is not None
    mask = case.mask[:, None] if case.mask.dim() == 3 else case.mask
    alpha = case.alpha
    if not isinstance(alpha, Tensor):
        alpha, gradients = torch.full(case.query.shape[-3:-2], alpha, device=case.query.device), min(gradients, 4)
    inputs = (case.query, case.key, case.value, mask, alpha)
    if direction == FORWARD:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (attend(*inputs),)

        return forward
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]

    def forward_and_backward() -> tuple[Tensor, ...]:
        out = attend(*leaves)
        return (out, *torch.autograd.grad(out, leaves[:gradients], case.dout))

    return forward_and_backward
