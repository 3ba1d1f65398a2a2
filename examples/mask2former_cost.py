"""What a training step of a Mask2Former costs, its decoder alone and the whole model, before and after its masks became soft.

    pip install ".[mask2former]"
    python -m examples.mask2former_cost     # writes examples/results/mask2former_cost.csv

The model is Hugging Face's with a tiny Swin and random weights: 100 queries, 9 decoder layers, a 512 x 512 picture. The steps are timed in
turn in one process and on one thread, so that a disturbance meets both. Memory is measured in a process of its own for each. Linux only.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from examples.shared.commands import cli
from examples.shared.rows import RESULTS, write
from smattn.integrations import soften_mask2former

SIDE, OBJECTS, ROUNDS = 512, 3, 7
MASKS = ("hard, detached", "soft")


class Cost(NamedTuple):
    part: str
    masks: str
    seconds: float  # processor time of a step, the median
    ratio: float  # to the hard step of the same round: the median, and below the range
    lowest: float
    highest: float
    peak_mib: int  # of the process, less what it had before the first step


def config_of_a_tiny_swin() -> Any:
    from transformers import Mask2FormerConfig, SwinConfig

    return Mask2FormerConfig(backbone_config=SwinConfig(out_features=[f"stage{i}" for i in range(1, 5)]))


def decoder_step(soften: Callable[[Any], Any]) -> Callable[[], Tensor]:
    """A step of the transformer decoder on random features."""
    from transformers import Mask2FormerModel

    model = soften(Mask2FormerModel(config_of_a_tiny_swin()).train())
    width = model.config.hidden_dim
    levels = [torch.randn(1, width, SIDE // s, SIDE // s) for s in (32, 16, 8)]
    pixels = torch.randn(1, width, SIDE // 4, SIDE // 4)
    return lambda: model.transformer_module(levels, pixels).last_hidden_state.square().mean()


def whole_step(soften: Callable[[Any], Any]) -> Callable[[], Tensor]:
    """A step from pixels to the loss of Mask2Former, matching included."""
    from transformers import Mask2FormerForUniversalSegmentation

    model = soften(Mask2FormerForUniversalSegmentation(config_of_a_tiny_swin()).train())
    picture = torch.rand(1, 3, SIDE, SIDE)
    stripes = torch.arange(SIDE).expand(SIDE, SIDE) * OBJECTS // SIDE
    masks, classes = torch.stack([stripes == i for i in range(OBJECTS)]).float(), torch.arange(OBJECTS) % model.config.num_labels
    return lambda: model(pixel_values=picture, mask_labels=[masks], class_labels=[classes]).loss


PARTS = {"decoder": decoder_step, "whole model": whole_step}


def step_of(part: str, masks: str) -> Callable[[], Tensor]:
    """A function that computes one step's loss."""
    torch.manual_seed(0)
    return PARTS[part](soften_mask2former if masks == "soft" else lambda model: model)


def seconds_of(step: Callable[[], Tensor]) -> float:
    began = time.process_time()
    step().backward()
    return time.process_time() - began


def times(part: str) -> list[tuple[float, ...]]:
    """ROUNDS rounds of the seconds of each of MASKS, taken in turn. The first step of each does not count."""
    steps = [step_of(part, masks) for masks in MASKS]
    return [tuple(seconds_of(step) for step in steps) for _ in tqdm(range(1 + ROUNDS), desc=part)][1:]


def resident(name: str) -> int:
    """KiB that this process has in memory, "VmRSS", or had at most, "VmHWM". getrusage's maximum would count its parent's too."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])


def peak(part: str, masks: str) -> float:
    """MiB of a step, measured in this process, which does nothing else."""
    step = step_of(part, masks)
    before = resident("VmRSS")
    for _ in range(2):  # The second step has the gradients of the first beside it.
        step().backward()
    return (resident("VmHWM") - before) / 1024


def peak_of_its_own(part: str, masks: str) -> float:
    command = [sys.executable, "-m", "examples.mask2former_cost", "--peak-of", part, masks]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(part: str) -> list[Cost]:
    rounds = times(part)
    costs = []
    for i, masks in enumerate(MASKS):
        ratios = [seconds[i] / seconds[0] for seconds in rounds]
        median = statistics.median(seconds[i] for seconds in rounds)
        costs.append(Cost(part, masks, median, statistics.median(ratios), min(ratios), max(ratios), round(peak_of_its_own(part, masks))))
    return costs


def table(costs: list[Cost]) -> str:
    lines = ["| part | masks | processor seconds a step | of the hard one's | memory of the step, MiB |", "| --- " * 5 + "|"]
    for c in costs:
        ratio = "1" if c.masks == MASKS[0] else f"{c.ratio:.2f} [{c.lowest:.2f}, {c.highest:.2f}]"
        lines.append(f"| {c.part} | {c.masks} | {c.seconds:.2f} | {ratio} | {c.peak_mib} |")
    return "\n".join(lines)


def main(out: Path = RESULTS / "mask2former_cost.csv", peak_of: tuple[str, str] | None = None) -> None:
    """Measure a training step of a Mask2Former, its decoder alone and the whole model, with hard masks and with soft ones.

    Args:
        out: The file to write.
        peak_of: Print the memory of this part under these masks alone, and write nothing.
    """
    torch.set_num_threads(1)
    if peak_of:
        print(peak(*peak_of))
        return
    costs = [cost for part in PARTS for cost in measure(part)]
    write(out, costs, decimals=3)
    print(table(costs))


if __name__ == "__main__":
    cli(main)
