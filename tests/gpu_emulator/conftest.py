"""This folder's tests compile Triton's kernels, which a process that interprets them cannot: tests/triton/test_emulated.py runs them."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "0" else ["test_*.py"]
