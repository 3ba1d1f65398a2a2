"""Scenes made by rule, in VOC layout: textured blobs of six classes that occur in pairs, with borders to be ignored.

    python -m examples.wsss.synthetic --out build/scenes

The two classes of a pair are next in hue and occur together as often as not. Only the scenes that show one without the other tell which of
them is where.
"""

from __future__ import annotations

import colorsys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import generate_binary_structure, maximum_filter, minimum_filter
from tqdm import tqdm

from examples.shared.commands import cli
from examples.shared.images import save_index

from .data import IGNORE

CLASSES = ("stripes", "checks", "rings", "dots", "waves", "grain")  # The pairs are 0 and 1, 2 and 3, 4 and 5.
PAIRS = len(CLASSES) // 2
TOGETHER = 0.5  # the probability that a pair shows both its classes


def scene(rng: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """A picture uint8 (side, side, 3), its index uint8 (side, side) with borders, and its classes, each of which shows."""
    while True:
        labels = _choose(rng)
        picture, index = _ground(rng, side), np.zeros((side, side), np.uint8)
        for label in rng.permutation(labels):
            inside, across, along = _blob(rng, side)
            mix = _texture(label, across, along, rng)[..., None]
            light, dark = _colours(rng, label)
            picture[inside] = (mix * light + (1 - mix) * dark)[inside]
            index[inside] = label + 1
        sizes = np.bincount(index.ravel(), minlength=len(CLASSES) + 1)[[label + 1 for label in labels]]
        if sizes.min() > 0.03 * side**2:
            noisy = picture + rng.normal(0, 0.03, picture.shape)
            index[_borders(index)] = IGNORE
            return (np.clip(noisy, 0, 1) * 255).round().astype(np.uint8), index, labels


def _choose(rng: np.random.Generator) -> list[int]:
    """The classes of a scene, of one pair or two."""
    labels: list[int] = []
    for pair in rng.choice(PAIRS, rng.integers(1, 3), replace=False):
        both = [2 * int(pair), 2 * int(pair) + 1]
        labels += both if rng.random() < TOGETHER else [both[rng.integers(2)]]
    return sorted(labels)


def _blob(rng: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where a blob is, bool, and turned coordinates in pixels from its middle, all (side, side)."""
    y, x = np.mgrid[:side, :side] + 0.5 - (rng.uniform(0.2, 0.8, 2) * side)[:, None, None]
    angle = np.arctan2(y, x)
    outline = 1 + sum(rng.uniform(0, 0.15) * np.sin((k + 2) * angle + rng.uniform(0, 2 * np.pi)) for k in range(3))
    inside = np.hypot(y, x) < rng.uniform(0.16, 0.27) * side * outline
    turn = rng.uniform(0, np.pi)
    return inside, np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x


def _texture(label: int, u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The texture of a class in [0, 1], with a period of 5 to 8 pixels."""
    k = 2 * np.pi / rng.uniform(5, 8)
    waves = {
        "stripes": lambda: np.sin(k * u),
        "checks": lambda: np.sign(np.sin(k * u) * np.sin(k * v)),
        "rings": lambda: np.sin(k * np.hypot(u, v)),
        "dots": lambda: 2.0 * (np.cos(k * u) + np.cos(k * v) > 0.9) - 1,
        "waves": lambda: np.sin(k * u + 2 * np.sin(0.6 * k * v)),
        "grain": lambda: rng.uniform(-1, 1, u.shape),
    }
    return 0.5 + 0.5 * waves[CLASSES[label]]()


def _colours(rng: np.random.Generator, label: int) -> tuple[np.ndarray, np.ndarray]:
    """A light and a dark colour of the class's hue."""
    hue = label / len(CLASSES) + rng.normal(0, 0.025)
    light, dark = (colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.5, 0.9), value) for value in (rng.uniform(0.8, 1), rng.uniform(0.2, 0.4)))
    return np.array(light), np.array(dark)


def _ground(rng: np.random.Generator, side: int) -> np.ndarray:
    """A ground of a few broad waves in each channel, (side, side, 3)."""
    y, x = np.mgrid[:side, :side] / side
    ground = np.full((side, side, 3), rng.uniform(0.3, 0.7, 3))
    for _ in range(5):
        phase = 2 * np.pi * (rng.uniform(-2, 2) * x + rng.uniform(-2, 2) * y) + rng.uniform(0, 2 * np.pi)
        ground += 0.06 * np.sin(phase)[..., None] * rng.normal(0, 1, 3)
    return ground


def _borders(index: np.ndarray) -> np.ndarray:
    """The pixels of which one of the four neighbours has another class."""
    cross = generate_binary_structure(2, 1)
    return maximum_filter(index, footprint=cross) != minimum_filter(index, footprint=cross)


def write_scenes(out: Path, train: int = 2000, val: int = 400, side: int = 64, seed: int = 0) -> None:
    """Write scenes, each with a seed of its own, in VOC layout.

    Args:
        out: The folder to write.
        train: The number of scenes to train on.
        val: The number of scenes to judge by.
        side: Of a scene, in pixels.
        seed: Decides all of them.
    """
    folders = {kind: out / kind for kind in ("JPEGImages", "SegmentationClass", "Annotations", "ImageSets/Segmentation")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    names = {split: [f"{split}-{i:05}" for i in range(count)] for split, count in (("train", train), ("val", val))}
    for split, those in names.items():
        (folders["ImageSets/Segmentation"] / f"{split}.txt").write_text("".join(f"{name}\n" for name in those))
    for i, name in enumerate(tqdm(names["train"] + names["val"], desc="scenes")):
        picture, index, labels = scene(np.random.default_rng([seed, i]), side)
        Image.fromarray(picture).save(folders["JPEGImages"] / f"{name}.jpg", quality=95)
        save_index(index, folders["SegmentationClass"] / f"{name}.png")
        annotation = ElementTree.Element("annotation")
        for label in labels:
            ElementTree.SubElement(ElementTree.SubElement(annotation, "object"), "name").text = CLASSES[label]
        ElementTree.ElementTree(annotation).write(folders["Annotations"] / f"{name}.xml")



if __name__ == "__main__":
    cli(write_scenes)
