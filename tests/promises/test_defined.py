"""Defined: padding may hold anything, and queries without a key and sizes of zero have results."""

from dataclasses import replace

import pytest
import torch

from smattn import attention_map, soft_masked_attention
from smattn.testing import assert_within_budget, make_case, run
from tests.support.expected import MANY

pytestmark = pytest.mark.promise("defined")
BAD = [float("nan"), float("inf"), float("-inf")]
DEAD = 1  # the batch element that has no key


def padded_case(Nq, dtype, device, as_map=False):
    """A case where padding takes some keys of batch element 0, all of DEAD and none of 2."""
    case = make_case(3, 1 if Nq == MANY else 2, Nq, 35, 8, dtype=dtype, with_lse=True, as_map=as_map, device=device)
    padding = torch.zeros(3, 35, dtype=torch.bool, device=device)
    padding[0, [0, 3, 33, 34]] = padding[DEAD] = True
    return replace(case, key_padding_mask=padding)


def poisoned(case, bad):
    """The same case with `bad` wherever nobody may look: in padded keys and in the gradients of queries without a key."""
    padding, dead = case.key_padding_mask, case.key_padding_mask.all(1)
    rows = padding[:, None, :, None]
    changes = dict(
        key=case.key.masked_fill(rows, bad),
        mask=case.mask.masked_fill(padding[:, None], bad),
    )
    if case.is_map:
        changes |= dict(dout=case.dout.masked_fill(padding[:, None], bad))
    else:
        changes |= dict(
            value=case.value.masked_fill(rows, bad),
            dout=case.dout.masked_fill(dead[:, None, None, None], bad),
            dlse=case.dlse.masked_fill(dead[:, None, None], bad),
        )
    return replace(case, **changes)


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("Nq, bad", [*((5, bad) for bad in BAD), (MANY, BAD[0])])
def test_what_is_padded_reaches_nothing(backend, device, Nq, bad):
    case = padded_case(Nq, torch.float32, device)
    clean, dirty = run(case, backend), run(poisoned(case, bad), backend)
    assert same_bits(clean, dirty)
    assert_within_budget(dirty, poisoned(case, bad))


def test_what_is_padded_reaches_nothing_in_any_dtype(backend, dtype, device):
    case = padded_case(5, dtype, device)
    assert same_bits(run(case, backend), run(poisoned(case, float("nan")), backend))


@pytest.mark.parametrize("Nq", [5, MANY])
def test_gradients_of_padded_keys_are_exactly_zero(backend, device, Nq):
    case = poisoned(padded_case(Nq, torch.float32, device), float("nan"))
    results, padding = run(case, backend), case.key_padding_mask
    for name in ("dkey", "dvalue"):
        assert not results[name].movedim(2, 1)[padding].any()
    assert not results["dmask"].movedim(2, 1)[padding].any()
    assert results["dkey"].movedim(2, 1)[~padding].all()


@pytest.mark.parametrize("Nq", [5, MANY])
def test_nan_in_what_is_attended_does_not_reach_padded_keys(backend, device, Nq):
    case = padded_case(Nq, torch.float32, device)
    query, dout = case.query.clone(), case.dout.clone()
    query[:, :, 0], dout[:, :, 1] = float("nan"), float("nan")
    results, padding = run(replace(case, query=query, dout=dout), backend), case.key_padding_mask
    for name in ("dkey", "dvalue", "dmask"):
        assert not results[name].movedim(2, 1)[padding].any(), name
    assert results["dkey"].isnan().any() and results["dvalue"].isnan().any()


@pytest.mark.parametrize("Nq", [5, MANY])
def test_a_query_without_keys(backend, device, Nq):
    results = run(poisoned(padded_case(Nq, torch.float32, device), float("nan")), backend)
    assert (results["lse"][DEAD] == float("-inf")).all()
    for name in ("out", "dquery", "dkey", "dvalue", "dmask"):
        assert not results[name][DEAD].any(), name
    assert results["dalpha"].isfinite().all()


def test_a_query_without_keys_changes_nothing_else_in_the_batch(backend, device):
    """The other elements have the bits that they have when the dead element has keys."""
    case = padded_case(5, torch.float32, device)
    padding = case.key_padding_mask.clone()
    padding[DEAD] = False
    dead, alive = run(case, backend), run(replace(case, key_padding_mask=padding), backend)
    for name in set(dead) - {"dalpha"}:  # dalpha is the only sum over the batch
        assert torch.equal(dead[name][[0, 2]], alive[name][[0, 2]]), name
    assert not torch.equal(dead["out"][DEAD], alive["out"][DEAD])


