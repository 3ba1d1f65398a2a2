"""Soft-masked attention for PyTorch: softmax(scale * Q K^T + alpha_h * M) V, differentiable in Q, K, V, M and alpha."""

from importlib import metadata as _metadata

from . import nn
from .attention import attention_map, soft_masked_attention
from .backends import backends

__all__ = ["attention_map", "backends", "nn", "soft_masked_attention", "__version__"]
__version__ = _metadata.version("smattn")
