"""smattn.distributed: keys sharded over processes give the results of one process, and send what the docstring says."""

from dataclasses import fields, replace

import pytest
import torch
import torch.distributed as dist

from smattn.autograd import NO_SECOND
from smattn.distributed import context_parallel_attention
from smattn.testing import assert_within_budget, make_case, run
from tests.support.expected import DEVICE
from tests.support.ranks import in_processes

pytestmark = pytest.mark.promise("distributed")
WORLDS = (2, 4)
BACKENDS = (None, "reference")
NAMES = ("query", "key", "value", "mask", "alpha")


def cases():
    """Cases of 25 keys, for shards of unequal sizes, one of them empty."""
    half = make_case(2, 4, 5, 25, 8, dtype=torch.bfloat16, with_lse=True, rng=3)
    padded = make_case(3, 2, 5, 25, 8, with_lse=True, padded=0.3, rng=1)
    padded.key_padding_mask[0] = True  # no key on any rank
    padded.key_padding_mask[1, :20] = True  # none on the first ranks
    ruled_out = make_case(1, 2, 5, 25, 8, rng=2)
    ruled_out.mask[..., :20] = float("-inf")
    return {
        "plain": make_case(2, 4, 5, 25, 8, with_lse=True),
        "padded": padded,
        "grouped heads": make_case(2, 4, 5, 25, 8, Dv=6, Hkv=2, with_lse=True, mask_shape=(1, 4, 1, 25), rng=4),
        "no mask": make_case(2, 4, 5, 25, 8, mask=None),
        "bfloat16": half,
        "float16": make_case(2, 4, 5, 25, 8, dtype=torch.float16, rng=5),
        "float64": make_case(2, 4, 5, 25, 8, dtype=torch.float64, mask_dtype=torch.float64, with_lse=True),
        "ruled out on the first ranks": ruled_out,
        "a head size that the reference alone takes": make_case(1, 2, 5, 25, 257, with_lse=True, rng=6),
    }


