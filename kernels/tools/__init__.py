"""What looks at the kernels without running them: `python -m smattn.kernels.tools.aot`."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """The type of a command's option that takes a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)
