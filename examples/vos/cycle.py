"""Cycles that start and end at the annotated frame. Between, masks are the network's own, and the gradient flows through them.

A route is a list of steps (frames read, frame predicted). The one loss is on the last prediction, of frame 0 in another view.
"""

from __future__ import annotations

from torch import Tensor

from .batches import Batch
from .model import VOS

Route = tuple[tuple[tuple[int, ...], int], ...]

AGAIN = 3  # frame 0 in another view: see batches.py
SELF: Route = (((0,), AGAIN),)
THERE_AND_BACK: Route = (((0,), 1), ((1,), AGAIN))
CHAIN: Route = (((0,), 1), ((1,), 2), ((2,), 1), ((1,), AGAIN))
HISTORY: Route = (((0,), 1), ((0, 1), 2), ((2,), 1), ((1, 2), AGAIN))

CYCLES: dict[str, tuple[tuple[Route, ...], ...]] = {  # the routes of a step, taken in turn
    "all": ((SELF, THERE_AND_BACK), (SELF, CHAIN), (SELF, HISTORY)),
    "long": ((SELF, CHAIN), (SELF, HISTORY)),
    "frame0": ((SELF,),),  # the baseline that sees the annotated frame alone
}


def run(model: VOS, batch: Batch, routes: tuple[Route, ...]) -> list[Tensor]:
    """For each route the logits (B, 1 + O, 2H/s, 2W/s) that it ends with."""
    frames = {t: model.features(batch.images[:, t]) for t in {0} | {target for route in routes for _, target in route}}
    annotated = model.encode(frames[0], batch.mask, batch.present)
    ends = []
    for route in routes:
        descriptors = {0: annotated}
        for sources, target in route:
            logits = model.decode([descriptors[s] for s in sources], batch.present, frames[target])
            if target != AGAIN:
                descriptors[target] = model.encode(frames[target], soft_masks(logits), batch.present)
        ends.append(logits)
    return ends


def soft_masks(logits: Tensor) -> Tensor:
    """Object masks (B, O, h, w) in [0, 1]: all channels compete in one softmax."""
    return logits.softmax(1)[:, 1:]