def columns(rank, world):
    """The shard of a rank: of 4, one of 0:10, 10:10, 10:18, 18:25; of 2, one of 0:10, 10:25; of another number, an even one."""
    ends = {2: [0, 10, 25], 4: [0, 10, 10, 18, 25]}.get(world, [25 * r // world for r in range(world + 1)])
    return slice(ends[rank], ends[rank + 1])


def needs_of(case):
    return [n for n in NAMES if getattr(case, n) is not None and not (n == "alpha" and case.mask.isinf().any())]


def sharded(case, rank, world, backend=None):
    """The results of one rank's call, named as in smattn.testing.run, and the bytes that each of its all-reduces sent."""
    at, needs, sent = columns(rank, world), needs_of(case), []
    mine = case.with_inputs({"key": case.key[:, :, at], "value": case.value[:, :, at]})
    if case.mask is not None:
        mine = mine.with_inputs({"mask": case.mask[..., at]})
    padding = None if case.key_padding_mask is None else case.key_padding_mask[:, at]
    leaves = {n: getattr(mine, n).clone().requires_grad_(n in needs) for n in NAMES if getattr(mine, n) is not None}
    all_reduce = dist.all_reduce

    def counted(tensor, *rest):
        sent.append(tensor.nbytes)
        return all_reduce(tensor, *rest)

    dist.all_reduce = counted
    try:
        out, lse = context_parallel_attention(
            **leaves, key_padding_mask=padding, enable_gqa=case.enable_gqa, return_lse=True, backend=backend
        )
        outputs = {"out": out} if case.dlse is None else {"out": out, "lse": lse}
        incoming = [case.dout, case.dlse][: len(outputs)]
        grads = torch.autograd.grad(list(outputs.values()), [leaves[n] for n in needs], incoming)
    finally:
        dist.all_reduce = all_reduce
    return {n: t.detach() for n, t in outputs.items()} | {f"d{n}": g for n, g in zip(needs, grads, strict=True)}, sent


def refusals(rank, world):
    """The messages of bad groups, of a second derivative, and of batched gradients."""
    tensors = [t.requires_grad_() for t in (torch.rand(1, 1, 2, 4), torch.rand(1, 1, 3, 4), torch.rand(1, 1, 3, 4))]
    without_me = [dist.new_group([r]) for r in range(world)][(rank + 1) % world]
    messages = []
    for group in (without_me, "nccl"):
        with pytest.raises((TypeError, ValueError)) as error:
            context_parallel_attention(*tensors, group=group)
        messages.append(f"{error.type.__name__}: {error.value}")
    (grad,) = torch.autograd.grad(context_parallel_attention(*tensors).sum(), tensors[0], create_graph=True)
    with pytest.raises(NotImplementedError) as error:
        grad.sum().backward()
    messages.append(str(error.value))
    out = context_parallel_attention(*tensors)
    with pytest.raises(RuntimeError) as error:  # torch raises it: a vmap rule would need messages in batches
        torch.autograd.grad(out, tensors, torch.stack([out, out]).detach(), is_grads_batched=True)
    return [*messages, str(error.value)]


def alone(rank, world):
    """The call in a group of this rank alone."""
    group = [dist.new_group([r]) for r in range(world)][rank]
    case = cases()["plain"]
    return context_parallel_attention(*(getattr(case, n) for n in NAMES), group=group)


def worker(rank, world):
    results = {(name, backend): sharded(case, rank, world, backend) for name, case in cases().items() for backend in BACKENDS}
    return results, refusals(rank, world), alone(rank, world)


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request, tmp_path_factory):
    return in_processes(worker, request.param, tmp_path_factory.mktemp("ranks"))


def joined(results):
    """The results of all ranks as those of one process: gradients of keys are joined, and what is replicated must be equal."""
    whole = {}
    for name in results[0]:
        parts = [r[name] for r in results]
        if name in ("dkey", "dvalue", "dmask"):
            whole[name] = torch.cat(parts, -1 if name == "dmask" else 2)
        else:
            assert all(torch.equal(part, parts[0]) for part in parts)
            whole[name] = parts[0]
    return whole


def comparable(results, case, name):
    """Results and their case without the keys that -inf rules out, because the budget has no -inf in its sums."""
    if not name.startswith("ruled out"):
        return results, case
    for tensor in ("dkey", "dvalue", "dmask"):
        axis = -1 if tensor == "dmask" else 2
        assert results[tensor].narrow(axis, 0, 20).count_nonzero() == 0
        results[tensor] = results[tensor].narrow(axis, 20, 5)
    return results, replace(case, key=case.key[:, :, 20:], value=case.value[:, :, 20:], mask=case.mask[..., 20:])


@pytest.mark.parametrize("by", BACKENDS, ids=str)
@pytest.mark.parametrize("name", cases())
def test_sharded_keys_give_what_one_process_has(ranks, name, by):
    assert_within_budget(*comparable(joined([results[name, by][0] for results, *_ in ranks]), cases()[name], name))


def moved(case, device):
    tensors = {field.name: getattr(case, field.name) for field in fields(case)}
    return replace(case, **{name: t.to(device) for name, t in tensors.items() if isinstance(t, torch.Tensor)})


def on_its_device(rank, world):
    every = {name: sharded(moved(case, DEVICE), rank, world)[0] for name, case in cases().items()}
    return {name: {n: t.cpu() for n, t in results.items()} for name, results in every.items()}


GROUPS = [("gloo", 1), ("nccl", 1), *[("nccl", torch.cuda.device_count())] * (torch.cuda.device_count() > 1)]


@pytest.mark.parametrize("transport, world", GROUPS, ids=lambda value: str(value))
def test_every_rank_on_its_own_device(transport, world, tmp_path):
    if transport == "nccl" and DEVICE != "cuda":
        pytest.skip("NCCL needs a CUDA device")
    ranks = in_processes(on_its_device, world, tmp_path, transport)
    for name, case in cases().items():
        assert_within_budget(*comparable(joined([results[name] for results in ranks]), case, name))


def test_a_query_without_a_key_on_any_rank(ranks):
    results = joined([results["padded", None][0] for results, *_ in ranks])
    assert results["out"][0].count_nonzero() == 0 and (results["lse"][0] == float("-inf")).all()
    assert all(results[f"d{name}"][0].count_nonzero() == 0 for name in ("query", "key", "value", "mask"))


@pytest.mark.parametrize("name", cases())
def test_what_is_sent_is_what_the_docstring_says(ranks, name):
    case = cases()[name]
    B, H, Nq, D = case.query.shape
    n, word, alpha = B * H * Nq, 8 if name == "float64" else 4, "alpha" in needs_of(case)
    words = [n, n * (case.value.shape[3] + 1 + alpha), n * D + H * alpha]
    for results, *_ in ranks:
        assert results[name, None][1] == [word * count for count in words]


def test_refusals(ranks):
    for rank, (_, (not_in_it, no_group, second, batched), _) in enumerate(ranks):
        assert not_in_it == f"ValueError: group: expected a process group that this rank is in, got one without rank {rank}"
        assert no_group == "TypeError: group: expected a torch.distributed.ProcessGroup or None, got str"
        assert second == NO_SECOND
        assert "Batching rule not implemented" in batched


def of_unequal_queries(rank, world):
    dist.set_debug_level(dist.DebugLevel.DETAIL)  # as TORCH_DISTRIBUTED_DEBUG=DETAIL does, for groups that are made later
    keys = torch.rand(1, 1, 5, 4)
    with pytest.raises(RuntimeError) as error:
        context_parallel_attention(torch.rand(1, 1, 2 + rank, 4), keys, keys, group=dist.new_group())
    return str(error.value)


def test_ranks_with_unequal_queries_are_named_in_debug_mode(tmp_path):
    for rank, message in enumerate(in_processes(of_unequal_queries, 2, tmp_path)):
        assert "mismatch between collectives" in message and f"TensorShape=[1, 1, {2 + rank}]" in message


def test_a_group_of_one_is_the_single_process_call(ranks):
    expected = run(cases()["plain"])["out"]
    for _, _, out in ranks:
        torch.testing.assert_close(out, expected)


def test_without_a_process_group():
    case = cases()["plain"]
    with pytest.raises(RuntimeError, match="init_process_group"):
        context_parallel_attention(*(getattr(case, n) for n in NAMES))
