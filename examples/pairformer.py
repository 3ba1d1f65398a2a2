"""A pair block, as in AlphaFold's Evoformer and Pairformer, completes a table of distances, and its triangle bias learns.

Points lie on a random closed curve. A seventh of their table of distances is shown, in bins; a network is to fill in the rest. Each
row i of the table attends along itself: edge (i, j) reads the edges (i, k). Which of them help is for the third side to say, edge (j, k):
where j is near k, k is as far from i as j is. No query and no key of row i knows that side. Only the bias does, which is one for all rows
and made of the whole table. The same network is trained

    learned     with the bias of each head a linear map of the table
    none        without a bias, so that attention never sees the third side

    python -m examples.pairformer           # trains 3 seeds of each and writes examples/results/pairformer.csv and .png
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import smattn
from examples.shared.commands import Positive, cli
from examples.shared.rows import RESULTS, write
from smattn.integrations import triangle_attention

BIASES = ("learned", "none")
POINTS, BINS, SHOWN = 24, 16, 0.15
HIDDEN = BINS  # the bin of a distance that is not shown


class Tables(NamedTuple):
    points: Tensor  # (B, POINTS, 2)
    bins: Tensor  # int64 (B, POINTS, POINTS): the distances
    shown: Tensor  # bool (B, POINTS, POINTS), symmetric

    def given(self) -> Tensor:
        return self.bins.masked_fill(~self.shown, HIDDEN)


def draw(count: int, g: torch.Generator) -> Tables:
    """Closed curves of three random harmonics, at a common scale."""
    angle = torch.arange(POINTS) * (2 * math.pi / POINTS)
    waves = torch.stack([f(m * angle) for m in (1, 2, 3) for f in (torch.cos, torch.sin)])  # (6, POINTS)
    weights = torch.randn(count, 2, 6, generator=g) / torch.tensor([1.0, 1, 2, 2, 3, 3])
    points = (weights @ waves).mT
    points = points / points.std((1, 2), keepdim=True)
    order = torch.stack([torch.randperm(POINTS, generator=g) for _ in range(count)])  # their numbers say nothing
    points = points.gather(1, order[..., None].expand(-1, -1, 2))
    distance = torch.cdist(points, points)
    bins = (distance * (BINS / 5)).long().clamp(max=BINS - 1)
    half = (torch.rand(count, POINTS, POINTS, generator=g) < SHOWN).triu(1)
    return Tables(points, bins, half | half.mT | torch.eye(POINTS, dtype=torch.bool))


class TriangleAttention(nn.Module):
    """Rows of z (B, N, N, width) attend along themselves, under a bias made of z for all of them."""

    def __init__(self, width: int, heads: int, biased: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.to_bias = nn.Linear(width, heads, bias=False) if biased else None
        self.gate, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v (B, N, H, N, D) and the bias (B, 1, H, N, N) of the normalised pairs x (B, N, N, width)."""
        q, k, v = self.project(x).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-3, -2)
        if self.to_bias is None:
            return q, k, v, x.new_zeros(len(x), 1, self.heads, *x.shape[1:3])
        return q, k, v, self.to_bias(x).movedim(-1, 1)[:, None]

    def forward(self, z: Tensor) -> Tensor:
        x = self.norm(z)
        read = triangle_attention(*self.parts(x))
        return self.out(self.gate(x).sigmoid() * read.transpose(-3, -2).flatten(-2))


class Block(nn.Module):
    """Rows, then columns, then each pair by itself."""

    def __init__(self, width: int, heads: int, biased: bool) -> None:
        super().__init__()
        self.rows, self.columns = (TriangleAttention(width, heads, biased) for _ in range(2))
        self.each = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, z: Tensor) -> Tensor:
        z = z + self.rows(z)
        z = z + self.columns(z.transpose(1, 2)).transpose(1, 2)
        return z + self.each(z)


class Network(nn.Module):
    """Bins given, HIDDEN elsewhere (B, N, N) -> logits of the bins (B, N, N, BINS)."""

    def __init__(self, biased: bool, width: int = 32, heads: int = 4, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(BINS + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads, biased) for _ in range(blocks))
        self.read = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, BINS))

    def forward(self, given: Tensor) -> Tensor:
        z = self.embed(given)
        for block in self.blocks:
            z = block(z)
        logits = self.read(z)
        return logits + logits.transpose(1, 2)


def error(logits: Tensor, tables: Tables) -> float:
    """Mean distance, in bins, between the median of the prediction and the truth, over what was not shown."""
    median = (logits.softmax(-1).cumsum(-1) < 0.5).sum(-1)
    return (median - tables.bins).abs()[~tables.shown].float().mean().item()


class Row(NamedTuple):
    bias: str
    seed: int
    step: int
    error: float


