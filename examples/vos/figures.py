"""Clips by rule that are more like real video: a figure of swinging parts before a long ground that the camera passes, with light and blur.

    python -m examples.vos.figures --out build/figures

Some of what comes into view later has the figure's own colours. That is what the first frame cannot teach.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from examples.shared.commands import Positive, cli

from .synthetic import Thing, ground, thing, write_clips

PARTS, PATCHES = 6, 14
EXPOSURE = (0.0, 0.25, 0.5)  # The times within a frame that are averaged; the label is of the middle one.


def figure(rng: np.random.Generator, frames: int, height: int, width: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The pictures, uint8 (H, W, 3), and labels, uint8 (H, W) with 1 = the figure, of one clip."""
    parts = [_part(i, rng) for i in range(PARTS)]
    world = _world(rng, height, 3 * width, np.stack([part.colours for part in parts]))
    begin, pan = rng.uniform(0, 0.5) * width, rng.uniform(0.02, 0.04) * width
    light, growth = rng.uniform(-0.25, 0.25), rng.uniform(-0.008, 0.008)
    centre, wander, pace = np.array([0.5, 0.5 * width / height]), rng.uniform(0.02, 0.1, 2), rng.uniform(0.05, 0.25, 2)
    radius = np.append(0, rng.uniform(0.13, 0.24, PARTS - 1))  # The first part is the trunk.
    base, swing, rate = rng.uniform(0, 2 * np.pi, PARTS), rng.uniform(0.2, 1.0, PARTS), rng.uniform(0.1, 0.4, PARTS)
    pictures, labels = [], []
    for t in range(frames):
        exposed = []
        for time in t + np.array(EXPOSURE):
            picture = np.roll(world, -int(begin + pan * time), 1)[:, :width].copy()
            shown = np.zeros((height, width), bool)
            angle, scale = base + swing * np.sin(rate * time + np.arange(PARTS)), 1 + growth * time
            for i in (1, 2, 3, 0, 4, 5):  # Three parts lie behind the trunk and two before it.
                place = centre + wander * np.sin(pace * time) + scale * radius[i] * np.array([np.sin(angle[i]), np.cos(angle[i])])
                shown |= replace(parts[i], place=place, size=scale * parts[i].size).draw(picture, time)
            exposed.append((picture, shown))
        picture = np.mean([picture for picture, _ in exposed], 0) * (1 + light * np.sin(0.1 * t)) + rng.normal(0, 0.02, (height, width, 3))
        pictures.append((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))
        labels.append(exposed[1][1].astype(np.uint8))
    return pictures, labels


def _part(i: int, rng: np.random.Generator) -> Thing:
    size = rng.uniform(0.1, 0.14) if i == 0 else rng.uniform(0.045, 0.08)
    return replace(thing(rng, 1, 1), size=size, speed=np.zeros(2), growth=0.0, turn=rng.normal(0, 0.05), pitch=rng.uniform(5, 60))


def _world(rng: np.random.Generator, height: int, width: int, colours: np.ndarray) -> np.ndarray:
    """A ground with striped patches, (H, W, 3). Two patches in five are near one of the figure's colours, which are (PARTS, 2, 3)."""
    world, (y, x) = ground(rng, height, width), np.mgrid[:height, :width]
    for _ in range(PATCHES):
        tall, wide = rng.uniform(0.1, 0.5) * height, rng.uniform(0.02, 0.2) * width
        inside = (abs(y - rng.uniform(0, height)) < tall / 2) & (abs(x - rng.uniform(0, width)) < wide / 2)
        near = np.clip(colours[rng.integers(PARTS)] + rng.normal(0, 0.1, (1, 3)), 0, 1)
        first, second = near if rng.uniform() < 0.4 else rng.uniform(0, 1, (2, 3))
        tilt, pitch = rng.uniform(0, np.pi), rng.uniform(0.05, 0.5)
        mix = (0.5 + 0.5 * np.sin(pitch * (x * np.cos(tilt) + y * np.sin(tilt))))[..., None]
        world[inside] = (mix * first + (1 - mix) * second)[inside]
    return world


def main(out: Path, clips: Positive = 6) -> None:
    """Write clips of one figure each in DAVIS layout, all of them to train on.

    Args:
        out: The folder to write.
        clips: How many.
    """
    write_clips(out, clips, 0, 35, 128, 224, make=figure)


if __name__ == "__main__":
    cli(main)
