"""A clip set made by rule, in DAVIS layout: textured objects that move, turn and grow, look-alikes that are not annotated, bars in front.

    python -m examples.vos.synthetic --out build/clips
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from examples.shared.commands import Positive, SettingError, cli
from examples.shared.images import save_index

from .data import RESOLUTION, YEAR

DRAWS = 100  # Most clips that are drawn for one in which each object can be seen.


@dataclass
class Thing:
    """A blob with its own texture on its own path. Positions and sizes are in units of the picture's height."""

    waves: np.ndarray  # (2, 3): amplitudes and phases of the outline
    colours: np.ndarray  # (2, 3): the texture goes between them
    pitch: float
    tilt: float
    place: np.ndarray  # (2,)
    speed: np.ndarray  # (2,) a frame
    turn: float  # radians a frame
    size: float
    growth: float  # a frame

    def draw(self, picture: np.ndarray, t: int) -> np.ndarray:
        """Paint the thing into a picture (H, W, 3) as it is at frame t; returns where it is, bool (H, W)."""
        H, W = picture.shape[:2]
        room = np.array([1.0, W / H])
        place = np.abs((self.place + t * self.speed + room) % (2 * room) - room)  # It bounces off the walls.
        y, x = (np.mgrid[:H, :W] + 0.5) / H - place[:, None, None]
        angle = np.arctan2(y, x) - t * self.turn
        outline = 1 + sum(a * np.sin((k + 2) * angle + phase) for k, (a, phase) in enumerate(self.waves.T))
        distance = np.hypot(y, x)
        inside = distance < self.size * (1 + self.growth * t) * outline
        own = distance * np.sin(angle - self.tilt)  # The texture turns with it.
        mix = (0.5 + 0.5 * np.sin(self.pitch * own))[..., None]
        picture[inside] = (mix * self.colours[0] + (1 - mix) * self.colours[1])[inside]
        return inside


def thing(rng: np.random.Generator, width: float, size: float) -> Thing:
    """Draw a thing at random. width: of the picture, in units of its height; size: a factor on the usual size."""
    return Thing(
        waves=np.stack([rng.uniform(0, 0.18, 3), rng.uniform(0, 2 * np.pi, 3)]),
        colours=rng.uniform(0, 1, (2, 3)),
        pitch=rng.uniform(25, 70),
        tilt=rng.uniform(0, np.pi),
        place=rng.uniform(0.2, 0.8, 2) * [1, width],
        speed=rng.normal(0, 0.03, 2),
        turn=rng.normal(0, 0.06),
        size=size * rng.uniform(0.13, 0.22),
        growth=rng.uniform(-0.02, 0.02),
    )


def look_alike(of: Thing, rng: np.random.Generator, width: float) -> Thing:
    """A thing with the texture and size of another one and nearly its colours, on its own path."""
    other = thing(rng, width, 1)
    other.colours = np.clip(of.colours + rng.normal(0, 0.15, (1, 3)), 0, 1)
    other.pitch, other.tilt, other.size = of.pitch, of.tilt, of.size
    return other


def clip(rng: np.random.Generator, frames: int, height: int, width: int, size: float = 1) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The pictures, uint8 (H, W, 3), and labels, uint8 (H, W) with 0 = background, of a clip whose first frame shows each object.

    size: a factor on the size of all things.
    """
    for _ in range(DRAWS):
        aspect = width / height
        objects = [thing(rng, aspect, size) for _ in range(rng.integers(1, 4))]
        distractors = [look_alike(objects[0], rng, aspect)] + [thing(rng, aspect, size) for _ in range(rng.integers(0, 2))]
        bars = [(rng.uniform(0.2, 0.8) * width, rng.uniform(0.03, 0.07) * height, rng.uniform(0, 1, 3)) for _ in range(rng.integers(0, 3))]
        scene = ground(rng, height, width)
        pictures, labels = [], []
        for t in range(frames):
            picture, label = np.roll(scene, t, 1).copy(), np.zeros((height, width), np.uint8)
            for other in distractors:
                other.draw(picture, t)
            for index, one in enumerate(objects, 1):
                label[one.draw(picture, t)] = index
            for at, thickness, colour in bars:
                covered = np.abs(np.arange(width) + 0.5 - at) < thickness
                picture[:, covered], label[:, covered] = colour, 0
            noisy = picture + rng.normal(0, 0.02, picture.shape)
            pictures.append((np.clip(noisy, 0, 1) * 255).round().astype(np.uint8))
            labels.append(label)
        sizes = np.bincount(labels[0].ravel(), minlength=len(objects) + 1)[1:]
        if sizes.min() > 0.01 * size**2 * height * width:
            return pictures, labels
    raise SettingError(f"--size: of {DRAWS} clips of {width}x{height} none shows each of its objects, expected less than {size}")


Make = Callable[[np.random.Generator, int, int, int], tuple[list[np.ndarray], list[np.ndarray]]]  # called with frames, height, width


def write_clips(
    out: Path, train: int = 60, val: int = 20, frames: int = 12, height: int = 64, width: int = 96, seed: int = 0, make: Make = clip
) -> None:
    """Write clips, each with a seed of its own, in DAVIS layout under `out`. All frames are annotated; training does not read those."""
    names = {split: [f"{split}-{i:03}" for i in range(count)] for split, count in (("train", train), ("val", val))}
    sets = out / "ImageSets" / YEAR
    sets.mkdir(parents=True, exist_ok=True)
    for split, those in names.items():
        (sets / f"{split}.txt").write_text("".join(f"{name}\n" for name in those))
    for i, name in enumerate(tqdm(names["train"] + names["val"], desc="clips")):
        pictures, labels = make(np.random.default_rng([seed, i]), frames, height, width)
        folders = [out / kind / RESOLUTION / name for kind in ("JPEGImages", "Annotations")]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for t, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
            Image.fromarray(picture).save(folders[0] / f"{t:05}.jpg", quality=95)
            save_index(label, folders[1] / f"{t:05}.png")


def ground(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A ground (H, W, 3) of a few waves in each channel, which repeats to the right."""
    y, x = np.mgrid[:height, :width]
    ground = np.full((height, width, 3), rng.uniform(0.3, 0.7, 3))
    for _ in range(6):
        phase = 2 * np.pi * (rng.integers(-4, 5) * x / width + rng.uniform(-4, 4) * y / height) + rng.uniform(0, 2 * np.pi)
        ground += 0.07 * np.sin(phase)[..., None] * rng.normal(0, 1, 3)
    return ground


def main(
    out: Path, train: int = 60, val: int = 20, frames: Positive = 12, height: Positive = 64, width: Positive = 96, seed: int = 0,
    size: float = 1,
) -> None:  # fmt: skip
    """Write a synthetic clip set in DAVIS layout.

    Args:
        out: The folder to write.
        train: The number of clips to train on.
        val: The number of clips to judge by.
        frames: Of a clip.
        height: Of a frame, in pixels.
        width: Of a frame, in pixels.
        seed: Decides all clips.
        size: A factor on the usual size of the objects.
    """
    write_clips(out, train, val, frames, height, width, seed, make=partial(clip, size=size))


if __name__ == "__main__":
    cli(main)
