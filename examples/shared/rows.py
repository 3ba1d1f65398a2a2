"""Rows of results as CSV files. A row is a NamedTuple of strings, whole numbers and floats, and the file's first line has its fields."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

RESULTS = Path(__file__).resolve().parents[1] / "results"


def files_of(out: Path) -> tuple[Path, Path]:
    """Where a study of this name keeps its rows and its plot. The name may have a dot in it, as v1.0 has."""
    return out.with_name(f"{out.name}.csv"), out.with_name(f"{out.name}.png")


def read(path: Path, kind: type[Any]) -> list[Any]:
    """The rows of that kind which `write` wrote; none where there is no file."""
    if not path.exists():
        return []
    kinds = get_type_hints(kind).values()
    with open(path, newline="") as file:
        return [kind(*(of(value) for of, value in zip(kinds, line, strict=True))) for line in list(csv.reader(file))[1:]]


def write(path: Path, rows: Sequence[Any], decimals: int = 2) -> None:
    """Write at least one row, its floats with so many decimals."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0]._fields)
        writer.writerows([f"{value:.{decimals}f}" if isinstance(value, float) else value for value in row] for row in rows)
