"""Soft-masked attention in models written for something else, from nn.MultiheadAttention to Hugging Face's, and programs without smattn."""

from .decoder import SoftMaskedTransformerDecoder, SoftMaskedTransformerDecoderLayer
from .exported import decompositions
from .hugging_face import register_transformers
from .mask2former import soft_mask2former_class, soften_mask2former
from .multihead import SoftMaskedMultiheadAttention
from .triangle import triangle_attention

__all__ = [
    "SoftMaskedMultiheadAttention",
    "SoftMaskedTransformerDecoder",
    "SoftMaskedTransformerDecoderLayer",
    "decompositions",
    "register_transformers",
    "soft_mask2former_class",
    "soften_mask2former",
    "triangle_attention",
]
