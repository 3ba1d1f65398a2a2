"""Soft-masked attention in models written for something else: any nn.MultiheadAttention, a Hugging Face Mask2Former."""

from .mask2former import soften_mask2former
from .multihead import SoftMaskedMultiheadAttention

__all__ = ["SoftMaskedMultiheadAttention", "soften_mask2former"]
