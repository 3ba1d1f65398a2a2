"""alpha as a module holds it: one number a head, a start to return to, and float32 whatever the module is cast to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

NAME = "scaling_factors"  # as HODOR's state dict has it
HODOR_ALPHA = (32.0, 32.0, 16.0, 16.0, 8.0, 8.0, 4.0, 4.0)


class HoldsAlpha(nn.Module):
    """A module with alpha as `scaling_factors`, (H,) float32: a parameter, or a buffer where it is not learned."""

    scaling_factors: Tensor

    def _hold_alpha(
        self,
        alpha_init: float | Sequence[float] | None,
        num_heads: int,
        learnable: bool,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make alpha, on torch's default device unless one is given, in float64 if dtype is that, else in float32.

        Raises TypeError or ValueError where alpha_init is no number or does not fit num_heads.
        """
        self.alpha_start = initial_alpha(alpha_init, num_heads)
        alpha = torch.tensor(self.alpha_start, dtype=dtype if dtype == torch.float64 else torch.float32, device=device)
        if learnable:
            self.scaling_factors = nn.Parameter(alpha)
        else:
            self.register_buffer(NAME, alpha)

    @torch.no_grad()
    def _reset_alpha(self) -> None:
        """Give alpha its first value again, for example after the module came from the meta device."""
        alpha = self.scaling_factors
        start = torch.tensor(self.alpha_start, dtype=alpha.dtype, device=alpha.device)
        if parametrize.is_parametrized(self, NAME):
            self.scaling_factors = start  # torch sets what alpha is computed from
        else:
            alpha.copy_(_placed_as(alpha, start))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As nn.Module's, behind .to(), .bfloat16() and .half(), which leave alpha in float32: in 16 bits updates round to nothing."""
        alphas = [tensor for name, tensor in (*self.named_parameters(), *self.named_buffers()) if is_alpha(name)]
        kept = {id(tensor) for alpha in alphas for tensor in (alpha, alpha.grad) if tensor is not None}

        def with_alpha_kept(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return tensor.to(result.device) if id(tensor) in kept and result.dtype.itemsize < 4 else result

        return super()._apply(with_alpha_kept, recurse)


def is_alpha(name: str) -> bool:
    """Whether a parameter or buffer of this name is alpha, or what a parametrized alpha is computed from."""
    return NAME in name.split(".")


def parameter_groups(model: nn.Module, *, alpha_lr: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer: everything else, by its defaults, and every learnable alpha at alpha_lr without weight decay.

    Alpha is of the size of a logit and decay would pull it to 0, which switches the mask off; the rate that suits weights hardly moves it.

        optimizer = torch.optim.AdamW(smattn.nn.parameter_groups(model, alpha_lr=1e-2), lr=1e-4, weight_decay=0.05)
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    others = [p for name, p in named if not is_alpha(name)]
    learnable = [p for name, p in named if is_alpha(name)]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": learnable, "lr": alpha_lr, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def initial_alpha(alpha_init: float | Sequence[float] | None, num_heads: int) -> tuple[float, ...]:
    """alpha_init as one number a head; None spreads HODOR's pattern over the heads."""
    if alpha_init is None:
        # head h lies (h + 1/2) / H of the way through the pattern
        return tuple(HODOR_ALPHA[(2 * h + 1) * len(HODOR_ALPHA) // (2 * num_heads)] for h in range(num_heads))
    expected = f"alpha_init: expected a number or {num_heads} of them, one a head, got"
    try:
        # The device is named, because within `torch.device("meta")` there would be no numbers to read.
        alpha = torch.as_tensor(alpha_init, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{expected} {alpha_init!r}") from None
    if isinstance(alpha_init, bool):
        raise TypeError(f"{expected} {alpha_init!r}")
    if alpha.dim() > 1 or (alpha.dim() == 1 and len(alpha) != num_heads):
        raise ValueError(f"{expected} shape {tuple(alpha.shape)}")
    return tuple(alpha.expand(num_heads).tolist())


def _placed_as(alpha: Tensor, start: Tensor) -> Tensor:
    """`start`, sharded as alpha is: FSDP2 keeps parameters as DTensors, into which no plain tensor can be copied."""
    if not torch.distributed.is_available():
        return start
    from torch.distributed.tensor import DTensor, distribute_tensor  # takes long to import, and few call this

    if not isinstance(alpha, DTensor):
        return start
    return distribute_tensor(start, alpha.device_mesh, alpha.placements, src_data_rank=None)
