"""Soft-masked attention in models written for something else: nn.MultiheadAttention, a Hugging Face Mask2Former, triangle attention."""

from .exported import decompositions
from .mask2former import soften_mask2former
from .multihead import SoftMaskedMultiheadAttention
from .triangle import triangle_attention

__all__ = ["SoftMaskedMultiheadAttention", "decompositions", "soften_mask2former", "triangle_attention"]
