"""Soft-masked attention in models written for something else, from nn.MultiheadAttention to Hugging Face's, and programs without smattn."""

from .exported import decompositions
from .hugging_face import register_transformers
from .mask2former import soften_mask2former
from .multihead import SoftMaskedMultiheadAttention
from .triangle import triangle_attention

__all__ = ["SoftMaskedMultiheadAttention", "decompositions", "register_transformers", "soften_mask2former", "triangle_attention"]
