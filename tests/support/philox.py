"""Philox4x32-10 in numpy. The dropout bits of every backend are compared with it."""

from __future__ import annotations

import numpy as np


def philox(counter: tuple, key: tuple[int, int]) -> list[np.ndarray]:
    """The four words of Philox4x32-10. The counter is four arrays of 32-bit words, broadcast against one another."""
    low = np.uint64(0xFFFFFFFF)
    x = [np.asarray(word, dtype=np.uint64) for word in counter]
    k0, k1 = key
    for _ in range(10):
        a, b = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        x = [(b >> np.uint64(32)) ^ x[1] ^ np.uint64(k0), b & low, (a >> np.uint64(32)) ^ x[3] ^ np.uint64(k1), a & low]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return x


def words(seed: int, B: int, H: int, Nq: int, Nk: int) -> np.ndarray:
    """Word 0 of every element's block, (B, H, Nq, Nk)."""
    bh, i, j = np.arange(B * H)[:, None, None], np.arange(Nq)[:, None], np.arange(Nk)
    return philox((j, i, bh, 0), (seed % 2**32, (seed >> 32) % 2**32))[0].reshape(B, H, Nq, Nk)
