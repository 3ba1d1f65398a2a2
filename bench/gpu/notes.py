"""What a search has found, a line of JSON for each find, so that one that was stopped goes on: bench.gpu.tune's and bench.gpu.rank's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton


class Notes:
    """The finds of one search, by what it depends on besides Triton, in a file that others share."""

    def __init__(self, path: Path, of: str) -> None:
        self._path, self._of = path, f"{of}, triton {triton.__version__}"

    def found(self) -> Iterator[tuple[str, Any]]:
        """Each name and what was found of it. A line that was cut short says nothing."""
        for line in self._path.read_text().splitlines() if self._path.exists() else ():
            try:
                note = json.loads(line)
            except json.JSONDecodeError:
                continue
            if note["of"] == self._of:
                yield note["name"], note["found"]

    def add(self, name: str, found: Any) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write("\n" * (file.tell() > 0) + json.dumps({"of": self._of, "name": name, "found": found}))
