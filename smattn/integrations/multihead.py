"""A drop-in for torch.nn.MultiheadAttention: its parameters, its call, and a soft mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..alpha import NAME as ALPHA
from ..alpha import HoldsAlpha
from ..attention import attention_map, soft_masked_attention
from ..validate import fits


class SoftMaskedMultiheadAttention(HoldsAlpha, nn.MultiheadAttention):
    """nn.MultiheadAttention whose forward also takes a soft mask. `from_module` makes one that shares the parameters of its module.

    Its arguments are those of nn.MultiheadAttention, without add_bias_kv and add_zero_attn, and alpha_init and learnable_alpha, as in
    smattn.nn.SoftMaskedAttention. Its state dict is that of nn.MultiheadAttention, and scaling_factors (H,), which is alpha. One without
    scaling_factors loads as well.
    """

    def __init__(
        self, *arguments: Any, alpha_init: float | Sequence[float] | None = None, learnable_alpha: bool = True, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        _check_covered(self)
        self._hold_alpha(alpha_init, self.num_heads, learnable_alpha, self.out_proj.weight.device)

    @classmethod
    def from_module(
        cls, module: nn.MultiheadAttention, alpha_init: float | Sequence[float] | None = None, learnable_alpha: bool = True
    ) -> SoftMaskedMultiheadAttention:
        """The drop-in for `module`, with the same parameters.

        Args:
            module: any nn.MultiheadAttention without add_bias_kv and add_zero_attn.
            alpha_init, learnable_alpha: as in smattn.nn.SoftMaskedAttention.

        Raises:
            ValueError: module has add_bias_kv, add_zero_attn or parameters that are computed (parametrized, say), or alpha_init is not one
                number or one a head.
        """
        _check_covered(module)
        bias = module.in_proj_bias is not None
        options = dict(kdim=module.kdim, vdim=module.vdim, batch_first=module.batch_first, device="meta")
        made = cls(module.embed_dim, module.num_heads, module.dropout, bias, learnable_alpha=learnable_alpha, **options)
        made._parameters.update(module._parameters)
        if set(made._parameters) - set(module._parameters) - {ALPHA}:
            raise ValueError("module: expected parameters of its own, got computed ones, parametrized say")
        made.out_proj = module.out_proj
        made._hold_alpha(alpha_init, module.num_heads, learnable_alpha, module.out_proj.weight.device)
        return made.train(module.training)

    def reset_parameters(self) -> None:
        """Start again, as a module must that comes from the meta device."""
        self.out_proj.reset_parameters()
        self._reset_parameters()
        self._reset_alpha()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, under a soft mask if one is given.

        Args:
            query, key, value, need_weights: as in nn.MultiheadAttention, batched. Weights are those before dropout; a pass computes them.
                Nested tensors, which nn.TransformerEncoder makes, are taken where nn.MultiheadAttention takes them: in its fast path.
            key_padding_mask: bool (B, Nk), True = padding, or what nn.TransformerEncoderLayer makes of that: floating, -inf at padding and
                0 elsewhere, or else a RuntimeError. A query with no key left gives zeros, not NaN.
            attn_mask: as in nn.MultiheadAttention, (Nq, Nk) or (B * H, Nq, Nk), bool or added to the scores; not together with mask.
            average_attn_weights: True. The weights of single heads are not computed.
            is_causal: a hint beside attn_mask, as in nn.MultiheadAttention. It has no effect.
            mask: soft mask, (B|1, Nq|1, Nk) or (B|1, H|1, Nq|1, Nk), read with alpha, one number a head.

        Returns:
            The output in query's form, and the weights (B, Nq, Nk) averaged over heads, or None without need_weights.

        Raises:
            TypeError, ValueError: an argument is not as above, or as in smattn.soft_masked_attention.
        """
        if any(x.is_nested for x in (query, key, value)):
            if mask is not None:
                raise ValueError("query: expected a dense tensor beside a soft mask, got a nested one")
            return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if query.dim() != 3:
            raise ValueError(f"query: expected a batched, 3-D tensor, got shape {tuple(query.shape)}")
        if need_weights and not average_attn_weights:
            raise ValueError("average_attn_weights: expected True when need_weights is, got False")
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask: expected one beside is_causal=True, which is but a hint, got None")
        if mask is not None and attn_mask is not None:
            raise ValueError("attn_mask: expected None when mask is given, got both")
        self._check_form(query, key, value, mask=mask, attn_mask=attn_mask, key_padding_mask=key_padding_mask)
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        if key_padding_mask is not None and key_padding_mask.is_floating_point():
            padding = key_padding_mask == float("-inf")
            torch._assert_async(((key_padding_mask == 0) | padding).all(), "key_padding_mask: expected 0 and -inf where it is floating")
            key_padding_mask = padding
        q, k, v = self._projected(query, key, value)
        alpha: float | Tensor | None = None if mask is None else self.scaling_factors
        if attn_mask is not None:
            mask, alpha = _added_to_scores(attn_mask, q, k), 1.0
        options: dict[str, Any] = dict(key_padding_mask=key_padding_mask)
        out = soft_masked_attention(q, k, v, mask, alpha, dropout_p=self.dropout if self.training else 0.0, **options)
        out = self.out_proj(out.transpose(1, 2).flatten(-2))
        weights = attention_map(q, k, mask, alpha, **options).to(out.dtype) if need_weights else None
        return out if self.batch_first else out.transpose(0, 1), weights

    def _check_form(self, query: Tensor, key: Tensor, value: Tensor, **masks: Any) -> None:
        """Refuse tensors of another width, and those whose batch is on another axis than batch_first says."""
        batch, form = (0, "(B, N, E)") if self.batch_first else (1, "(N, B, E)")
        said, size = f"(the module has batch_first={self.batch_first})", query.shape[batch]
        for name, x, width in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if x.dim() != 3 or x.shape[-1] != width or x.shape[batch] != size:
                raise ValueError(f"{name}: expected shape {form} with B = {size} and E = {width}, got {tuple(x.shape)} {said}")
        for name, given in masks.items():
            if isinstance(given, Tensor) and given.dim() > 1 and given.shape[-1] == size != key.shape[1 - batch]:
                raise ValueError(f"{name}: expected Nk = {key.shape[1 - batch]} along its last axis, got {tuple(given.shape)} {said}")

    def _projected(self, *inputs: Tensor) -> list[Tensor]:
        """query, key and value, given batch first, projected to (B, H, N, D) each."""
        joint = self.in_proj_weight
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if joint is None else joint.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        parts = zip(inputs, weights, biases, strict=True)
        return [F.linear(x, weight, bias).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x, weight, bias in parts]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        if f"{prefix}scaling_factors" in missing:  # the state dict is an nn.MultiheadAttention's: alpha stays as it is
            missing.remove(f"{prefix}scaling_factors")


def _check_covered(module: nn.MultiheadAttention) -> None:
    if module.bias_k is not None or module.add_zero_attn:
        raise ValueError("module: expected an nn.MultiheadAttention without add_bias_kv and add_zero_attn, got one with")


def _added_to_scores(attn_mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """attn_mask as a mask whose alpha is 1, for q (B, H, Nq, D) and k (B, H, Nk, D)."""
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask: expected a torch.Tensor, got {type(attn_mask).__name__}")
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise ValueError(f"attn_mask: expected dtype torch.bool or a floating one, got {attn_mask.dtype}")
    (B, H, Nq, _), Nk = q.shape, k.shape[2]
    if not fits(attn_mask.shape, (Nq, Nk)) and not fits(attn_mask.shape, (B * H, Nq, Nk)):
        wanted = f"(Nq, Nk) = ({Nq}, {Nk}) or (B * H, Nq, Nk) = ({B * H}, {Nq}, {Nk})"
        raise ValueError(f"attn_mask: expected shape {wanted}, got {tuple(attn_mask.shape)}")
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(attn_mask, float("-inf"))
    return attn_mask[None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (B, H))