def train(bias: str, seed: int, steps: int, batch: int = 8, every: int = 50, quiet: bool = False) -> tuple[Network, list[Row]]:
    """A network of its own seed on tables of its own seed, and its course on tables that it never saw."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    unseen = draw(32, torch.Generator().manual_seed(10_000 + seed))
    network = Network(bias == "learned")
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    rows = []
    for step in tqdm(range(steps + 1), desc=f"bias {bias}, seed {seed}", disable=quiet, leave=False):
        if step % every == 0 or step == steps:
            with torch.no_grad():
                rows.append(Row(bias, seed, step, error(network(unseen.given()), unseen)))
        if step == steps:
            break
        tables = draw(batch, g)
        logits = network(tables.given())
        loss = nn.functional.cross_entropy(logits[~tables.shown], tables.bins[~tables.shown])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network, rows


def table(rows: list[Row]) -> str:
    """Markdown: median over seeds of the first and the last error, lowest and highest of the last in brackets."""
    lines = ["| bias | seeds | error before training, bins | after |", "| --- " * 4 + "|"]
    for bias in dict.fromkeys(row.bias for row in rows):
        own = [row for row in rows if row.bias == bias]
        first, final = ([row.error for row in own if row.step == step] for step in (0, max(row.step for row in own)))
        after = f"{statistics.median(final):.2f} [{min(final):.2f}, {max(final):.2f}]"
        lines.append(f"| {bias} | {len(final)} | {statistics.median(first):.2f} | {after} |")
    return "\n".join(lines)


class Seen(NamedTuple):
    """What a network makes of one table, and the first rows' attention of its first block."""

    filled: Tensor  # (N, N)
    error: float
    bias: Tensor  # (N, N), of the head whose bias varies most
    attention: Tensor  # (N, N): how much edge (i, j) reads of edge (i, k) there, the mean over the rows i


@torch.no_grad()
def see(network: Network, tables: Tables) -> Seen:
    """tables: one table."""
    logits, first = network(tables.given()), network.blocks[0].rows
    q, k, _, bias = first.parts(first.norm(network.embed(tables.given())))
    head = bias[0, 0].std((1, 2)).argmax()
    chosen = torch.eye(first.heads)[head]
    attention = smattn.attention_map(q, k, bias, 1.0, head_weights=chosen)[0].mean(0)
    return Seen(tables.bins.where(tables.shown, logits.argmax(-1))[0], error(logits, tables), bias[0, 0, head], attention)


def plot(rows: list[Row], networks: dict[str, Network], path: Path) -> None:
    """The error over steps, every seed; beside it a table that no network saw, what each makes of it, a head's bias, and where it looks."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplot_mosaic(
        [["error", "curve", "truth", "given", "bias"], ["error", *networks, "attention none", "attention learned"]],
        figsize=(13, 4.6), width_ratios=[1.6, 1, 1, 1, 1], layout="constrained",
    )  # fmt: skip
    for colour, bias in enumerate(networks):
        courses = [[row for row in rows if (row.bias, row.seed) == (bias, seed)] for seed in sorted({row.seed for row in rows})]
        for seed, course in enumerate(courses):
            label = f"bias {bias}" if seed == 0 else None
            axes["error"].plot([row.step for row in course], [row.error for row in course], f"C{colour}", alpha=0.7, label=label)
    axes["error"].set(xlabel="step", ylabel="error of what is not shown, bins", ylim=(0, None))
    axes["error"].legend()

    tables = draw(1, torch.Generator().manual_seed(10_000))
    around = tables.points[0, :, 1].atan2(tables.points[0, :, 0]).argsort()  # in the order of the curve, to be seen
    seen = {bias: see(network, tables) for bias, network in networks.items()}
    pictures = {"truth": ("the distances", tables.bins[0]), "given": ("shown", tables.bins.where(tables.shown, torch.nan)[0])}
    for bias, one in seen.items():
        pictures[bias] = (f"filled in, bias {bias}: error {one.error:.1f}", one.filled)
        pictures[f"attention {bias}"] = (f"its attention, bias {bias}", one.attention)
    pictures["bias"] = ("a head's bias in block 1", seen["learned"].bias)
    for name, (title, picture) in pictures.items():
        of_pairs = name in ("truth", "given", *networks)
        scale = dict(cmap="viridis", vmin=0, vmax=BINS) if of_pairs else dict(cmap="magma")
        axes[name].imshow(picture[around][:, around].numpy(), **scale)
        axes[name].set(xticks=[], yticks=[])
        axes[name].set_title(title, fontsize=9)
    axes["curve"].plot(*tables.points[0, [*around, around[0]]].T, "o-", markersize=3, linewidth=0.8)
    axes["curve"].set(xticks=[], yticks=[], aspect="equal")
    axes["curve"].set_title("the points", fontsize=9)
    figure.savefig(path, dpi=110)


def main(seeds: Positive = 3, steps: Positive = 300, out: Path = RESULTS) -> None:
    """Train all networks with each seed, and write rows and a plot.

    Args:
        seeds: How many runs of each.
        steps: How many to train.
        out: The folder to write.
    """
    rows: list[Row] = []
    networks: dict[str, Network] = {}
    for bias in BIASES:
        for seed in range(seeds):
            network, course = train(bias, seed, steps)
            rows += course
            networks.setdefault(bias, network)
    write(out / "pairformer.csv", rows, decimals=4)
    plot(rows, networks, out / "pairformer.png")
    print(table(rows))


if __name__ == "__main__":
    cli(main)
