"""What the studies' plots have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def dots(axis: Any, columns: Mapping[str, list[float]], centre: Callable[[list[float]], float]) -> None:
    """Plot each column's values as dots, with a line at their centre, on a matplotlib axis."""
    for i, values in enumerate(columns.values()):
        axis.plot([i] * len(values), values, "o", color=f"C{i}", alpha=0.6)
        axis.plot([i - 0.25, i + 0.25], [centre(values)] * 2, color=f"C{i}")
    axis.set_xticks(range(len(columns)), list(columns))
