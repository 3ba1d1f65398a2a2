"""alpha as modules hold it: it starts again after the meta device, stays in float32 and has its own group, parametrized or not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.utils import parametrize

from smattn.integrations import SoftMaskedMultiheadAttention
from smattn.nn import HardMaskedAttention, SoftMaskedAttention, SoftMaskedTransformerLayer, parameter_groups
from tests.support.module_inputs import WIDTH, tensors
from tests.support.ranks import in_processes

pytestmark = pytest.mark.promise("modules")
H = 4
START = [32.0, 16.0, 8.0, 4.0]
MODULES = {
    "attention": lambda: SoftMaskedAttention(WIDTH, H),
    "constant alpha": lambda: SoftMaskedAttention(WIDTH, H, learnable_alpha=False),
    "layer": lambda: SoftMaskedTransformerLayer(WIDTH, H),
    "drop-in": lambda: SoftMaskedMultiheadAttention.from_module(nn.MultiheadAttention(WIDTH, H)),
    "drop-in, constant alpha": lambda: SoftMaskedMultiheadAttention.from_module(nn.MultiheadAttention(WIDTH, H), None, False),
}
every_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


def alpha_of(module):
    (alpha,) = (m.scaling_factors for m in module.modules() if isinstance(getattr(m, "scaling_factors", None), torch.Tensor))
    return alpha


def on_meta_and_back(make):
    with torch.device("meta"):
        module = make()
    module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(float("nan"))
    return module


@every_module
def test_after_the_meta_device_one_call_starts_everything_again(make):
    module = on_meta_and_back(make)
    module.reset_parameters()
    assert alpha_of(module).tolist() == START
    assert all(tensor.isfinite().all() for tensor in (*module.parameters(), *module.buffers()))


@every_module
def test_after_the_meta_device_every_module_starts_its_own_parameters_again(make):
    """FSDP asks each module that has parameters of its own, the outer one first."""
    module = on_meta_and_back(make)
    for one in module.modules():
        if any(True for _ in (*one.parameters(recurse=False), *one.buffers(recurse=False))):
            one.reset_parameters()
    assert alpha_of(module).tolist() == START
    assert all(tensor.isfinite().all() for tensor in (*module.parameters(), *module.buffers()))


def test_the_start_is_the_constructors():
    module = SoftMaskedAttention(WIDTH, 2, alpha_init=[1.5, 2.5])
    before = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    module.reset_parameters()
    assert module.scaling_factors.tolist() == [1.5, 2.5] and not module.q_proj.bias.any()
    bound = (6 / (2 * WIDTH)) ** 0.5
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        weight, first = getattr(module, name).weight, before[f"{name}.weight"]
        assert max(weight.abs().max(), first.abs().max()) <= bound < 1.1 * min(weight.abs().max(), first.abs().max())


def fully_sharded(rank, world):
    """alpha and whether everything is finite, after meta-device initialisation under FSDP1 and FSDP2."""
    found = []
    with torch.device("meta"):
        first, second = SoftMaskedTransformerLayer(WIDTH, H), SoftMaskedTransformerLayer(WIDTH, H)
    first = FullyShardedDataParallel(first, device_id=torch.device("cpu"), use_orig_params=True)
    with FullyShardedDataParallel.summon_full_params(first):
        found.append({name: p.detach().clone() for name, p in first.named_parameters()})
    fully_shard(second, mesh=init_device_mesh("cpu", (world,)))
    second.to_empty(device="cpu")
    second.reset_parameters()
    found.append({name: p.full_tensor().detach() for name, p in second.named_parameters()})
    return found


def test_alpha_is_there_after_fsdp_made_the_module_from_meta(tmp_path):
    for ranks in zip(*in_processes(fully_sharded, 2, tmp_path), strict=True):
        for parameters in ranks:
            (alpha,) = (p for name, p in parameters.items() if name.endswith("scaling_factors"))
            assert alpha.tolist() == START and all(p.isfinite().all() for p in parameters.values())


def tensor_parallel(rank, world):
    """What modules whose projections are split over the heads compute, and what they should."""
    mesh = init_device_mesh("cpu", (world,))
    plan = {"q_proj": ColwiseParallel(), "k_proj": ColwiseParallel(), "v_proj": ColwiseParallel(), "out_proj": RowwiseParallel()}
    query, features, mask = (tensor.detach() for tensor in tensors())
    found = []
    for kind in (HardMaskedAttention, SoftMaskedAttention):
        torch.manual_seed(0)
        module = kind(WIDTH, H)
        expected = module(query, features, features, mask).detach()
        parallelize_module(module, mesh, plan)
        if kind is SoftMaskedAttention:
            with pytest.raises(ValueError, match="alpha: expected"):
                module(query, features, features, mask)
            module.scaling_factors = nn.Parameter(module.scaling_factors.detach().chunk(world)[rank])
        found.append((module(query, features, features, mask).detach() + 0, expected))  # the sum waits for the ranks
    return found


def test_projections_split_over_heads_are_right_or_refused(tmp_path):
    for pairs in in_processes(tensor_parallel, 2, tmp_path):
        for got, expected in pairs:
            torch.testing.assert_close(got, expected)


@every_module
@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half, lambda m: m.to(torch.bfloat16), lambda m: m.type(torch.half)])
def test_a_cast_to_16_bits_leaves_alpha_in_float32(make, cast):
    module = make()
    alpha = alpha_of(module)
    with torch.no_grad():
        alpha.add_(1e-3)
    if alpha.requires_grad:
        alpha.grad = torch.ones(H)
    before = alpha.detach().clone()
    cast(module)
    after = alpha_of(module)
    assert after.dtype == torch.float32 and torch.equal(after, before)
    assert {p.dtype.itemsize for p in module.parameters() if p is not after} == {2}
    assert after.grad is None or after.grad.dtype == torch.float32


def test_a_module_in_bfloat16_moves_alpha_by_small_steps():
    module = SoftMaskedAttention(WIDTH, H).bfloat16()
    query, features, mask = (tensor.detach().bfloat16() for tensor in tensors())
    optimizer = torch.optim.SGD(parameter_groups(module, alpha_lr=1e-3), lr=0.0)
    module(query, features, features, mask.float()).square().sum().backward()
    optimizer.step()
    assert (module.scaling_factors != torch.tensor(START)).all() and alpha_of(module.double()).dtype == torch.float64


class Exponential(nn.Module):
    def forward(self, x):
        return x.exp()

    def right_inverse(self, alpha):
        return alpha.log()


def test_a_parametrized_alpha_has_its_own_group_precision_and_start():
    layer = SoftMaskedTransformerLayer(WIDTH, H)
    parametrize.register_parametrization(layer.cross_attention, "scaling_factors", Exponential())
    original = layer.cross_attention.parametrizations.scaling_factors.original
    others, alphas = parameter_groups(layer, alpha_lr=0.1)
    assert [id(p) for p in alphas["params"]] == [id(original)] and alphas["weight_decay"] == 0
    assert id(original) not in {id(p) for p in others["params"]}
    torch.optim.AdamW([others, alphas], lr=1e-3)
    layer.bfloat16()
    assert original.dtype == torch.float32 and layer.cross_attention.q_proj.weight.dtype == torch.bfloat16
    with torch.no_grad():
        original.zero_()
    layer.reset_parameters()
    torch.testing.assert_close(layer.cross_attention.scaling_factors, torch.tensor(START))
