"""How many tiles of scores the mask has already decided: `python bench/tile_skipping.py` (half a minute)

A tile of queries I and keys J may be left out of head h where its weights are lost in rounding. For i in I and j in J, by Cauchy and
Schwarz,

    S_ij <= |scale| |q_i| max_J |k_j| + max_J alpha M_ij =: U_i,    P_ij <= exp(U_i - m_i),  m_i the row's maximum

so where U_i <= m_i - log(Nk / u) for every i in I, all that is left out of a row weighs at most u = 2^-24 (2^-9 where outputs are
bfloat16): l_i changes by that share at most, and O_i by u (max |v| + |O_i|). `bound` counts the tiles for which this holds, `best` those
whose scores, computed, fall below the same line: more than any bound could find. m_i is the final maximum: a kernel has it only after the
tile that holds it. Counted in tiles, not in time: no machine matters. Writes bench/results/tile-skipping.csv.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from smattn.testing import WORKLOADS, Case, make_case

RESULTS = Path(__file__).parent / "results" / "tile-skipping.csv"
NAMES = ("hodor_infer", "queries100_b1", "self1k", "vit_cls")
TILES = ((1, 128), (16, 64), (16, 128), (64, 64), (64, 128))  # queries, keys; no kernel has tiles of one query
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-9}
FIELDS = ("workload", "alpha", "queries", "keys", "output", "bound", "best")


def below_the_line(case: Case, h: int, keys: int, u: float) -> tuple[Tensor, Tensor]:
    """Of batch element 0 and head h: whether each query's part of each block of keys may be left out, by the bound and at best."""
    q, k, m = case.query[0, h], case.key[0, h], case.mask[0]  # type: ignore[index]
    scale, alpha = abs(q.shape[1] ** -0.5), case.alpha[h]  # type: ignore[index]
    scores = (q @ k.mT) * scale + alpha * m
    line = scores.amax(1, keepdim=True) - math.log(k.shape[0] / u)
    bound = scale * q.norm(dim=1, keepdim=True) * highest(k.norm(dim=1)[None], keys) + highest(alpha * m, keys)
    return bound <= line, highest(scores, keys) <= line


def highest(rows: Tensor, keys: int) -> Tensor:
    """The largest of each block of so many columns, the last axis."""
    return F.pad(rows, (0, -rows.shape[-1] % keys), value=float("-inf")).unflatten(-1, (-1, keys)).amax(-1)


def share(rows: Tensor, queries: int) -> float:
    """Of the tiles of so many queries, those all of whose rows may be left out."""
    tiles = F.pad(rows, (0, 0, 0, -rows.shape[0] % queries), value=True).unflatten(0, (-1, queries))
    return tiles.all(1).double().mean().item()


def measure(name: str) -> Iterator[dict[str, str | float]]:
    w = WORKLOADS[name]
    case = make_case(1, w.H, w.Nq, w.Nk, w.D, mask="blob")
    assert isinstance(case.alpha, Tensor)
    for alpha in sorted(set(case.alpha.tolist()), reverse=True):
        h = case.alpha.tolist().index(alpha)
        for queries, keys in TILES:
            for output, u in ROUNDING.items():
                found = (round(share(rows, queries), 4) for rows in below_the_line(case, h, keys, u))
                yield dict(zip(FIELDS, (name, alpha, queries, keys, output, *found), strict=True))


def main() -> None:
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for name in NAMES:
            for row in measure(name):
                writer.writerow(row)
                print(" ".join(f"{value!s:>14}" for value in row.values()), flush=True)


if __name__ == "__main__":
    main()
