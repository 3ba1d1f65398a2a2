"""Modules: soft-masked attention with its projections, its hard-masked twin, and the transformer layer that takes either.

The architecture is that of arXiv 2206.00182 on arXiv 2112.09131 (HODOR); the state dicts of their attention modules load as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .alpha import HoldsAlpha, parameter_groups
from .attention import soft_masked_attention
from .hints import of_module_mask
from .validate import fits

Masking = Literal["soft", "detached", "hard", "none"]

__all__ = ["HardMaskedAttention", "Masking", "SoftMaskedAttention", "SoftMaskedTransformerLayer", "parameter_groups"]


class _ProjectedAttention(nn.Module):
    """The projections around attention, batch first; by itself attention without a mask."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        number: Any
        for name, number in (("embed_dim", embed_dim), ("num_heads", num_heads)):
            if not isinstance(number, Integral):
                raise TypeError(f"{name}: expected an int, got {number!r}")
            if number < 1:
                raise ValueError(f"{name}: expected a positive int, got {number}")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim: expected a multiple of num_heads, got {embed_dim} and {num_heads} heads")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, dropout
        self.head_dim = embed_dim // num_heads
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)
        self.k_proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)
        self.v_proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)
        self.out_proj = nn.Linear(embed_dim, embed_dim, True, device, dtype)
        _ProjectedAttention.reset_parameters(self)  # of this class: a subclass's needs what is not there yet

    def reset_parameters(self) -> None:
        """Start again, as a module must that comes from the meta device: weights by Xavier's rule, biases 0, and alpha's first value."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        return self._attend(query, key, value, None, None, key_padding_mask)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, alpha: float | Tensor | None, key_padding_mask: Tensor | None
    ) -> Tensor:
        for name, x in (("query", query), ("key", key), ("value", value)):
            _check_rows(name, x, self.embed_dim)
        q, k, v = (
            # (B, H, N, D), never copied. A tensor-parallel projection has some of the heads, each of the same size.
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        dropout_p = self.dropout if self.training else 0.0
        out = soft_masked_attention(q, k, v, mask, alpha, dropout_p=dropout_p, key_padding_mask=key_padding_mask)
        return self.out_proj(out.transpose(1, 2).flatten(-2))

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}"


class SoftMaskedAttention(HoldsAlpha, _ProjectedAttention):
    """Multi-head attention steered by a soft mask: softmax(Q K^T / sqrt(D) + alpha_h * M) V between the usual four projections.

    Args:
        embed_dim: width of query, key, value and output; D = embed_dim / num_heads.
        num_heads: H.
        dropout: probability of dropping an attention weight, in training only.
        bias: whether the query, key and value projections have one; the output projection always has.
        alpha_init: a number for all heads or H of them, in logits; None spreads HODOR's [32, 32, 16, 16, 8, 8, 4, 4] over the heads,
            from nearly a hard mask to one that sees its context and carries a gradient that is not saturated.
        learnable_alpha: alpha is a parameter, else a buffer. Give it its own learning rate by parameter_groups.
        device, dtype: as in torch's modules. alpha stays in float32 where dtype has 16 bits.

    Its state dict has HODOR's names: q_proj, k_proj, v_proj, out_proj and scaling_factors (H,), which is alpha. A cast of the module to
    16 bits leaves alpha in float32. Where tensor parallelism splits the projections over heads, alpha must be given the same heads.

    On a GPU a small call waits for Python. A CUDA graph does without it: nothing here waits for the device, so that forward and backward
    can be captured (torch.cuda.graph, after one call on a side stream, which compiles) and replayed on what is put into the same tensors.
    Dropout draws anew at every replay.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        alpha_init: float | Sequence[float] | None = None,
        learnable_alpha: bool = True,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, bias, device=device, dtype=dtype)
        self._hold_alpha(alpha_init, num_heads, learnable_alpha, device, dtype)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._reset_alpha()

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Attend under a mask.

        Args:
            query: (B, Nq, embed_dim).
            key, value: (B, Nk, embed_dim).
            mask: soft mask, usually in [0, 1]: (B|1, Nq|1, Nk) for all heads, or (B|1, H|1, Nq|1, Nk). Zeros are attention without a mask.
            key_padding_mask: bool (B, Nk), True = padding, not attended.

        Returns:
            (B, Nq, embed_dim).

        Raises:
            TypeError, ValueError: as smattn.soft_masked_attention.
        """
        _check_mask(mask, key)
        return self._attend(query, key, value, mask, self.scaling_factors, key_padding_mask)


class HardMaskedAttention(_ProjectedAttention):
    """The twin to compare with: only keys whose mask is above 0.5 are attended, and no gradient reaches the mask.

    A query whose mask covers no key that is not padding would have nothing to attend to: it is un-masked, and attends to all of them.
    Arguments, calls and CUDA graphs as SoftMaskedAttention, without alpha.
    """

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """As SoftMaskedAttention.forward."""
        _check_mask(mask, key)
        attended = mask > 0.5
        present = attended
        if key_padding_mask is not None:
            _check_padding(key_padding_mask, key)
            padding = key_padding_mask[:, None, :] if mask.dim() == 3 else key_padding_mask[:, None, None, :]
            present = attended & ~padding
        keys = attended | ~present.any(-1, keepdim=True)
        ruled_out = torch.zeros((), dtype=mask.dtype, device=mask.device).masked_fill(~keys, float("-inf"))
        return self._attend(query, key, value, ruled_out, 1.0, key_padding_mask)


class SoftMaskedTransformerLayer(nn.Module):
    """Self-attention among queries, masked cross-attention to features, feed-forward; each with a residual and a layer norm.

    It can be captured in a CUDA graph as SoftMaskedAttention can.

    Args:
        embed_dim, num_heads, dropout, bias, alpha_init, learnable_alpha, device, dtype: as SoftMaskedAttention. Dropout also follows each
            of the three.
        dim_feedforward: hidden width of the feed-forward network; 4 * embed_dim unless given.
        masking: "soft"; "detached", the same without the mask's gradient; "hard", HardMaskedAttention; "none", the mask is not used.
        norm_first: layer norms before each step instead of after its residual, as the papers have them.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dim_feedforward: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        alpha_init: float | Sequence[float] | None = None,
        learnable_alpha: bool = True,
        masking: Masking = "soft",
        norm_first: bool = False,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if masking not in get_args(Masking):
            raise ValueError(f"masking: expected one of {', '.join(get_args(Masking))}, got {masking!r}")
        self.masking, self.norm_first = masking, norm_first
        made: dict[str, Any] = dict(device=device, dtype=dtype)
        self.self_attention = _ProjectedAttention(embed_dim, num_heads, dropout, bias, **made)
        self.cross_attention: nn.Module
        if masking in ("soft", "detached"):
            self.cross_attention = SoftMaskedAttention(embed_dim, num_heads, dropout, bias, alpha_init, learnable_alpha, **made)
        else:
            kind = HardMaskedAttention if masking == "hard" else _ProjectedAttention
            self.cross_attention = kind(embed_dim, num_heads, dropout, bias, **made)
        hidden = dim_feedforward or 4 * embed_dim
        widen, narrow = nn.Linear(embed_dim, hidden, **made), nn.Linear(hidden, embed_dim, **made)
        self.feed_forward = nn.Sequential(widen, nn.ReLU(), nn.Dropout(dropout), narrow)
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dim, **made) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def reset_parameters(self) -> None:
        """Start everything inside again, as a module must that comes from the meta device."""
        for module in (self.self_attention, self.cross_attention, self.feed_forward[0], self.feed_forward[-1], *self.norms):
            module.reset_parameters()

    def forward(
        self,
        query: Tensor,
        features: Tensor,
        mask: Tensor,
        key_padding_mask: Tensor | None = None,
        query_pos: Tensor | None = None,
        features_pos: Tensor | None = None,
        query_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """One layer.

        Args:
            query: (B, Nq, embed_dim).
            features: (B, Nk, embed_dim), keys and values of the cross-attention.
            mask, key_padding_mask: as SoftMaskedAttention.forward; both of the cross-attention.
            query_pos: added to the queries, and to the keys of the self-attention: broadcast to query.
            features_pos: added to the keys of the cross-attention: broadcast to features.
            query_padding_mask: bool (B, Nq), True = no query, not attended by the others; what comes out in its place means nothing.

        Returns:
            (B, Nq, embed_dim).
        """
        for name, x in (("query", query), ("features", features)):
            _check_rows(name, x, self.self_attention.embed_dim)
        if self.masking != "none":
            _check_mask(mask, features)
        if self.masking == "detached":
            mask = mask.detach()
        masks = () if self.masking == "none" else (mask,)
        keys = _plus(features, "features_pos", features_pos)

        def among(x: Tensor) -> Tensor:
            placed = _plus(x, "query_pos", query_pos)
            return self.self_attention(placed, placed, x, query_padding_mask)

        def across(x: Tensor) -> Tensor:
            return self.cross_attention(_plus(x, "query_pos", query_pos), keys, features, *masks, key_padding_mask=key_padding_mask)

        steps: tuple[Callable[[Tensor], Tensor], ...] = (among, across, self.feed_forward)
        for step, norm in zip(steps, self.norms, strict=True):
            query = query + self.dropout(step(norm(query))) if self.norm_first else norm(query + self.dropout(step(query)))
        return query


def _check_rows(name: str, x: Tensor, embed_dim: int) -> None:
    """Refuse what is not (B, N, embed_dim)."""
    if x.dim() != 3 or x.shape[-1] != embed_dim:
        raise ValueError(f"{name}: expected shape (B, N, embed_dim) with embed_dim = {embed_dim}, got {tuple(x.shape)}")


def _check_mask(mask: Any, features: Tensor) -> None:
    """Refuse what is no mask over features (B, Nk, width). The function that is called later refuses the rest."""
    keys = features.shape[-2]
    if not isinstance(mask, Tensor) or mask.dim() not in (3, 4) or mask.shape[-1] != keys:
        got = f"{tuple(mask.shape)}{of_module_mask(mask, keys)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask: expected a tensor (B|1, Nq|1, Nk) or (B|1, H|1, Nq|1, Nk) with Nk = {keys}, got {got}")
    if not mask.is_floating_point():
        hint = " (as a soft mask: mask.float())" if mask.dtype == torch.bool else ""
        raise ValueError(f"mask: expected a floating dtype, got {mask.dtype}{hint}")


def _check_padding(key_padding_mask: Any, features: Tensor) -> None:
    """Refuse what is no padding of features (B, Nk, width)."""
    rows, got = tuple(features.shape[:2]), type(key_padding_mask).__name__
    if isinstance(key_padding_mask, Tensor):
        if key_padding_mask.dtype == torch.bool and fits(key_padding_mask.shape, rows):
            return
        got = f"{key_padding_mask.dtype} {tuple(key_padding_mask.shape)}"
    raise ValueError(f"key_padding_mask: expected a torch.bool tensor (B, Nk) = {rows}, got {got}")


def _plus(x: Tensor, name: str, position: Tensor | None) -> Tensor:
    """x with a position added, where one is given. Refuse one that does not broadcast to x."""
    if position is None:
        return x
    sizes = x.shape[max(0, x.dim() - position.dim()) :]
    if position.dim() > x.dim() or not all(p == 1 or p == n for p, n in zip(position.shape, sizes, strict=True)):
        raise ValueError(f"{name}: expected a shape that broadcasts to {tuple(x.shape)}, got {tuple(position.shape)}")
    return x + position
