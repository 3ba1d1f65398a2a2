"""Cycles that start and end at the annotated frame. In between the masks are the network's own, and the gradient flows through them.

A route is a list of steps (frames read, frame predicted). The one loss is on the last prediction: of frame 0 in another view, or of the
objects of that view on the ground of frame 1.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from .batches import Batch
from .model import VOS

Route = tuple[tuple[tuple[int, ...], int], ...]

AGAIN, PASTED = 3, 4  # The images of a batch that show frame 0 in another view, and its objects on frame 1.
SELF: Route = (((0,), AGAIN),)
THERE_AND_BACK: Route = (((0,), 1), ((1,), AGAIN))
CHAIN: Route = (((0,), 1), ((1,), 2), ((2,), 1), ((1,), AGAIN))
HISTORY: Route = (((0,), 1), ((0, 1), 2), ((2,), 1), ((1, 2), AGAIN))


def on_other_ground(route: Route) -> Route:
    """The route with its end on the pasted picture."""
    return *route[:-1], (route[-1][0], PASTED)


CYCLES: dict[str, tuple[tuple[Route, ...], ...]] = {  # name -> the routes of a step, taken in turn
    "all": ((SELF, THERE_AND_BACK), (SELF, CHAIN), (SELF, HISTORY)),
    "long": ((SELF, CHAIN), (SELF, HISTORY)),
    "ground": tuple((SELF, on_other_ground(route)) for route in (THERE_AND_BACK, CHAIN, HISTORY)),
    "frame0": ((SELF,),),  # This is the baseline that sees the annotated frame alone.
}


class End(NamedTuple):
    logits: Tensor  # (B, 1 + O, 2H/s, 2W/s)
    known: Tensor | None  # bool (B, H, W): where the annotation tells the label; None stands for everywhere


def run(model: VOS, batch: Batch, routes: tuple[Route, ...]) -> list[End]:
    """Walk each route; returns what it ends with."""
    frames = {t: model.features(batch.images[:, t]) for t in {0} | {target for route in routes for _, target in route}}
    annotated = model.encode(frames[0], batch.mask, batch.present)
    ends = []
    for route in routes:
        descriptors, masks = {0: annotated}, []
        for sources, target in route:
            logits = model.decode([descriptors[s] for s in sources], batch.present, frames[target])
            if target < AGAIN:
                masks.append(soft_masks(logits))
                descriptors[target] = model.encode(frames[target], masks[-1], batch.present)
        ends.append(End(logits, known(masks[0], batch.mask_again) if target == PASTED else None))  # Every route goes to frame 1 first.
    return ends


def soft_masks(logits: Tensor) -> Tensor:
    """Object masks (B, O, h, w) in [0, 1]. All channels compete in one softmax."""
    return logits.softmax(1)[:, 1:]


def known(masks: Tensor, pasted: Tensor) -> Tensor:
    """Where the labels of a pasted picture are known, bool (B, H, W).

    They are known on what was pasted, (B, O, H, W), and on the ground well away from where frame 1 may show objects of its own, which its
    predicted masks (B, O, h, w) tell.
    """
    H, W = pasted.shape[-2:]
    own = F.interpolate(masks.detach().sum(1, keepdim=True), (H, W), mode="bilinear")
    near = F.max_pool2d(own, 2 * (H // 16) + 1, stride=1, padding=H // 16)[:, 0]
    return pasted.any(1) | (near < 0.3)
