"""torch's transformer decoder with soft masks: every layer's cross-attention takes the mask that is handed to the decoder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .multihead import SoftMaskedMultiheadAttention


class SoftMaskedTransformerDecoderLayer(nn.TransformerDecoderLayer):
    """nn.TransformerDecoderLayer whose cross-attention also takes a soft mask. `from_module` makes one that shares the layer's parameters.

    Its state dict is the layer's, and multihead_attn.scaling_factors (H,), which is alpha. The layer's own loads as well.
    """

    @classmethod
    def from_module(
        cls, layer: nn.TransformerDecoderLayer, alpha_init: float | Sequence[float] | None = None, learnable_alpha: bool = True
    ) -> SoftMaskedTransformerDecoderLayer:
        """The layer with soft masks, which leaves `layer` itself as it is.

        Args:
            layer: any nn.TransformerDecoderLayer.
            alpha_init, learnable_alpha: as in smattn.nn.SoftMaskedAttention.

        Raises:
            ValueError: as SoftMaskedMultiheadAttention.from_module.
        """
        made = _as(cls, layer)
        made.multihead_attn = SoftMaskedMultiheadAttention.from_module(layer.multihead_attn, alpha_init, learnable_alpha)
        return made

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        """As nn.TransformerDecoderLayer.forward. mask: as in SoftMaskedMultiheadAttention.forward, and not together with memory_mask."""

        def among(x: Tensor) -> Tensor:
            return self._sa_block(x, tgt_mask, tgt_key_padding_mask, tgt_is_causal)

        def across(x: Tensor) -> Tensor:
            options: dict[str, Any] = dict(attn_mask=memory_mask, key_padding_mask=memory_key_padding_mask, is_causal=memory_is_causal)
            out: Tensor = self.multihead_attn(x, memory, memory, need_weights=False, mask=mask, **options)[0]
            return self.dropout2(out)

        steps: tuple[tuple[Callable[[Tensor], Tensor], nn.Module], ...]
        steps = (among, self.norm1), (across, self.norm2), (self._ff_block, self.norm3)
        for step, norm in steps:
            tgt = tgt + step(norm(tgt)) if self.norm_first else norm(tgt + step(tgt))
        return tgt


class SoftMaskedTransformerDecoder(nn.TransformerDecoder):
    """nn.TransformerDecoder that hands a soft mask down to its layers. `from_module` makes one that shares the decoder's parameters."""

    @classmethod
    def from_module(
        cls, decoder: nn.TransformerDecoder, alpha_init: float | Sequence[float] | None = None, learnable_alpha: bool = True
    ) -> SoftMaskedTransformerDecoder:
        """The decoder with soft masks, which leaves `decoder` as it is. Arguments and errors are those of its layers' from_module."""
        made = _as(cls, decoder)
        layers: Any = decoder.layers
        soft = (SoftMaskedTransformerDecoderLayer.from_module(layer, alpha_init, learnable_alpha) for layer in layers)
        made.layers = nn.ModuleList(soft)
        return made

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        """As nn.TransformerDecoder.forward. mask: as in SoftMaskedTransformerDecoderLayer.forward, the same for every layer."""
        for layer in self.layers:
            tgt = layer(
                tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
                bool(tgt_is_causal), memory_is_causal, mask=mask,
            )  # fmt: skip
        return tgt if self.norm is None else self.norm(tgt)


def _as(kind: Any, module: nn.Module) -> Any:
    """The module as one of that kind, with the same parameters and parts. A part that is replaced there stays in `module`."""
    made = copy.copy(module)
    made.__class__ = kind
    for name, value in vars(module).items():
        if isinstance(value, dict):  # of parts, parameters, buffers and hooks: what is added to one is not the other's
            setattr(made, name, copy.copy(value))
    return made
