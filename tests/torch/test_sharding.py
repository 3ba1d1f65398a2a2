"""DTensors sharded over batch, heads or queries give the output and gradients of one process."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from smattn.distributed import sharded_attention
from smattn.testing import assert_within_budget, make_case
from tests.support.ranks import in_processes

pytestmark = pytest.mark.promise("distributed")
NAMES = ("query", "key", "value", "mask", "alpha")
WORLDS = (2, 4)


def cases():
    return {
        "plain": make_case(4, 4, 6, 11, 4, with_lse=True),
        "padded, a mask a head": make_case(3, 4, 6, 11, 4, mask_shape=(1, 4, 6, 11), padded=0.3, with_lse=True),
        "grouped heads, a mask for all": make_case(5, 8, 6, 11, 4, Dv=5, Hkv=4, mask_shape=(1, 1, 11), with_lse=True),
    }


def grouped_over_two_dimensions(mesh):
    """6 heads of keys divide evenly over each mesh dimension, but not over both."""
    case = make_case(1, 12, 3, 5, 4, Hkv=6, mask=None)
    q, *kv = (
        distribute_tensor(t, mesh, [placement] * 2)
        for t, placement in ((case.query, Shard(1)), (case.key, Replicate()), (case.value, Replicate()))
    )
    with pytest.raises(ValueError) as error:
        sharded_attention(q, *kv, enable_gqa=True)
    return str(error.value)


def placements(world):
    if world == 2:
        return {"batch": [Shard(0)], "heads": [Shard(1)], "queries": [Shard(2)], "none": [Replicate()]}
    return {"batch and heads": [Shard(0), Shard(1)], "heads and queries": [Shard(1), Shard(2)], "heads twice": [Shard(1), Shard(1)]}


def sharded(case, mesh, placed):
    """The whole results of a call whose query has this placement while all else is replicated."""
    leaves = {n: distribute_tensor(getattr(case, n), mesh, placed if n == "query" else [Replicate()] * mesh.ndim) for n in NAMES}
    leaves = {n: t.requires_grad_() for n, t in leaves.items()}
    padding = case.key_padding_mask
    padding = None if padding is None else distribute_tensor(padding, mesh, [Replicate()] * mesh.ndim)
    out, lse = sharded_attention(**leaves, key_padding_mask=padding, enable_gqa=case.enable_gqa, return_lse=True)
    assert out.placements == lse.placements == tuple(placed)
    incoming = [distribute_tensor(t, mesh, placed) for t in (case.dout, case.dlse)]
    grads = torch.autograd.grad([out, lse], list(leaves.values()), incoming)
    assert all(grad.placements == leaf.placements for grad, leaf in zip(grads, leaves.values(), strict=True))
    results = {"out": out, "lse": lse} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: t.full_tensor().detach() for name, t in results.items()}


def refusals(mesh):
    def placed(t, placement):
        return distribute_tensor(t, mesh, [placement] * mesh.ndim)

    q, k, v = torch.rand(1, 3, 2, 4), torch.rand(1, 3, 5, 4), torch.rand(1, 3, 5, 4)
    whole = [placed(t, Replicate()) for t in (q, k, v)]
    messages = []
    for tensors, options in (
        ((whole[0], k, v), {}),
        ((placed(q, Shard(3)), *whole[1:]), {}),
        ((placed(q, Shard(1)), *whole[1:]), {}),
        (whole, {"dropout_p": 0.1}),
        (whole, {"mask_logits": whole[0]}),
    ):
        with pytest.raises((TypeError, ValueError)) as error:
            sharded_attention(*tensors, **options)
        messages.append(str(error.value))
    return messages


def worker(rank, world):
    mesh = init_device_mesh("cpu", (2,) * (world // 2))
    results = {(name, how): sharded(case, mesh, placed) for name, case in cases().items() for how, placed in placements(world).items()}
    return results, refusals(mesh), grouped_over_two_dimensions(mesh) if world == 4 else None


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request, tmp_path_factory):
    return request.param, in_processes(worker, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", cases())
def test_sharded_tensors_give_what_one_process_has(ranks, name):
    world, of_ranks = ranks
    for how in placements(world):
        for results, *_ in of_ranks:
            assert_within_budget(results[name, how], cases()[name])


def test_what_cannot_be_sharded_is_refused(ranks):
    for _, (no_dtensor, head_size, heads, *unknown), over_two in ranks[1]:
        assert no_dtensor == "key: expected a DTensor, got Tensor"
        assert head_size.startswith("query: expected Replicate() or Shard of axis 0, 1 or 2")
        many = "key: expected a number of heads that {} ranks can share equally, got {}"
        assert heads == many.format(ranks[0], 3) and over_two in (None, many.format(4, 6))
        for name, message in zip(("dropout_p", "mask_logits"), unknown, strict=True):
            assert f"unexpected keyword argument '{name}'" in message
