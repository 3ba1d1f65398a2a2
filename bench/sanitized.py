"""A few small calls of every fused backend of this machine's device: `compute-sanitizer python bench/sanitized.py`

Both regimes, every option, ragged sizes, forward and every gradient: each kernel runs, with no more work than it takes to find a bad access
or a race.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from smattn.backends import TABLE
from smattn.testing import Case, make_case, run

DTYPES = (torch.float16, torch.float32)
QUERIES, KEYS = (13, 150), 203  # few and many, no multiple of a tile


def cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    for Nq in QUERIES:
        yield make_case(1, 2, Nq, KEYS, 32, dtype=dtype, device=device)
        yield make_case(2, 2, Nq, KEYS, 48, Hkv=1, dtype=dtype, dropout_p=0.3, padded=0.3, with_lse=True, device=device)
        yield make_case(2, 2, Nq, KEYS, 32, dtype=dtype, mask_shape=(1, 2, 1, KEYS), padded=0.3, device=device)
        yield make_case(1, 2, Nq, KEYS, 32, dtype=dtype, as_map=True, device=device)


def main(device: str) -> None:
    """Exits with an error when a result is not finite."""
    problem = make_case(1, 1, 1, 1, 32, device=device).problem()
    names = [row.name for row in TABLE if row.name != "reference" and not row.unsupported_reasons(problem, "forward")]
    for name in names:
        for dtype in DTYPES:
            for case in cases(dtype, device):
                results = run(case, name)
                bad = [tensor for tensor, value in results.items() if not value[value != float("-inf")].isfinite().all()]  # lse may be -inf
                if bad:
                    raise SystemExit(f"{name} {dtype} {tuple(case.query.shape)}: {', '.join(bad)} not finite")
            print(f"{name}, {str(dtype)[6:]}: done", flush=True)


if __name__ == "__main__":
    main("cuda" if torch.cuda.is_available() else "cpu")
