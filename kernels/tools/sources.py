"""Which kernels a table or a note is of."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

KERNELS = Path(__file__).parents[1]
COMMENT = re.compile(r"\s*#.*|\n\s*(?=\n)")


def sources(with_tools: bool = False) -> str:
    """A hash of the code in kernels/*.py, whatever its comments say. Tiles are data and do not count, and these tools only if asked for."""
    files = sorted(file for file in KERNELS.rglob("*.py") if with_tools or file.parent != KERNELS / "tools")
    return hashlib.sha256("".join(COMMENT.sub("", file.read_text()) for file in files).encode()).hexdigest()[:16]
