"""Exported programs that run without smattn: its operations in plain torch, for ONNX and for processes that have no smattn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import ops


def decompositions() -> dict[Any, Callable[..., tuple[Tensor, ...]]]:
    """What to hand to torch.export's run_decompositions, so that a program contains no operation of smattn.

        program = torch.export.export(module.eval(), inputs).run_decompositions(smattn.integrations.decompositions())
        torch.onnx.export(program, (), "module.onnx")

    The operations become those of smattn/reference.py, with the same results within the error budget at any length, and whole score
    tensors in memory. In ONNX float64 has float32's accuracy, to which torch's exporter rounds the scale. Such a program is for inference:
    it has no dropout, and `run_decompositions` raises ValueError where there is some.
    """
    return {ops.forward: _forward, ops.attention_map: _attention_map}


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    a = ops.ForwardArguments(*arguments)
    if a.dropout_p > 0:
        raise ValueError(f"dropout_p: expected 0 in a program without smattn (export module.eval()), got {a.dropout_p}")
    return ops.compute_forward(*a._replace(save_out=False, save_mbar=False, backend="reference"))


def _attention_map(*arguments: Any) -> tuple[Tensor, ...]:
    return ops.compute_map(*ops.MapArguments(*arguments)._replace(backend="reference"))
