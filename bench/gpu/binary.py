"""Load the compiled extension, say which torch built it and which torch loads it, and try its kernels.

`python -m bench.gpu.binary [_cpu.so ...]`

Without a path it takes the one of the installed package, and one in the source tree, which another Python and torch may have built. Each
is loaded in a process of its own, for they register the same operations. The exit status is 77 when there is none.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from bench.gpu.run import NOT_HERE
from smattn import cpu
from smattn.testing import errors, make_case, run


def try_out(library: Path) -> str:
    """One line about it. Raises RuntimeError when it does not load or computes something wrong."""
    cpu.LIBRARY = cpu.LIBRARY._replace(path=library)
    if reasons := cpu.reasons():
        raise RuntimeError("; ".join(reasons))
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(2, 2, 13, 203, 32, dtype=dtype, padded=0.3, dropout_p=0.2, with_lse=True)
        if outside := [row.name for row in errors(run(case, "cpu"), case) if not row.within]:
            raise RuntimeError(f"{library}: {', '.join(outside)} outside the error budget in {dtype}")
    ops = torch.ops.smattn_cpu
    return f"{library}: built with torch {ops.built_with_torch()}, loaded by torch {torch.__version__}; {ops.cpu_kernels()}: right"


def main(paths: list[str]) -> int:
    if len(paths) == 1:
        print(try_out(Path(paths[0]).resolve()), flush=True)
        return 0
    source = Path(__file__).resolve().parents[2] / "smattn" / "_cpu.so"
    libraries = [Path(path) for path in paths] or [path for path in dict.fromkeys((cpu.LIBRARY.path.resolve(), source)) if path.exists()]
    if not libraries:
        print("\n".join(cpu.reasons()))
        return NOT_HERE
    return max(subprocess.run([sys.executable, "-m", __spec__.name, str(library)]).returncode for library in libraries)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
