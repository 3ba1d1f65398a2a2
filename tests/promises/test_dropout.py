"""Dropout: every backend drops the same elements, by a seed from torch's generator."""

import pytest
import torch

from smattn import reference, soft_masked_attention
from smattn.canonical import draw_seed
from tests.support.cpu_kernels import KERNELS, forced
from tests.support.philox import words

pytestmark = pytest.mark.promise("dropout")
B, H, NQ, NK = 2, 3, 5, 40


def kept(backend, device, p, Nq=NQ, rng=0, dtype=torch.float32):
    """The weights that a call keeps, and the seed that it drew. With the identity as value, out is P * keep / (1 - p)."""
    query, key = (torch.zeros(B, H, n, 4, device=device, dtype=dtype) for n in (Nq, NK))
    value = torch.eye(NK, device=device, dtype=dtype).expand(B, H, NK, NK)
    torch.manual_seed(rng)
    out = soft_masked_attention(query, key, value, dropout_p=p, backend=backend)
    torch.manual_seed(rng)
    seed = draw_seed(torch.device(device))
    torch.testing.assert_close(out[out != 0], torch.full_like(out[out != 0], 1 / (NK * (1 - p))))
    return out != 0, seed


@pytest.mark.parametrize("p", [0.01, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("Nq", [NQ, 131])
def test_bits_are_philox_words_compared_with_p(backend, device, Nq, p):
    keep, seed = kept(backend, device, p, Nq, rng=7)
    expected = torch.from_numpy(words(int(seed), B, H, Nq, NK) >= int(p * 2**32))
    assert torch.equal(keep.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_bits_are_the_same_from_every_set_of_cpu_kernels(name, dtype):
    """The kernels draw a vector of queries at a time, and vectors differ in length."""
    with forced(name):
        keep, seed = kept("cpu", "cpu", 0.3, Nq=131, rng=11, dtype=dtype)
    assert torch.equal(keep, reference.dropout_keep(seed, B, H, 131, NK, 0.3))


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 0x299F31D0A4093822])
def test_the_formula_of_the_reference_is_philox(seed):
    keep = reference.dropout_keep(torch.tensor([seed]), B, H, NQ, NK, 0.3)
    assert torch.equal(keep, torch.from_numpy(words(seed, B, H, NQ, NK) >= int(0.3 * 2**32)))


def test_the_share_that_is_dropped(backend, device):
    p = 0.3
    shares = torch.stack([kept(backend, device, p, rng=rng)[0].float().mean() for rng in range(8)])
    n = 8 * B * H * NQ * NK
    assert abs(shares.mean() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
    assert len(set(shares.tolist())) > 1


def test_manual_seed_repeats_a_call_and_the_next_call_differs(backend, device):
    query, key, value = (torch.randn(1, 2, n, 8, device=device) for n in (5, 40, 40))

    def call():
        return soft_masked_attention(query, key, value, dropout_p=0.5, backend=backend)

    torch.manual_seed(3)
    first, second = call(), call()
    torch.manual_seed(3)
    assert torch.equal(first, call()) and torch.equal(second, call())
    assert not torch.equal(first, second)


def test_without_dropout_the_generator_is_left_alone(backend, device):
    query, key, value = (torch.randn(1, 2, n, 8, device=device) for n in (5, 7, 7))
    torch.manual_seed(3)
    expected = torch.rand(1, device=device)
    torch.manual_seed(3)
    soft_masked_attention(query, key, value, backend=backend)
    assert torch.equal(torch.rand(1, device=device), expected)


def test_draws_cover_64_bits():
    torch.manual_seed(0)
    seeds = torch.cat([draw_seed(torch.device("cpu")) for _ in range(64)])
    assert seeds.dtype == torch.int64
    bits = (seeds[:, None] >> torch.arange(64)) & 1
    assert bits.any(0).all() and not bits.all(0).any()
