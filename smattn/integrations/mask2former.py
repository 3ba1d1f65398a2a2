"""Hugging Face's Mask2Former with soft masks: its decoder attends under the predicted masks themselves, which then have a gradient.

The original thresholds each layer's predicted mask at 0.5, detaches it and repeats it for every head; a query whose mask is empty attends
everywhere. Here one M = sigmoid(sharpness * logits) for all heads is added to the scores, times alpha, and a mask that is nearly empty
fades into attending everywhere by itself. With large sharpness M is the thresholded mask, and with large alpha the output is the
original's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..alpha import NAME as ALPHA
from ..alpha import initial_alpha
from .multihead import SoftMaskedMultiheadAttention

Model = TypeVar("Model", bound=nn.Module)


def soften_mask2former(
    model: Model, alpha_init: float | Sequence[float] | None = None, learnable_alpha: bool = True, sharpness: float = 1.0
) -> Model:
    """Change a Mask2Former in place: soft-masked cross-attention in every decoder layer, with a gradient to the predicted masks.

    Parameters are shared, not copied. Each layer's cross_attn gets one more, alpha, as scaling_factors (H,): give it a learning rate of its
    own by smattn.nn.parameter_groups. State dicts of the original load before and after, strictly. The arguments are kept in the model's
    config, and what save_pretrained then writes is read by `soft_mask2former_class`.

    Args:
        model: transformers' Mask2FormerModel, Mask2FormerForUniversalSegmentation, or any module with their decoder inside.
        alpha_init, learnable_alpha: as in smattn.nn.SoftMaskedAttention.
        sharpness: factor on the mask logits before the sigmoid.

    Returns:
        model.

    Raises:
        ValueError: there is no Mask2FormerMaskedAttentionDecoder inside, or it is soft already.
    """
    decoders: list[Any] = [m for m in model.modules() if type(m).__name__ == "Mask2FormerMaskedAttentionDecoder"]
    if not decoders:
        raise ValueError(f"model: expected a Mask2FormerMaskedAttentionDecoder inside, found none in {type(model).__name__}")
    if any(isinstance(decoder.mask_predictor, _SoftMaskPredictor) for decoder in decoders):
        raise ValueError("model: expected a Mask2Former with hard masks, got one that is soft already")
    layers = [layer for decoder in decoders for layer in decoder.layers]
    # All are made before one is put in its place, so that a refused argument leaves the model as it is.
    made = [_SoftCrossAttention.from_module(layer.cross_attn, alpha_init, learnable_alpha) for layer in layers]
    for layer, cross_attention in zip(layers, made, strict=True):
        layer.cross_attn = cross_attention
    for decoder in decoders:
        decoder.mask_predictor = _SoftMaskPredictor(decoder.mask_predictor.mask_embedder, sharpness)
    config: Any = getattr(model, "config", None)
    if config is not None:
        start = None if alpha_init is None else list(initial_alpha(alpha_init, decoders[0].layers[0].cross_attn.num_heads))
        config.soft_masks = dict(alpha_init=start, learnable_alpha=learnable_alpha, sharpness=sharpness)
    return model


@cache
def soft_mask2former_class(kind: type[Model]) -> type[Model]:
    """The class of a softened Mask2Former, by which from_pretrained reads what save_pretrained wrote of one, alpha included.

        soft = soft_mask2former_class(Mask2FormerForUniversalSegmentation).from_pretrained(folder)

    It also reads what was saved of the original, whose masks become soft with the defaults of `soften_mask2former`. The original's own
    from_pretrained reads a softened model as a hard one, and says that scaling_factors were not used.

    Args:
        kind: transformers' Mask2FormerModel, Mask2FormerForUniversalSegmentation, or a subclass of either.

    Returns:
        A subclass of the same name. alpha stays in float32 whatever dtype is asked for.
    """
    base: Any = kind

    class Soft(base):  # type: ignore[misc]  # a base that is known only here
        _keep_in_fp32_modules_strict = [*(base._keep_in_fp32_modules_strict or ()), ALPHA]

        def __init__(self, config: Any, *inputs: Any, **options: Any) -> None:
            super().__init__(config, *inputs, **options)
            soften_mask2former(self, **getattr(config, "soft_masks", {}))

        @classmethod
        def from_pretrained(cls, *inputs: Any, output_loading_info: bool = False, **options: Any) -> Any:
            model, info = super().from_pretrained(*inputs, output_loading_info=True, **options)
            for name, module in model.named_modules():
                if f"{name}.{ALPHA}" in info["missing_keys"]:  # transformers leaves unset what it does not know how to begin
                    module._reset_alpha()
            return (model, info) if output_loading_info else model

    Soft.__name__, Soft.__qualname__, Soft.__module__ = kind.__name__, kind.__qualname__, __name__
    return Soft


class _SoftMaskPredictor(nn.Module):
    """Stands in the place of Mask2FormerMaskPredictor."""

    def __init__(self, mask_embedder: nn.Module, sharpness: float) -> None:
        super().__init__()
        self.mask_embedder, self.sharpness = mask_embedder, sharpness

    def forward(self, outputs: Tensor, pixel_embeddings: Tensor, attention_mask_target_size: Any = None) -> tuple[Tensor, Tensor]:
        """From queries (Nq, B, C) and pixels (B, C, h, w), the mask logits (B, Nq, h, w), and M (B, Nq, Nk) at the target size."""
        logits = torch.einsum("bqc, bchw -> bqhw", self.mask_embedder(outputs.transpose(0, 1)), pixel_embeddings)
        resized = F.interpolate(logits, size=attention_mask_target_size, mode="bilinear", align_corners=False)
        # The decoder multiplies rows that sum to Nk by 0, which is harmless: M = 1 everywhere and M = 0 everywhere are the same attention.
        return logits, (self.sharpness * resized.flatten(2)).sigmoid()


class _SoftCrossAttention(SoftMaskedMultiheadAttention):
    """Stands in the place of a layer's nn.MultiheadAttention. Its attn_mask is M."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor, **_: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(query, key, value, need_weights=False, mask=attn_mask)[0], None