def test_a_dead_element_adds_nothing_to_sums_over_the_batch(backend, device):
    case = padded_case(5, torch.float32, device)
    shared = case.mask[:1]
    dirty = replace(poisoned(case, float("nan")), mask=shared)
    results = run(dirty, backend)
    assert same_bits(run(replace(case, mask=shared), backend), results)
    assert results["dmask"].isfinite().all()
    assert_within_budget(results, dirty)


def test_dropout_with_padding_and_a_dead_element(backend, device):
    case = replace(padded_case(5, torch.float32, device), dropout_p=0.5)
    dirty = poisoned(case, float("nan"))
    assert same_bits(run(case, backend), run(dirty, backend))
    assert_within_budget(run(dirty, backend), dirty)


@pytest.mark.parametrize("bad", BAD)
def test_the_map_selects_padding_out(map_backend, device, bad):
    case = padded_case(5, torch.float32, device, as_map=True)
    dirty = run(poisoned(case, bad), map_backend)
    assert same_bits(run(case, map_backend), dirty)
    assert not dirty["map"].movedim(2, 1)[case.key_padding_mask].any()
    assert not dirty["dmask"].movedim(2, 1)[case.key_padding_mask].any()


EMPTY = [(0, 5, 7), (2, 0, 7), (2, 5, 0), (0, 0, 0), (2, 131, 0)]


@pytest.mark.parametrize("B, Nq, Nk", EMPTY)
@pytest.mark.parametrize("options", [{}, {"mask": None}, {"dropout_p": 0.5}, {"padded": 0.5}, {"mask_shape": (1, 2, 1, None)}], ids=str)
def test_sizes_of_zero(backend, dtype, device, B, Nq, Nk, options):
    if "mask_shape" in options:
        options = {"mask_shape": (1, 2, 1, Nk)}
    case = make_case(B, 2, Nq, Nk, 8, Dv=3, dtype=dtype, with_lse=True, device=device, **options)
    results = run(case, backend)
    assert results["out"].shape == (B, 2, Nq, 3) and results["lse"].shape == (B, 2, Nq)
    assert not results["out"].any() and (results["lse"] == float("-inf")).all()
    for name, tensor in case.inputs().items():
        gradient = results[f"d{name}"]
        assert gradient.shape == tensor.shape and gradient.dtype == tensor.dtype
        assert not gradient.any()


@pytest.mark.parametrize("B, Nq, Nk", EMPTY)
def test_a_map_of_size_zero(map_backend, device, B, Nq, Nk):
    case = make_case(B, 2, Nq, Nk, 8, as_map=True, device=device)
    results = run(case, map_backend)
    assert results["map"].shape == (B, Nq, Nk)
    for name, tensor in case.inputs().items():
        assert results[f"d{name}"].shape == tensor.shape and not results[f"d{name}"].any()


def test_no_gradient_where_nothing_is_differentiable(backend, device):
    case = make_case(1, 2, 3, 5, 4, device=device)
    assert not soft_masked_attention(case.query, case.key, case.value, case.mask, case.alpha, backend=backend).requires_grad


def test_a_map_without_weights_is_the_mean_over_heads(map_backend, device):
    case = make_case(2, 4, 3, 5, 4, device=device)
    amap = attention_map(case.query, case.key, case.mask, case.alpha, backend=map_backend)
    torch.testing.assert_close(amap.sum(-1), torch.ones_like(amap[..., 0]))
    weights = torch.full((4,), 0.25, device=device)
    assert torch.equal(amap, attention_map(case.query, case.key, case.mask, case.alpha, head_weights=weights, backend=map_backend))


@pytest.mark.parametrize("as_map", [False, True])
def test_nan_at_an_attended_key_does_not_reach_a_padded_one(backend, map_backend, device, as_map):
    case = make_case(1, 2, 3, 6, 4, with_lse=True, as_map=as_map, device=device)
    padding = torch.tensor([[False, False, True, False, True, False]], device=device)
    key = case.key.clone()
    key[0, 0, 1] = float("nan")
    results = run(replace(case, key=key, key_padding_mask=padding), map_backend if as_map else backend)
    assert results["dkey"].isnan().any()
    for name in ("dkey", "dmask") if as_map else ("dkey", "dmask", "dvalue"):
        keys_last = results[name] if name == "dmask" else results[name].mT
        assert not keys_last[..., padding[0]].any(), name
