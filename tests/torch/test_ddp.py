"""Composes with DistributedDataParallel: two processes average the gradients that one process has on the whole batch."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from smattn import soft_masked_attention
from tests.support.expected import DEVICE, names

pytestmark = [pytest.mark.promise("composes"), pytest.mark.slow]
WORLD, B, NQ, NK, WIDTH, H = 2, 4, 3, 9, 8, 2


class Tiny(nn.Module):
    """Projections, a learned alpha and a learned mask around one call."""

    def __init__(self, backend):
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.alpha = nn.Parameter(torch.tensor([4.0, 2.0]))
        self.logits = nn.Parameter(torch.randn(1, NQ, NK))
        self.backend = backend

    def forward(self, queries, keys):
        q, k, v = (p(x).unflatten(-1, (H, -1)).transpose(1, 2) for p, x in zip(self.project, (queries, keys, keys), strict=True))
        return soft_masked_attention(q, k, v, self.logits.sigmoid(), self.alpha, backend=self.backend).square().mean()


def batch():
    g = torch.Generator().manual_seed(1)
    return torch.randn(B, NQ, WIDTH, generator=g).to(DEVICE), torch.randn(B, NK, WIDTH, generator=g).to(DEVICE)


def worker(rank, folder, backend):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    module = nn.parallel.DistributedDataParallel(Tiny(backend).to(DEVICE))
    for _ in range(2):  # DDP has rebuilt its buckets for the second iteration
        module.zero_grad()
        module(*(t.chunk(WORLD)[rank] for t in batch())).backward()
    torch.save({name: p.grad for name, p in module.module.named_parameters()}, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", names())
def test_two_processes_have_the_gradients_of_one(name, tmp_path):
    mp.spawn(worker, (str(tmp_path), name), nprocs=WORLD)
    module = Tiny(name).to(DEVICE)
    module(*batch()).backward()
    for rank in range(WORLD):
        grads = torch.load(tmp_path / f"{rank}.pt")
        assert grads.keys() == dict(module.named_parameters()).keys()
        for parameter, p in module.named_parameters():
            torch.testing.assert_close(grads[parameter], p.grad)
