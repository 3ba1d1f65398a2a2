"""examples/vos: what is written is read, and bad data is one error that names the file."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.shared.images import DataError
from examples.vos import figures, infer, study, synthetic, train
from examples.vos.data import read_clip, read_clips
from tests.support import vos_clips

pytestmark = pytest.mark.promise("examples")
TINY, written = vos_clips.TINY, vos_clips.written


@pytest.fixture
def data(written, tmp_path):
    """A copy that a test may break."""
    return Path(shutil.copytree(written, tmp_path / "data"))


def test_what_is_written_is_read(written):
    clips = read_clips(written, "train")
    assert [clip.name for clip in clips] == ["train-000", "train-001", "train-002"] and all(len(clip) == 5 for clip in clips)
    for clip in clips:
        mask = clip.first_mask()
        assert mask.shape == (clip.objects, 40, 48) and mask.flatten(1).any(1).all() and mask.sum(0).max() == 1
        assert clip.image(0).shape == (3, 40, 48) and clip.annotated() == list(range(5))


def test_objects_are_of_the_size_asked_for():
    def area(size):
        labels = [synthetic.clip(np.random.default_rng(i), 1, 64, 96, size)[1][0] for i in range(8)]
        return sum((label > 0).sum() / label.max() for label in labels)  # of an object

    assert 0.15 < area(0.5) / area(1) < 0.4


def test_a_figure_swings_before_a_ground_that_passes():
    pictures, labels = figures.figure(np.random.default_rng(0), 12, 64, 112)
    assert {picture.shape for picture in pictures} == {(64, 112, 3)} and {label.shape for label in labels} == {(64, 112)}
    shares = [label.mean() for label in labels]
    assert 0.02 < min(shares) and max(shares) < 0.3 and {label.max() for label in labels} == {1}
    first, last = (pictures[t].astype(float)[(labels[0] == 0) & (labels[-1] == 0)] for t in (0, -1))
    assert np.abs(first - last).mean() > 10  # of 255: another part of the ground
    first, last = (labels[t].astype(bool) for t in (0, -1))
    assert 0.05 < (first & last).sum() / (first | last).sum() < 0.95


def paths(data, name="train-001"):
    return data / "JPEGImages" / "480p" / name, data / "Annotations" / "480p" / name


def repaint(path, change):
    image = Image.open(path)
    palette = image.getpalette()
    label = torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(image.height, image.width)
    changed = Image.fromarray(change(label).numpy()).convert("P")
    changed.putpalette(palette)
    changed.save(path)


def missing_first(images, annotations):
    (annotations / "00000.png").unlink()
    return annotations / "00000.png"


def no_frames(images, annotations):
    shutil.rmtree(images)
    return images


def annotation_of_another_size(images, annotations):
    repaint(annotations / "00000.png", lambda label: label[:, :-3].contiguous())
    return annotations / "00000.png"


def frame_of_another_size(images, annotations):
    Image.open(images / "00002.jpg").resize((10, 10)).save(images / "00002.jpg")
    return images / "00002.jpg"


def no_object(images, annotations):
    repaint(annotations / "00000.png", torch.zeros_like)
    return annotations / "00000.png"


def an_empty_object(images, annotations):
    repaint(annotations / "00000.png", lambda label: label * 2)
    return annotations / "00000.png"


def colours_instead_of_a_palette(images, annotations):
    Image.open(annotations / "00000.png").convert("RGB").save(annotations / "00000.png")
    return annotations / "00000.png"


@pytest.mark.parametrize(
    "spoil, says",
    [
        (missing_first, "no annotation"),
        (no_frames, "no .jpg frame here"),
        (annotation_of_another_size, "is 45x40, its frame 48x40"),
        (frame_of_another_size, "is 10x10, the first frame 48x40"),
        (no_object, "no object in the first frame"),
        (an_empty_object, "object 1 of . is empty in the first frame"),
        (colours_instead_of_a_palette, "expected a palette PNG, got mode RGB"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_data_is_one_error_that_names_the_file(data, spoil, says):
    path = spoil(*paths(data))
    with pytest.raises(DataError, match=says) as error:
        read_clips(data, "train")
    assert str(error.value).startswith(str(path))


def test_a_palette_index_beyond_the_objects(data):
    path = paths(data)[1] / "00003.png"
    repaint(path, lambda label: label + 4)
    with pytest.raises(DataError, match="palette index . but the first frame has . objects".replace(" but", ", but")) as error:
        read_clip(data, "train-001").mask(3)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("kind", [0, 1], ids=["jpeg", "png"])
def test_a_truncated_file(data, kind):
    folder = paths(data)[kind]
    path = folder / ("00002.jpg" if kind == 0 else "00002.png")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    clip = read_clip(data, "train-001")
    with pytest.raises(DataError, match="cannot be read") as error:
        clip.image(2) if kind == 0 else clip.mask(2)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("content, says", [(None, "no such file"), ("", "names no clip"), ("nothing-here", "no .jpg frame here")])
def test_a_list_of_clips_that_is_wrong(data, content, says):
    names = data / "ImageSets" / "2017" / "train.txt"
    names.unlink() if content is None else names.write_text(content)
    with pytest.raises(DataError, match=says):
        read_clips(data, "train")


@pytest.mark.parametrize("command", [train, infer, study])
def test_a_command_says_in_one_line_what_is_wrong_with_the_data(data, tmp_path, monkeypatch, command):
    train.Trainer(train.Run(TINY), read_clips(data, "train")).save(tmp_path / "checkpoint.pt")
    path = missing_first(*paths(data, "val-000"))
    arguments = ["command", "--data", data, "--out", tmp_path / "out"]
    arguments += {train: [], infer: ["--checkpoint", tmp_path / "checkpoint.pt"], study: []}[command]
    if command is train:
        path.parents[3].joinpath("ImageSets", "2017", "train.txt").write_text("val-000")
    monkeypatch.setattr(sys, "argv", [str(a) for a in arguments])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == f"{path}: no annotation"


def test_training_reads_no_annotation_but_the_first(data):
    for name in ("train-000", "train-001", "train-002"):
        for path in paths(data, name)[1].glob("*.png"):
            if path.stem != "00000":
                path.unlink()
    trainer = train.Trainer(train.Run(TINY), read_clips(data, "train"))
    assert math.isfinite(trainer.advance()[1])
