"""The static table of tiles in kernels/configs.py as text: rows changed or added in place, all else untouched."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import MISSING, fields

from smattn.kernels.configs import NONE, TileConfig

Key = tuple[str, int, int]  # kernel, arch, bytes of an element
Tiles = tuple[TileConfig, ...]  # one for each of configs.HEAD_SIZES


def rewritten(source: str, rows: Mapping[Key, Tiles]) -> str:
    """The source of configs.py with these rows; one that it has not comes after those of its kernel and element."""
    lines = source.splitlines(keepends=True)
    for key, tiles in rows.items():
        lines = "".join(lines).splitlines(keepends=True)
        entries = entries_of("".join(lines))
        if value := entries.get(key):
            first, last = value.lineno - 1, (value.end_lineno or value.lineno) - 1
            before, after = lines[first].encode()[: value.col_offset].decode(), lines[last].encode()[value.end_col_offset :].decode()
            lines[first : last + 1] = [before + shown(tiles) + after]
        else:
            alike = [k for k in entries if k[::2] == key[::2]] or [k for k in entries if k[0] == key[0]] or list(entries)
            lines.insert(entries[alike[-1]].end_lineno or 0, f'    ("{key[0]}", {key[1]}, {key[2]}): {shown(tiles)},\n')
    return "".join(lines)


def entries_of(source: str) -> dict[Key, ast.expr]:
    """The table's keys and the expressions of their values."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "TABLE":
            assert isinstance(node.value, ast.Dict)
            return {ast.literal_eval(key): value for key, value in zip(node.value.keys, node.value.values, strict=True) if key}
    raise ValueError("no TABLE in this source")


def shown(tiles: Tiles) -> str:
    return f"({', '.join(map(_tile, tiles))})"


def _tile(tile: TileConfig) -> str:
    """T(128, 64, 8, 3), without what has its default, and with the name of what comes after such."""
    if tile == NONE:
        return "NONE"
    shown, named = [], ""
    for field in fields(tile):
        value = getattr(tile, field.name)
        if field.default is not MISSING and value == field.default:
            named = "{}="
        else:
            shown.append(named.format(field.name) + repr(value))
    return f"T({', '.join(shown)})"
