"""Attention over several processes: keys sharded over a process group, or DTensors sharded over batch, heads or queries."""

from .context_parallel import context_parallel_attention
from .sharding import sharded_attention

__all__ = ["context_parallel_attention", "sharded_attention"]
