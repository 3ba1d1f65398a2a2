"""A record of the operations of smattn that run."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class Called(TorchDispatchMode):
    """Collects the names of the operations of smattn that run inside the block."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "smattn":
            self.names.append(function._opname)
        return function(*args, **kwargs or {})
