"""Region overlap J, boundary agreement F, and J&F, as the DAVIS benchmark defines them (Perazzi et al. 2016, Pont-Tuset et al. 2017)."""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torch.nn import functional as F

BOUND = 0.008  # Boundaries agree within this share of the picture's diagonal.
RECALLED = 0.5  # A frame whose score is above this is recalled.


def region(predicted: Tensor, true: Tensor) -> float:
    """J, the intersection over union of bool masks (H, W). It is 1 where both are empty."""
    union = (predicted | true).sum().item()
    return (predicted & true).sum().item() / union if union else 1.0


def boundary(predicted: Tensor, true: Tensor, bound: float = BOUND) -> float:
    """F, the harmonic mean of the shares of each boundary that lie within a tolerance of the other's. Both are bool masks (H, W)."""
    radius = math.ceil(bound * math.hypot(*true.shape))
    edge, true_edge = edges(predicted), edges(true)
    if not edge.any() and not true_edge.any():
        return 1.0
    if not edge.any() or not true_edge.any():
        return 0.0  # Either precision or recall is 0.
    precision = (edge & dilated(true_edge, radius)).sum().item() / edge.sum().item()
    recall = (true_edge & dilated(edge, radius)).sum().item() / true_edge.sum().item()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def edges(mask: Tensor) -> Tensor:
    """The pixels that differ from a neighbour to the right, below or diagonally below, bool (H, W). The last row and column repeat."""
    padded = F.pad(mask[None].float(), (0, 1, 0, 1), mode="replicate")[0].bool()
    east, south, south_east = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask ^ east) | (mask ^ south) | (mask ^ south_east)


def dilated(mask: Tensor, radius: int) -> Tensor:
    """The pixels within `radius` of a mask that is not empty, bool (H, W)."""
    return torch.from_numpy(distance_transform_edt(~mask.numpy()) <= radius)


class Score(NamedTuple):
    clip: str
    frame: int
    object: int  # from 1
    J: float
    F: float


def frame_scores(clip: str, frame: int, predicted: Tensor, true: Tensor) -> list[Score]:
    """The score of every object. predicted has the label of each pixel (H, W), true is one-hot (O, H, W)."""
    return [
        Score(clip, frame, o, region(predicted == o, mask.bool()), boundary(predicted == o, mask.bool())) for o, mask in enumerate(true, 1)
    ]


def mean_scores(scores: list[Score]) -> tuple[float, float, float]:
    """J&F, J and F in percent, averaged over each object's frames and then over the objects of all clips."""
    objects: dict[tuple[str, int], list[Score]] = {}
    for score in scores:
        objects.setdefault((score.clip, score.object), []).append(score)
    means = [[sum(s.J for s in frames) / len(frames), sum(s.F for s in frames) / len(frames)] for frames in objects.values()]
    J, F_ = (100 * sum(column) / len(means) for column in zip(*means, strict=True))
    return (J + F_) / 2, J, F_


def official(scores: list[Score]) -> dict[str, float]:
    """The columns of DAVIS's own table, in percent: mean, recall and decay of J and F over each object's frames, averaged over objects."""
    objects: dict[tuple[str, int], list[Score]] = {}
    for score in sorted(scores, key=lambda score: score.frame):
        objects.setdefault((score.clip, score.object), []).append(score)
    columns = {}
    for name in ("J", "F"):
        values = [[getattr(score, name) for score in frames] for frames in objects.values()]
        columns[f"{name}-Mean"] = 100 * statistics.mean(statistics.mean(v) for v in values)
        columns[f"{name}-Recall"] = 100 * statistics.mean(statistics.mean(one > RECALLED for one in v) for v in values)
        columns[f"{name}-Decay"] = 100 * statistics.mean(decay(v) for v in values)
    return {"J&F-Mean": (columns["J-Mean"] + columns["F-Mean"]) / 2, **columns}


def decay(values: list[float]) -> float:
    """The mean over the first quarter of an object's frames less that over the last. Neighbouring quarters share the frame between them."""
    end, start = (math.floor(share * (len(values) - 1) + 0.5) for share in (0.25, 0.75))
    return statistics.mean(values[: end + 1]) - statistics.mean(values[start:])
