"""Which kernels a table or a note is of."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

KERNELS = Path(__file__).parents[1]
COMMENT = re.compile(r"\s*#.*|\n\s*(?=\n)")


def sources() -> str:
    """A hash of the code in kernels/*.py, whatever its comments say. Tiles are data and do not count, nor do these tools."""
    files = sorted(file for file in KERNELS.rglob("*.py") if file.parent != KERNELS / "tools")
    return hashlib.sha256("".join(COMMENT.sub("", file.read_text()) for file in files).encode()).hexdigest()[:16]
